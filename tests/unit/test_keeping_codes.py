"""Conversions that keep codes: what the plan promises, what the files hold, what is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from oracles.adapters import write_adapter
from oracles.llama_cpp import LlamaCpp
from oracles.quantized_folder import awq_model
from oracles.tiny import write_tiny_llama

from mlxedge.cli import main
from mlxedge.conversion import convert
from mlxedge.fallback import OPS
from mlxedge.recipes.overrides import parse_overrides
from mlxedge.report import Report
from mlxedge.sources import open_source

PURE = parse_overrides((), pure=True)
TYPES = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"]
TO_MLX = {"q4": "mlx:4bit-g32", "q5": "mlx:5bit-g32", "q8": "mlx:8bit-g32", "mx": "mlx:mxfp4"}


def make(source: Path, target: str, out: Path, **options: Any) -> Report:
    return convert(source, target, out, quality="reference", **options)


def weights(path: Path) -> dict[str, np.ndarray]:
    with open_source(path) as checkpoint:
        return {n: OPS.decode(t.read(), t.encoding) for n, t in checkpoint.tensors.items()}


def kept(report: Report) -> dict[str, str | None]:
    """What the record says of matrices."""
    (result,) = report.outputs
    assert result.record is not None
    record = json.loads(result.record.read_text())
    matrices = {t.name for t in result.plan.tensors if len(t.shape) > 1}
    return {t["name"]: t["kept"] for t in record["tensors"] if t["name"] in matrices}


@pytest.mark.parametrize("name", TYPES)
def test_gguf_to_mlx_and_back(tiny: Path, tmp_path: Path, name: str) -> None:
    first, between, again = tmp_path / "a.gguf", tmp_path / "mlx", tmp_path / "b.gguf"
    types = parse_overrides(("weight=mxfp4",)) if name == "mxfp4" else PURE
    target = "gguf:q8_0" if name == "mxfp4" else f"gguf:{name}"
    report = make(tiny, target, first, overrides=types)
    assert set(kept(report).values()) == {None}
    report = make(first, TO_MLX[name[:2]], between, dtype="f16")
    assert set(kept(report).values()) == {"exact"}
    report = make(between, target, again, overrides=types)
    assert set(kept(report).values()) == {"exact"}
    assert report.outputs[0].error == 0
    with open_source(first) as one, open_source(again) as other:
        assert set(one.tensors) == set(other.tensors)
        for tensor, stored in one.tensors.items():
            if len(stored.shape) > 1:
                assert other.tensors[tensor].encoding == stored.encoding
                np.testing.assert_array_equal(
                    other.tensors[tensor].read()["weight"], stored.read()["weight"]
                )


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(("bits", "name"), [(4, "q4_1"), (3, "q4_1"), (5, "q5_1")])
def test_mlx_to_gguf(tiny: Path, tmp_path: Path, bits: int, name: str, group: int) -> None:
    """Scales of bf16 are exact in f16 where they are not tiny, and llama.cpp computes with them."""
    make(tiny, f"mlx:{bits}bit-g{group}", tmp_path / "mlx")
    report = make(tmp_path / "mlx", f"gguf:{name}", tmp_path / "a.gguf", overrides=PURE)
    assert set(kept(report).values()) == {"exact"}
    expected = weights(tmp_path / "mlx")
    for tensor, got in weights(tmp_path / "a.gguf").items():
        np.testing.assert_array_equal(got, expected[tensor])
    make(tmp_path / "mlx", "gguf:f32", tmp_path / "f32.gguf")
    tokens = list(range(20, 60))
    with LlamaCpp(tmp_path / "a.gguf") as one, LlamaCpp(tmp_path / "f32.gguf") as other:
        got, truth = one.logits(tokens), other.logits(tokens)
    # llama.cpp rounds activations to 8 bits where weights are quantized.
    assert np.abs(got - truth).max() < 0.05 * np.abs(truth).max()


def test_scales_that_are_rounded_once(tiny: Path, tmp_path: Path) -> None:
    make(tiny, "gguf:q4_k_s", tmp_path / "a.gguf", overrides=PURE)
    source = weights(tmp_path / "a.gguf")
    for dtype, most in (("f16", 2.0**-10), ("bf16", 2.0**-7)):
        report = make(tmp_path / "a.gguf", "mlx:4bit-g32", tmp_path / dtype, dtype=dtype)
        assert set(kept(report).values()) == {"rounded once"}
        assert 0 < report.outputs[0].error < most
        for tensor, got in weights(tmp_path / dtype).items():
            assert np.abs(got - source[tensor]).max() < 2 * most * np.abs(source[tensor]).max()
    report = make(tmp_path / "a.gguf", "mlx:4bit-g32", tmp_path / "f32", dtype="f32")
    assert set(kept(report).values()) == {"exact"}
    assert report.outputs[0].error == 0
    report = make(tmp_path / "a.gguf", "mlx:4bit-g64", tmp_path / "g64", dtype="f32")
    assert set(kept(report).values()) == {"requantized"}
    report = make(tmp_path / "a.gguf", "mlx:bf16", tmp_path / "floats")
    assert set(kept(report).values()) == {"rounded once"}


def test_quantized_checkpoints(tmp_path: Path) -> None:
    """Whole zero points fit q5_0 exactly; as biases of 16 bits they are rounded."""
    _, source = awq_model(tmp_path)
    layers = {"gguf:q5_0": "exact", "gguf:q4_1": "rounded once", "gguf:q4_0": "requantized"}
    layers |= {"mlx:4bit-g32": "rounded once", "mlx:4bit-g64": "requantized"}
    for number, (target, expected) in enumerate(layers.items()):
        out = tmp_path / (f"{number}.gguf" if target.startswith("gguf") else f"{number}")
        overrides = PURE if target.startswith("gguf") else parse_overrides(())
        report = make(source, target, out, overrides=overrides, dtype="f16")
        found = kept(report)
        assert {v for n, v in found.items() if "embed" not in n and "embd" not in n} == {expected}
        assert [v for n, v in found.items() if "embed" in n or "embd" in n] == [None]
        if expected == "exact":
            truth = weights(source)
            for tensor, got in weights(out).items():
                if tensor.endswith("_proj.weight"):
                    np.testing.assert_array_equal(got, truth[tensor])


def test_the_plan_says_what_becomes_of_codes(tiny: Path, tmp_path: Path) -> None:
    make(tiny, "mlx:4bit-g32", tmp_path / "mlx")
    command = [
        "convert",
        str(tmp_path / "mlx"),
        "--to",
        "gguf:q4_1",
        "-o",
        str(tmp_path / "a.gguf"),
    ]
    shown = CliRunner().invoke(main, [*command, "--dry-run"], catch_exceptions=False).output
    assert "of the tensors that are quantized already: 14 exact, 1 requantized" in shown
    assert "quantizes 1 of its 15 quantized tensors a second time" in shown
    done = CliRunner().invoke(main, [*command, "--dry-run", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)["plan"]["outputs"][0]["kept"]
    assert found["requantized"] == ["token_embd.weight"]  # the recipe gives it six bits
    assert len(found["exact"]) == 14


def test_one_group_that_does_not_fit_is_told_in_advance(tiny: Path, tmp_path: Path) -> None:
    """A single scale beyond f16 makes the whole matrix be quantized again."""
    from safetensors.torch import load_file, save_file

    make(tiny, "mlx:4bit-g32", tmp_path / "mlx", dtype="bf16")
    file = tmp_path / "mlx" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"][3, 2] = 1e-7
    save_file(tensors, file, metadata={"format": "mlx"})
    report = make(tmp_path / "mlx", "gguf:q4_1", tmp_path / "a.gguf", overrides=PURE)
    found = kept(report)
    assert found.pop("blk.0.ffn_up.weight") == "rounded once"
    tensors[f"{name}.scales"][3, 2] = 1e6
    save_file(tensors, file, metadata={"format": "mlx"})
    with open_source(tmp_path / "mlx") as checkpoint:
        from mlxedge.conversion import plan_conversion
        from mlxedge.targets import parse_target

        plan, _ = plan_conversion(
            checkpoint,
            [parse_target("gguf:q4_1")],
            tmp_path / "b.gguf",
            quality="reference",
            overrides=PURE,
        )
    (planned,) = (t for t in plan.outputs[0].tensors if t.name == "blk.0.ffn_up.weight")
    assert (planned.how, planned.kept) == ("encode", "requantized")
    assert set(found.values()) == {"exact"}


def notes(source: Path, target: str, folder: Path, *options: str) -> list[str]:
    """What the plan says of codes, on one line each."""
    command = ["convert", str(source), "--to", target, "-o", str(folder / "out"), "--dry-run"]
    done = CliRunner().invoke(main, [*command, "--json", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (output,) = json.loads(done.stdout)["plan"]["outputs"]
    return [note for note in output["notes"] if "second time" in note]


def test_a_recipe_that_keeps_all_but_some_says_which_option_keeps_those(
    tiny: Path, tmp_path: Path
) -> None:
    """The recipe itself means what it means in llama.cpp."""
    make(tiny, "mlx:4bit-g32", tmp_path / "mlx")
    (note,) = notes(tmp_path / "mlx", "gguf:q4_1", tmp_path)
    assert "token_embd.weight: q6_k by the recipe's mix" in note
    assert "--pure would keep the codes as q4_1" in note
    assert notes(tmp_path / "mlx", "gguf:q4_1", tmp_path, "--pure") == []
    # As told is as wanted.
    (told,) = notes(tmp_path / "mlx", "gguf:q4_1", tmp_path, "--embedding-type", "q8_0")
    assert "--pure" not in told


def test_floats_beside_codes_are_left_to_the_mix(tmp_path: Path) -> None:
    """--pure would take the bits from an embedding of floats; a rule for the others does not."""
    _, source = awq_model(tmp_path)
    options = ("--tensor", "ffn_down=q5_k")
    (told,) = notes(source, "gguf:q4_1", tmp_path, "--no-calibrate", *options)
    assert "--tensor" not in told
    make(source, "mlx:4bit-g32", tmp_path / "mlx", overrides=parse_overrides(("embed=bf16",)))
    (note,) = notes(tmp_path / "mlx", "gguf:q5_k_m", tmp_path)
    assert "gguf:q4_1 would keep its codes" in note
    assert notes(tmp_path / "mlx", "gguf:q4_1", tmp_path, "--no-calibrate") == []


def test_a_mix_beside_floats(tmp_path: Path) -> None:
    tiny, stored = write_tiny_llama(tmp_path / "tiny", layers=8), tmp_path / "first.gguf"
    make(tiny, "gguf:q4_0", stored, overrides=parse_overrides((), embedding="f16", pure=True))
    (note,) = notes(stored, "gguf:q4_0", tmp_path)
    option = "--tensor 'ffn_down=q4_0'"
    assert f"blk.0.ffn_down.weight: q4_1 by the recipe's mix, and {option} would keep" in note
    assert notes(stored, "gguf:q4_0", tmp_path, "--tensor", "ffn_down=q4_0") == []


@pytest.mark.parametrize(
    ("first", "target", "advice"),
    [
        ("mlx:4bit-g32", "gguf:q4_k_m", "gguf:q4_1 with --pure would keep its codes"),
        ("mlx:4bit", "gguf:q4_k_m", "gguf:q4_1 with --pure would keep its codes"),
        ("mlx:4bit-g32", "mlx:3bit", "mlx:4bit-g32 would keep its codes"),
        ("mlx:6bit", "gguf:q6_k", "docs/conversion.md says"),
        ("gguf:q4_k_s", "mlx:4bit", "mlx:4bit-g32 would keep its codes"),
        ("gguf:q8_0", "mlx:4bit", "mlx:8bit-g32 would keep its codes"),
        ("gguf:q6_k", "mlx:6bit", "docs/conversion.md says"),
        ("gguf:q8_0", "gguf:q4_k_m", "gguf:q8_0 with --pure would keep its codes"),
    ],
)
def test_another_target_that_keeps_codes_is_named(
    tiny: Path, tmp_path: Path, first: str, target: str, advice: str
) -> None:
    source = tmp_path / ("first.gguf" if first.startswith("gguf") else "first")
    make(tiny, first, source, overrides=PURE if first.startswith("gguf") else parse_overrides(()))
    (note,) = notes(source, target, tmp_path)
    assert advice in note
    # The advice is true.
    if "would keep its codes" in advice:
        named = advice.split()[0]
        options = ("--pure",) if "--pure" in advice else ()
        assert notes(source, named, tmp_path, *options) == []


def test_what_an_adapter_changes(tiny: Path, tmp_path: Path) -> None:
    make(tiny, "mlx:4bit-g32", tmp_path / "mlx")
    adapter = write_adapter(tmp_path / "lora", tiny, "q_proj")
    options = ("--adapter", str(adapter))
    (note,) = notes(tmp_path / "mlx", "mlx:4bit-g32", tmp_path, *options)
    assert "2 of its 15 quantized tensors a second time" in note
    assert "an adapter changes has no codes to keep" in note
    (note,) = notes(tmp_path / "mlx", "gguf:q4_k_m", tmp_path, *options)
    assert "gguf:q4_1 with --pure would keep the codes of 13 of these 15 tensors" in note
