"""gpt_oss as it is published: experts in MXFP4, whose codes stay, and yarn that does not round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.checkpoints import write_checkpoint
from oracles.llama_cpp import LlamaCpp
from oracles.llama_quantize import types
from safetensors.torch import load_file, save_file

import mlxedge
from mlxedge.conversion import plan_conversion
from mlxedge.ops import load_reference
from mlxedge.prepare import prepare
from mlxedge.recipes.llama_cpp import file_type
from mlxedge.recipes.overrides import parse_overrides
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf
from mlxedge.targets import parse_target

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 512, 96)]
STACKS = ("gate_up_proj", "down_proj")
#: Which stacks of experts GGUF has.
EXPERTS = tuple(f"ffn_{part}_exps.weight" for part in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in the layout of openai/gpt-oss-20b, and the floats that its codes stand for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    home = tmp_path_factory.mktemp("gpt_oss")
    floats = write_checkpoint(home / "floats", "gpt_oss", hidden_size=256, intermediate_size=256)
    tensors = load_file(floats / "model.safetensors")
    published, generator = dict(tensors), torch.Generator().manual_seed(1)
    for layer in range(2):
        for stack in STACKS:
            name = f"model.layers.{layer}.mlp.experts.{stack}"
            experts, cols, rows = published.pop(name).shape
            size = (experts, rows, cols // 32)
            blocks = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
            # Gates are that large that some are clamped.
            low = 124 if stack == "gate_up_proj" else 119
            scales = torch.randint(low, low + 2, size, generator=generator, dtype=torch.uint8)
            published |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            tensors[name] = decoded.contiguous()
    save_file(tensors, floats / "model.safetensors", metadata={"format": "pt"})
    folder = home / "published"
    folder.mkdir()
    for file in floats.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder, floats


def truth(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def mlx_lm(folder: Path) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm import load

    model = load(str(folder))[0]
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


def test_codes_are_kept_and_run_everywhere(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, floats = folders
    expected = truth(floats)
    with open_source(folder) as source:
        targets = [parse_target(t) for t in ("gguf:mxfp4_moe", "mlx:8bit", "gguf:q4_k_m")]
        made, _ = plan_conversion(source, targets, tmp_path / "out", calibrate=False)
    for output in made.outputs:
        kept = [t for t in output.tensors if "experts." in t.source and t.source.endswith("weight")]
        assert len(kept) == 2 * 3
        assert {(t.how, t.kept) for t in kept} <= {("transcode", "exact"), ("copy", "exact")}
        assert all("mxfp4" in t.encoding.name for t in kept)
        assert any("experts stay as they are published" in note for note in output.notes)
    assert error(mlxedge.load(folder).logits(TOKENS), expected) < 1e-4
    mlxedge.convert(folder, ["gguf:f32", "mlx:f32", "gguf:q8_0", "mlx:mxfp4"], tmp_path)
    with LlamaCpp(tmp_path / "published-F32.gguf", cache="f32") as model:
        assert error(model.logits(TOKENS), expected) < 1e-4
    assert error(mlx_lm(tmp_path / "published-mlx-f32"), expected) < 1e-4
    # Only attention, embedding and head lost anything; but at a few positions a near-tie of two
    # experts is decided otherwise.
    with LlamaCpp(tmp_path / "published-Q8_0.gguf", cache="f32") as model:
        off = ((model.logits(TOKENS) - expected) ** 2).sum(1) / (expected**2).sum(1)
    assert np.sqrt(np.median(off)) < 0.1
    quantized = tmp_path / "published-mlx-mxfp4"
    assert error(mlx_lm(quantized), mlxedge.load(quantized).logits(TOKENS)) < 1e-3
    for made_path in (tmp_path / "published-Q8_0.gguf", quantized):
        assert decoded(made_path).keys() == decoded(folder).keys()
        for name, weights in decoded(folder).items():
            np.testing.assert_array_equal(decoded(made_path)[name], weights)
    # And on from there: the codes that a GGUF file has are MLX's again, and floats transformers'.
    mlxedge.convert(tmp_path / "published-Q8_0.gguf", "mlx:4bit", tmp_path / "again")
    for name, weights in decoded(folder).items():
        np.testing.assert_array_equal(decoded(tmp_path / "again")[name], weights)
    # mlx-lm runs codes of two kinds in one model.
    made_again = tmp_path / "again"
    assert error(mlx_lm(made_again), mlxedge.load(made_again).logits(TOKENS)) < 1e-3
    mlxedge.convert(folder, "hf:f32", tmp_path / "back")
    assert error(truth(tmp_path / "back"), expected) == 0


def decoded(path: Path) -> dict[str, np.ndarray]:
    """The experts' matrices."""
    with open_source(path) as opened:
        tensors = prepare(opened)[1].tensors
        return {
            name: load_reference().decode(t.read(), t.encoding)
            for name, t in tensors.items()
            if "experts." in name and name.endswith("weight")
        }


