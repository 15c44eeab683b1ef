"""MLX folders that mlx-lm itself wrote, and folders that contradict themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from safetensors.numpy import load_file, save_file

from mlxedge.encodings import BF16, F16, MLX_FLOAT, Affine
from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources import open_source
from mlxedge.sources.checkpoint import Checkpoint

CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
GATE, Q = "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj"


def mlx_folder(
    folder: Path,
    dtype: mx.Dtype,
    rules: dict[str, Any] | None,
    paths: dict[str, dict[str, Any] | bool] | None = None,
) -> dict[str, mx.array]:
    """A tiny llama, quantized and saved by MLX and mlx-lm; returns its arrays by name."""
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    model.set_dtype(dtype)
    config: dict[str, Any] = dict(CONFIG)
    if rules:
        chosen = paths or {}
        nn.quantize(
            model,
            **rules,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and chosen.get(path, True)
            ),
        )
        config["quantization"] = rules | chosen
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return dict(tree_flatten(model.parameters()))


def check_parts(checkpoint: Checkpoint, arrays: dict[str, mx.array]) -> None:
    """Every stored array is handed out once, whole and by rows."""
    seen = set()
    for name, tensor in checkpoint.tensors.items():
        for part, array in tensor.read().items():
            stored = name if part == "weight" else name.removesuffix("weight") + part
            seen.add(stored)
            expected = np.array(arrays[stored].view(mx.uint8)).reshape(tensor.rows, -1)
            assert array.reshape(tensor.rows, -1).view(np.uint8).tobytes() == expected.tobytes()
            some = tensor.read_rows(1, tensor.rows)[part] if tensor.rows > 1 else array
            assert np.array_equal(some, array[1:] if tensor.rows > 1 else array)
            want = tensor.encoding.parts((tensor.rows, tensor.cols))[part]
            assert array.shape == want.shape
    assert seen == set(arrays)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(mx.bfloat16, "bf16"), (mx.float16, "f16"), (mx.float32, "f32")]
)
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (6, 128), (8, 64)])
def test_affine(tmp_path: Path, dtype: mx.Dtype, scale: str, bits: int, group: int) -> None:
    arrays = mlx_folder(tmp_path, dtype, {"group_size": group, "bits": bits, "mode": "affine"})
    with open_source(tmp_path) as checkpoint:
        assert checkpoint.origin.kind == "mlx"
        tensor = checkpoint.tensors[f"{DOWN}.weight"]
        assert tensor.encoding == Affine(bits, group, scale)
        assert tensor.shape == (128, 256)
        assert set(tensor.read()) == {"weight", "scales", "biases"}
        assert checkpoint.tensors["model.norm.weight"].encoding.name == scale
        assert not any(n.endswith(("scales", "biases")) for n in checkpoint.tensors)
        check_parts(checkpoint, arrays)


@pytest.mark.parametrize("mode", list(MLX_FLOAT))
def test_float_modes(tmp_path: Path, mode: str) -> None:
    encoding = MLX_FLOAT[mode]
    rules = {"group_size": encoding.group, "bits": encoding.bits, "mode": mode}
    arrays = mlx_folder(tmp_path, mx.bfloat16, rules)
    with open_source(tmp_path) as checkpoint:
        tensor = checkpoint.tensors[f"{UP}.weight"]
        assert (tensor.encoding, tensor.shape) == (encoding, (256, 128))
        assert set(tensor.read()) == {"weight", "scales"}
        check_parts(checkpoint, arrays)


def test_each_path_has_its_own_rule(tmp_path: Path) -> None:
    arrays = mlx_folder(
        tmp_path,
        mx.bfloat16,
        {"group_size": 64, "bits": 4},
        {
            DOWN: {"group_size": 32, "bits": 6},
            UP: False,
            GATE: {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        },
    )
    with open_source(tmp_path) as checkpoint:
        modules = (DOWN, UP, GATE, Q)
        assert {m: checkpoint.tensors[f"{m}.weight"].encoding for m in modules} == {
            DOWN: Affine(6, 32, "bf16"),
            UP: BF16,
            GATE: MLX_FLOAT["mxfp4"],
            Q: Affine(4, 64, "bf16"),
        }
        check_parts(checkpoint, arrays)


def test_unquantized(tmp_path: Path) -> None:
    arrays = mlx_folder(tmp_path, mx.float16, None)
    with open_source(tmp_path) as checkpoint:
        assert checkpoint.origin.kind == "mlx"
        assert {t.encoding for t in checkpoint.tensors.values()} == {F16}
        check_parts(checkpoint, arrays)


def test_group_size_may_be_null(tmp_path: Path) -> None:
    """As mlx-lm writes it for a mixed recipe without one."""
    mlx_folder(tmp_path, mx.bfloat16, {"group_size": 64, "bits": 4})
    edit_config(lambda c: c["quantization"].update(group_size=None))(tmp_path)
    with open_source(tmp_path) as checkpoint:
        assert checkpoint.tensors[f"{Q}.weight"].encoding == Affine(4, 64, "bf16")


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors", metadata={"format": "mlx"})

    return edit


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "other-bits": (
        edit_config(lambda c: c["quantization"].update(bits=8)),
        "but affine-8bit-g64 weights",
    ),
    "other-group": (edit_config(lambda c: c["quantization"].update(group_size=32)), "need bf16"),
    "other-mode": (edit_config(lambda c: c["quantization"].update(mode="mxfp4")), "need u8"),
    "no-such-bits": (edit_config(lambda c: c["quantization"].update(bits=7)), "no affine 7 bits"),
    "bits-text": (edit_config(lambda c: c["quantization"].update(bits="4")), "no affine '4' bits"),
    "no-rules": (edit_config(lambda c: c.pop("quantization")), "which has scales"),
    "rules-list": (edit_config(lambda c: c.update(quantization=[4])), "not an object"),
    "said-not": (edit_config(lambda c: c["quantization"].update({Q: False})), f"False for {Q}"),
    "said-so": (
        edit_config(lambda c: c["quantization"].update({"model.norm": {"bits": 4}})),
        "which has no scales",
    ),
    "no-biases": (edit_tensors(lambda t: t.pop(f"{Q}.biases")), f"{Q} has no biases"),
    "short-scales": (
        edit_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :1].copy()})),
        f"{Q}.scales is bf16 [128, 1]",
    ),
    "wide-biases": (
        edit_tensors(lambda t: t.update({f"{Q}.biases": t[f"{Q}.biases"].astype(np.float32)})),
        f"{Q}.biases is f32",
    ),
    "codes-dtype": (
        edit_tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].view(np.int32)})),
        f"{Q}.weight is i32",
    ),
    "scales-dtype": (
        edit_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].view(np.int16)})),
        f"{Q}.scales is i16",
    ),
    "codes-width": (
        edit_tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :5].copy()})),
        "columns, not a multiple of 64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_refused(tmp_path: Path, case: str) -> None:
    mlx_folder(tmp_path, mx.bfloat16, {"group_size": 64, "bits": 4})
    change, words = BAD[case]
    change(tmp_path)
    with pytest.raises(CorruptFileError) as caught:
        open_source(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_mode(tmp_path: Path) -> None:
    mlx_folder(tmp_path, mx.bfloat16, {"group_size": 64, "bits": 4})
    edit_config(lambda c: c["quantization"].update(mode="fp3"))(tmp_path)
    with pytest.raises(UnsupportedEncodingError, match="'fp3'"):
        open_source(tmp_path)


def test_a_cut_shard_is_refused(tmp_path: Path) -> None:
    mlx_folder(tmp_path, mx.bfloat16, {"group_size": 64, "bits": 4})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_source(tmp_path)


def test_bf16_is_ml_dtypes(tmp_path: Path) -> None:
    mlx_folder(tmp_path, mx.bfloat16, {"group_size": 64, "bits": 4})
    with open_source(tmp_path) as checkpoint:
        scales = checkpoint.tensors[f"{Q}.weight"].read()["scales"]
        assert scales.dtype == ml_dtypes.bfloat16
        assert scales.flags.writeable