def test_what_is_asked_for_is_done(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A type for the experts, or one type for all."""
    folder, _ = folders
    for options, kind in (
        ({"tensors": ["_exps=q5_k"]}, "q5_k"),
        ({"tensors": ["ffn_.*_exps=mxfp4"]}, "mxfp4"),
        ({"pure": True}, "q4_k"),
    ):
        mlxedge.convert(
            folder,
            "gguf:q4_k_s",
            tmp_path / "m.gguf",
            calibrate=False,
            overrides=parse_overrides(**options),  # type: ignore[arg-type]
            force=True,
        )
        assert set(expert_types(tmp_path / "m.gguf").values()) == {kind}
    mlxedge.convert(
        folder,
        "mlx:4bit",
        tmp_path / "mlx",
        calibrate=False,
        overrides=parse_overrides(["experts=6bit"]),
    )
    with open_source(tmp_path / "mlx") as opened:
        found = {
            t.encoding.name
            for n, t in opened.tensors.items()
            if "experts" in n and n.endswith("weight")
        }
    assert found == {"affine-6bit-g64"}


def expert_types(path: Path) -> dict[str, str]:
    return {t.name: t.encoding.name for t in read_gguf(path).tensors if t.name.endswith(EXPERTS)}


def test_types_are_llama_quantizes_of_the_published_model(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """llama-quantize makes a file of floats like the published one by ``mxfp4_moe``, and of its own
    accord requantizes nothing: all but experts go by the recipe."""
    folder, floats = folders
    recipes = ("mxfp4_moe", "q4_k_m", "q8_0")
    mlxedge.convert(floats, "gguf:f32", tmp_path / "f32.gguf")
    mlxedge.convert(folder, [f"gguf:{r}" for r in recipes], tmp_path, calibrate=False)
    for recipe in recipes:
        file = tmp_path / f"published-{recipe.upper()}.gguf"
        found = {t.name: t.encoding.name for t in read_gguf(file).tensors}
        expected = types(tmp_path / "f32.gguf", file_type(recipe))
        if recipe != "mxfp4_moe":
            expected |= dict.fromkeys(expert_types(file), "mxfp4")
        assert found == expected


def test_the_published_ramp_is_rounded_by_runtimes(tmp_path: Path) -> None:
    """yarn with the settings of gpt-oss-20b: ours is exact, and the others are what they are."""
    rope = {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
        "rope_theta": 150000.0,
    }
    folder = write_checkpoint(tmp_path / "source", "gpt_oss", head_dim=64, rope_parameters=rope)
    expected = truth(folder)
    assert error(mlxedge.load(folder).logits(TOKENS), expected) < 1e-4
    targets = ["gguf:f32", "mlx:f32"]
    with open_source(folder) as source:
        made, _ = plan_conversion(source, [parse_target(t) for t in targets], tmp_path)
    assert all(any("rounds the ends" in n for n in o.notes) for o in made.outputs)
    mlxedge.convert(folder, targets, tmp_path)
    for name in ("source-F32.gguf", "source-mlx-f32"):
        assert error(mlxedge.load(tmp_path / name).logits(TOKENS), expected) < 1e-4
        mlxedge.convert(tmp_path / name, "hf:f32", tmp_path / f"{name}-back")
        assert error(truth(tmp_path / f"{name}-back"), expected) < 1e-4
    with LlamaCpp(tmp_path / "source-F32.gguf", cache="f32") as model:
        rounded = model.logits(TOKENS)
    assert error(mlx_lm(tmp_path / "source-mlx-f32"), rounded) < 1e-4
    assert 1e-4 < error(rounded, expected) < 0.1
