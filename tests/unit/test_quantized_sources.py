"""Quantized checkpoints by their published formulas, written out here, and damaged ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles.quantized_folder import awq_layer, awq_model, read_weights, write_folder
from oracles.tiny import write_tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlxedge.conversion import convert
from mlxedge.errors import (
    BadWeightsError,
    CorruptFileError,
    MlxedgeError,
    UnsupportedEncodingError,
)
from mlxedge.sources import open_source

X = "model.layers.0.mlp.up_proj"
Arrays = dict[str, Any]
F8 = torch.float8_e4m3fn


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one stream as i32: the first in the lowest bits, without gaps."""
    stream = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
    return np.array(words, np.uint32).view(np.int32)


def gptq(
    bits: int,
    group: int,
    *,
    version: str = "gptq",
    order: bool = False,
    symmetric: bool = False,
    rows: int = 64,
    cols: int = 128,
    dtype: Any = np.float16,
) -> tuple[dict[str, Any], Arrays, np.ndarray]:
    """A layer as AutoGPTQ packs it (``qlinear_cuda.py``, ``pack``), and its weights."""
    random, groups = rng(bits), 1 if group == -1 else cols // group
    codes = random.integers(0, 2**bits, (rows, cols))
    zeros = random.integers(1, 2**bits, (rows, groups))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = random.uniform(0.001, 0.1, (rows, groups)).astype(dtype)
    index = np.arange(cols) // (cols // groups)
    if order:
        random.shuffle(index)
    weights = np.empty((rows, cols), np.float32)
    for r in range(rows):
        for c in range(cols):
            g = index[c]
            weights[r, c] = np.float32(scales[r, g]) * np.float32(codes[r, c] - zeros[r, g])
    less = 1 if version == "gptq" else 0
    arrays = {
        f"{X}.qweight": np.stack([words_of(codes[r], bits) for r in range(rows)], axis=1),
        f"{X}.qzeros": np.stack([words_of(zeros[:, g] - less, bits) for g in range(groups)]),
        f"{X}.scales": scales.T,
        f"{X}.g_idx": index.astype(np.int32),
        f"{X}.bias": np.zeros(rows, np.float16),
    }
    rules = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": order,
        "sym": symmetric,
        "checkpoint_format": version,
    }
    return rules, arrays, weights


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", [False, True], ids=["", "desc_act"])
@pytest.mark.parametrize("group", [32, 64, 16, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, group: int, order: bool, version: str) -> None:
    if bits == 3:
        version = "gptq_v2"  # the only one that is read
    rules, arrays, weights = gptq(bits, group, version=version, order=order)
    found = read_weights(write_folder(tmp_path, rules, arrays))
    assert list(found) == [f"{X}.weight", f"{X}.bias"]
    encoding, got = found[f"{X}.weight"]
    kept = f"affine-{bits}bit-g{128 if group == -1 else group}"
    assert encoding == ("f32" if order or group == 16 else kept)
    np.testing.assert_array_equal(got, weights)


def test_gptq_layers_with_bits_and_groups_of_their_own(tmp_path: Path) -> None:
    rules, arrays, weights = gptq(4, 32, version="gptq_v2")
    rules["dynamic"] = {r"+:.*down_proj": {"bits": 8, "group_size": 64}}
    _, others, expected = gptq(8, 64, version="gptq_v2")
    down = "model.layers.0.mlp.down_proj"
    arrays |= {name.replace(X, down): array for name, array in others.items()}
    found = read_weights(write_folder(tmp_path, rules, arrays))
    assert found[f"{X}.weight"][0] == "affine-4bit-g32"
    assert found[f"{down}.weight"][0] == "affine-8bit-g64"
    np.testing.assert_array_equal(found[f"{X}.weight"][1], weights)
    np.testing.assert_array_equal(found[f"{down}.weight"][1], expected)


def test_gptq_without_an_index_and_with_f32_scales(tmp_path: Path) -> None:
    rules, arrays, weights = gptq(4, 32, dtype=np.float32)
    del arrays[f"{X}.g_idx"], rules["checkpoint_format"]
    encoding, got = read_weights(write_folder(tmp_path, rules, arrays))[f"{X}.weight"]
    assert encoding == "f32"
    np.testing.assert_array_equal(got, weights)


def test_gptq_zero_points_of_zero(tmp_path: Path) -> None:
    """GPTQModel subtracts 1 from whole words, so that a zero point of 0 borrows."""
    rules, arrays, _ = gptq(4, 32, version="gptq_v2")
    zeros = np.arange(64 * 4).reshape(4, 64) % 16
    packed = np.stack([words_of(row, 4) for row in zeros]).view(np.uint32)
    v2 = read_weights(
        write_folder(tmp_path / "2", rules, arrays | {f"{X}.qzeros": packed.view(np.int32)})
    )
    less = (packed - np.uint32(0x11111111)).view(np.int32)
    rules["checkpoint_format"] = "gptq"
    v1 = read_weights(write_folder(tmp_path / "1", rules, arrays | {f"{X}.qzeros": less}))
    np.testing.assert_array_equal(v1[f"{X}.weight"][1], v2[f"{X}.weight"][1])


@pytest.mark.parametrize("group", [32, 64, 16, -1])
def test_awq(tmp_path: Path, group: int) -> None:
    rules, arrays, weights = awq_layer(X, group)
    ((name, (encoding, got)),) = read_weights(write_folder(tmp_path, rules, arrays)).items()
    assert name == f"{X}.weight"
    assert encoding == ("f32" if group == 16 else f"affine-4bit-g{128 if group == -1 else group}")
    np.testing.assert_array_equal(got, weights)


def test_fp8_blocks_that_go_over_the_edge(tmp_path: Path) -> None:
    """128 × 128 over 200 × 300, as DeepSeek-V3's ``inference/fp8_cast_bf16.py`` does it."""
    codes = torch.from_numpy(rng().normal(0, 40, (200, 300)).astype(np.float32)).to(F8)
    scale = rng(1).uniform(0.5, 2, (2, 3)).astype(np.float32)
    expected = codes.to(torch.float32).numpy()
    for r in range(200):
        for c in range(300):
            expected[r, c] *= scale[r // 128, c // 128]
    rules = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    arrays = {f"{X}.weight": codes, f"{X}.weight_scale_inv": scale}
    np.testing.assert_array_equal(
        read_weights(write_folder(tmp_path, rules, arrays))[f"{X}.weight"][1], expected
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_scale", (24, 1)),
        ("weight_scale", (24,)),
        ("weight_scale", ()),
        ("weight_scale_inv", (1,)),
        ("qscale_weight", (1, 1)),
    ],
)
def test_fp8_scales_of_rows_and_of_all(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    codes = torch.from_numpy(rng().normal(0, 40, (24, 64)).astype(np.float32)).to(F8)
    scale = rng(1).uniform(0.5, 2, shape).astype(np.float32).reshape(shape)
    expected = codes.to(torch.float32).numpy() * scale.reshape(-1, 1)
    arrays = {f"{X}.weight": codes, f"{X}.{name}": torch.from_numpy(scale)}
    folder = write_folder(tmp_path, {"quant_method": "fp8"}, arrays)
    np.testing.assert_array_equal(read_weights(folder)[f"{X}.weight"][1], expected)


def modelopt() -> tuple[Arrays, np.ndarray]:
    random = rng(7)
    codes = random.integers(0, 16, (24, 64), dtype=np.uint8)
    scale = torch.from_numpy(random.uniform(1, 400, (24, 4)).astype(np.float32)).to(F8)
    overall = np.float32(0.00037)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    weights = np.empty((24, 64), np.float32)
    for r in range(24):
        for c in range(64):
            by = np.float32(scale[r, c // 16].item()) * overall
            weights[r, c] = np.float32(table[codes[r, c]]) * by
    arrays = {
        f"{X}.weight": codes[:, ::2] | codes[:, 1::2] << 4,
        f"{X}.weight_scale": scale,
        f"{X}.weight_scale_2": torch.tensor(overall),
        f"{X}.input_scale": torch.tensor(1.0),
    }
    return arrays, weights


def test_modelopt(tmp_path: Path) -> None:
    arrays, weights = modelopt()
    down = "model.layers.0.mlp.down_proj"
    arrays |= {f"{down}.weight": torch.ones(8, 32).to(F8), f"{down}.weight_scale": torch.ones(1)}
    rules = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    found = read_weights(write_folder(tmp_path / "config", rules, arrays))
    assert set(found) == {f"{X}.weight", f"{down}.weight"}
    np.testing.assert_array_equal(found[f"{X}.weight"][1], weights)
    # Older exports say so in a file of their own.
    folder = write_folder(tmp_path / "file", None, arrays)
    (folder / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}})
    )
    np.testing.assert_array_equal(read_weights(folder)[f"{X}.weight"][1], weights)
    with open_source(folder) as checkpoint:
        assert checkpoint.quantized == "modelopt, NVFP4"


def bnb(rows: int, cols: int, block: int, nested: int) -> tuple[Arrays, np.ndarray]:
    """As ``bitsandbytes.functional.QuantState.from_dict`` reads it."""
    random, size = rng(rows), rows * cols
    table = np.sort(random.uniform(-1, 1, 16)).astype(np.float32)
    codes = random.integers(0, 16, size + size % 2, dtype=np.uint8)
    count = -(-size // block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [rows, cols]}
    arrays = {
        f"{X}.weight": (codes[::2] << 4 | codes[1::2])[:, None],
        f"{X}.weight.quant_map": table,
    }
    if nested:
        small = random.integers(0, 256, count, dtype=np.uint8)
        inner = random.uniform(0, 1, 256).astype(np.float32)
        outer = random.uniform(1, 2, -(-count // nested)).astype(np.float32)
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.125}
        arrays |= {
            f"{X}.weight.absmax": small,
            f"{X}.weight.nested_absmax": outer,
            f"{X}.weight.nested_quant_map": inner,
        }
        absmax = [inner[s] * outer[i // nested] + np.float32(0.125) for i, s in enumerate(small)]
    else:
        absmax = list(random.uniform(1, 2, count).astype(np.float32))
        arrays[f"{X}.weight.absmax"] = np.array(absmax)
    arrays[f"{X}.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(
        json.dumps(state).encode(), np.uint8
    ).copy()
    weights = [table[codes[i]] * absmax[i // block] for i in range(size)]
    return arrays, np.array(weights, np.float32).reshape(rows, cols)


@pytest.mark.parametrize("nested", [0, 3, 256])
@pytest.mark.parametrize(("rows", "cols", "block"), [(9, 64, 64), (9, 37, 64), (5, 100, 32)])
def test_bitsandbytes_blocks_over_the_ends_of_rows(
    tmp_path: Path, rows: int, cols: int, block: int, nested: int
) -> None:
    arrays, weights = bnb(rows, cols, block, nested)
    folder = write_folder(tmp_path, {"quant_method": "bitsandbytes"}, arrays)
    np.testing.assert_array_equal(read_weights(folder)[f"{X}.weight"][1], weights)


def ct(settings: dict[str, Any], kind: str = "pack-quantized") -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": settings}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def packed(rows: int = 16, cols: int = 64) -> tuple[dict[str, Any], Arrays, np.ndarray]:
    random = rng(11)
    codes = random.integers(0, 16, (rows, cols))
    scale = random.uniform(0.01, 0.1, (rows, cols // 32)).astype(ml_dtypes.bfloat16)
    weights = np.repeat(scale.astype(np.float32), 32, axis=1) * (codes - 8).astype(np.float32)
    arrays = {
        f"{X}.weight_packed": np.stack([words_of(row, 4) for row in codes]),
        f"{X}.weight_scale": torch.from_numpy(scale.astype(np.float32)).to(torch.bfloat16),
        f"{X}.weight_shape": np.array([rows, cols]),
    }
    return ct(INT4), arrays, weights


def test_columns_in_another_order(tmp_path: Path) -> None:
    rules, arrays, weights = packed()
    index = rng(12).permutation(np.arange(64) // 32).astype(np.int32)
    scale = arrays[f"{X}.weight_scale"].to(torch.float32).numpy()
    codes = weights / np.repeat(scale, 32, axis=1)
    folder = write_folder(tmp_path, rules, arrays | {f"{X}.weight_g_idx": index})
    ((_, (encoding, got)),) = read_weights(folder).items()
    assert encoding == "f32"
    np.testing.assert_array_equal(got, np.rint(codes) * scale[:, index])


Change = Callable[[dict[str, Any], Arrays], None]


def without(*names: str) -> Change:
    return lambda rules, arrays: [arrays.pop(f"{X}.{n}") for n in names] and None


def instead(**arrays: Any) -> Change:
    return lambda rules, have: have.update({f"{X}.{n}": a for n, a in arrays.items()})


def saying(**rules: Any) -> Change:
    return lambda have, arrays: have.update(rules)


def both(*changes: Change) -> Change:
    def change(rules: dict[str, Any], arrays: Arrays) -> None:
        for one in changes:
            one(rules, arrays)

    return change


def nan_in(name: str, index: tuple[int, ...]) -> Change:
    def change(rules: dict[str, Any], arrays: Arrays) -> None:
        array = arrays[f"{X}.{name}"]
        array = array.clone() if isinstance(array, torch.Tensor) else array.copy()
        array[index] = float("nan")
        arrays[f"{X}.{name}"] = array

    return change


def _fp8() -> tuple[dict[str, Any], Arrays]:
    arrays = {f"{X}.weight": torch.ones(256, 256).to(F8), f"{X}.weight_scale_inv": torch.ones(2, 2)}
    return {"quant_method": "fp8", "weight_block_size": [128, 128]}, arrays


def _mxfp4() -> tuple[dict[str, Any], Arrays]:
    blocks, scales = np.zeros((2, 8, 2, 16), np.uint8), np.zeros((2, 8, 2), np.uint8)
    return {"quant_method": "mxfp4"}, {f"{X}_blocks": blocks, f"{X}_scales": scales}


def _bitnet() -> tuple[dict[str, Any], Arrays]:
    arrays = {f"{X}.weight": np.zeros((4, 32), np.uint8), f"{X}.weight_scale": torch.ones(1)}
    return {"quant_method": "bitnet"}, arrays


def _state(**values: Any) -> np.ndarray:
    state = {"blocksize": 64, "shape": [4, 64]} | values
    return np.frombuffer(json.dumps(state).encode(), np.uint8).copy()


GOOD: dict[str, Callable[[], tuple[dict[str, Any], Arrays]]] = {
    "gptq": lambda: gptq(4, 32)[:2],
    "awq": lambda: awq_layer(X, 32)[:2],
    "fp8": _fp8,
    "packed": lambda: packed()[:2],
    "modelopt": lambda: ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt()[0]),
    "bnb": lambda: ({"quant_method": "bitsandbytes"}, bnb(4, 64, 64, 256)[0]),
    "mxfp4": _mxfp4,
    "bitnet": _bitnet,
}
STATE = "weight.quant_state.bitsandbytes__nf4"
C, U = CorruptFileError, UnsupportedEncodingError
BAD: dict[str, tuple[str, Change, type[MlxedgeError], str]] = {
    "method": ("gptq", saying(quant_method="hqq\n"), U, "mlxedge reads awq"),
    "gptq-bits": ("gptq", saying(bits=5), U, "5 bits"),
    "gptq-3-bits": ("gptq", saying(bits=3), U, "gptq_v2"),
    "gptq-rotated": ("gptq", saying(rotation="hadamard"), U, "rotated (hadamard)"),
    "gptq-no-bits": ("gptq", saying(bits=None), U, "None bits"),
    "gptq-layout": ("gptq", saying(checkpoint_format="marlin"), U, "'marlin'"),
    "gptq-group": ("gptq", saying(group_size=0), C, "group_size"),
    "gptq-other-group": ("gptq", saying(group_size=64), C, "should be [2, 8]"),
    "gptq-no-scales": ("gptq", without("scales"), C, "has no scales"),
    "gptq-no-zeros": ("gptq", without("qzeros"), C, "has no qzeros"),
    "gptq-no-index": (
        "gptq",
        both(saying(desc_act=True), without("g_idx")),
        C,
        "has no g_idx",
    ),
    "gptq-order": ("gptq", instead(g_idx=np.zeros(128, np.int32)), C, "desc_act"),
    "gptq-index": ("gptq", instead(g_idx=np.full(128, 4, np.int32)), C, "outside 0 to 3"),
    "gptq-scales": ("gptq", instead(scales=np.ones((4, 63), np.float16)), C, "[4, 64]"),
    "gptq-codes": ("gptq", instead(qweight=np.ones((16, 64), np.float32)), C, "i32"),
    "gptq-nan": ("gptq", nan_in("scales", (1, 1)), C, "NaN"),
    "gptq-inf": ("gptq", instead(scales=np.full((4, 64), np.inf, np.float16)), C, "infinite"),
    "awq-bits": ("awq", saying(bits=8), U, "8 bits"),
    "awq-layout": ("awq", saying(version="gemv"), U, "'gemv'"),
    "awq-group": ("awq", saying(group_size="x"), C, "group_size"),
    "awq-zeros": ("awq", instead(qzeros=np.ones((4, 9), np.int32)), C, "[4, 8]"),
    "awq-nan": ("awq", nan_in("scales", (0, 0)), C, "NaN"),
    "fp8-no-scales": ("fp8", without("weight_scale_inv"), C, "has no scales"),
    "fp8-grid": ("fp8", instead(weight_scale_inv=torch.ones(3, 2)), C, "blocks of [128, 128]"),
    "fp8-block": ("fp8", saying(weight_block_size=[128]), C, "not two sizes"),
    "fp8-nan": ("fp8", nan_in("weight_scale_inv", (0, 0)), C, "NaN"),
    "fp8-vector": ("fp8", instead(weight=torch.ones(256).to(F8)), C, "matrices alone"),
    "packed-no-scale": ("packed", without("weight_scale"), C, "has no weight_scale"),
    "packed-no-shape": ("packed", without("weight_shape"), C, "has no weight_shape"),
    "packed-shape": ("packed", instead(weight_shape=np.array([16, 63])), C, "[16, 63]"),
    "packed-bits": ("packed", saying(**ct(INT4 | {"num_bits": 8})), C, "8 bits in groups of 32"),
    "packed-groups": ("packed", saying(config_groups={"a": {}}), C, "config_groups"),
    "packed-none": ("packed", saying(config_groups={}), C, "none"),
    "packed-nan": ("packed", nan_in("weight_scale", (3, 1)), C, "NaN"),
    "packed-zero": ("packed", instead(weight_zero_point=np.ones((3, 2), np.int32)), C, "[2, 2]"),
    "packed-index": ("packed", instead(weight_g_idx=np.full(64, 2, np.int32)), C, "outside"),
    "packed-rotated": (
        "packed",
        saying(transform_config={"config_groups": {"R1": {}}}),
        U,
        "transform_config",
    ),
    "packed-sparse": (
        "packed",
        saying(sparsity_config={"format": "sparse-24-bitmask"}),
        U,
        "sparse-24-bitmask",
    ),
    "nvfp4-no-overall": ("modelopt", without("weight_scale_2"), U, "NVFP4"),
    "nvfp4-algorithm": (
        "modelopt",
        both(saying(quant_algo="W4A8_AWQ"), without("weight_scale_2")),
        U,
        "W4A8_AWQ",
    ),
    "nvfp4-scale": ("modelopt", instead(weight_scale=torch.ones(24, 3).to(F8)), C, "[24, 4]"),
    "nvfp4-nan": ("modelopt", instead(weight_scale_2=torch.tensor(float("nan"))), C, "NaN"),
    "nvfp4-many": ("modelopt", instead(weight_scale_2=torch.ones(2)), C, "2 numbers"),
    "bnb-no-absmax": ("bnb", without("weight.absmax"), C, "has no absmax"),
    "bnb-no-state": ("bnb", without(STATE), U, "quantization state"),
    "bnb-json": ("bnb", instead(**{STATE: np.zeros(4, np.uint8)}), C, "not JSON"),
    "bnb-shape": ("bnb", instead(**{STATE: _state(shape=[4, -64])}), C, "no matrix"),
    "bnb-size": ("bnb", instead(**{STATE: _state(shape=[4, 65])}), C, "take 130"),
    "bnb-block": ("bnb", instead(**{STATE: _state(blocksize=0)}), C, "blocksize"),
    "bnb-offset": ("bnb", instead(**{STATE: _state(nested_blocksize=256)}), C, "nested_offset"),
    "bnb-nan": ("bnb", nan_in("weight.nested_absmax", (0,)), C, "NaN"),
    "mxfp4-no-scales": (
        "mxfp4",
        lambda rules, arrays: arrays.clear() or arrays.update({f"{X}_blocks": np.zeros(4)}),
        C,
        "checkpoint is not whole",
    ),
    "mxfp4-codes": (
        "mxfp4",
        lambda rules, arrays: arrays.update({f"{X}_blocks": np.zeros((2, 8, 2, 15), np.uint8)}),
        C,
        "[2, 8, 2, 16]",
    ),
    "mxfp4-nan": (
        "mxfp4",
        lambda rules, arrays: arrays.update({f"{X}_scales": np.full((2, 8, 2), 255, np.uint8)}),
        C,
        "NaN",
    ),
    "bitnet-codes": ("bitnet", instead(weight=np.full((4, 32), 3, np.uint8)), C, "-1, 0 or 1"),
    "bitnet-zero": ("bitnet", instead(weight_scale=torch.zeros(1)), C, "infinite"),
    "bitnet-class": ("bitnet", saying(linear_class="other"), U, "class other"),
    "bitnet-norm": ("bitnet", saying(use_rms_norm=True), U, "norm inside"),
    "bitnet-online": (
        "bitnet",
        saying(linear_class="autobitlinear", quantization_mode="online"),
        U,
        "as the model runs",
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_undamaged_ones_are_read(tmp_path: Path, kind: str) -> None:
    rules, arrays = GOOD[kind]()
    assert f"{X}.weight" in read_weights(write_folder(tmp_path, rules, arrays))


@pytest.mark.parametrize("case", BAD)
def test_damaged_ones_are_refused(tmp_path: Path, case: str) -> None:
    kind, change, error, words = BAD[case]
    rules, arrays = GOOD[kind]()
    change(rules, arrays)
    with pytest.raises(error) as caught:
        read_weights(write_folder(tmp_path, rules, arrays))
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_model(tmp_path: Path) -> None:
    """Converted to floats, a quantized checkpoint is the model that its layers stand for."""
    whole, made = awq_model(tmp_path, 2.0**-8)
    report = convert(made, ["hf:f16", "gguf:f16"], tmp_path / "out", quality="reference")
    folder = next(r.plan.path for r in report.outputs if r.plan.target.format == "hf")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    with (
        safe_open(folder / "model.safetensors", "pt") as got,
        safe_open(whole / "model.safetensors", "pt") as expected,
    ):
        assert set(got.keys()) == set(expected.keys())
        for name in expected.keys():  # noqa: SIM118 (no mapping)
            assert torch.equal(got.get_tensor(name), expected.get_tensor(name)), name
    report = convert(whole, "gguf:f16", tmp_path / "whole.gguf", quality="reference")
    gguf = next((tmp_path / "out").glob("*.gguf"))
    read = {}
    for path in (gguf, tmp_path / "whole.gguf"):
        with open_source(path) as checkpoint:
            read[path] = {n: t.read()["weight"].tobytes() for n, t in checkpoint.tensors.items()}
    assert read[gguf] == read[tmp_path / "whole.gguf"]


def test_weights_of_fp8_that_are_no_numbers_are_the_users_choice(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny", dtype="bf16")
    tensors = load_file(tiny / "model.safetensors")
    name = f"{X}.weight"
    tensors[name] = tensors[name].to(F8)
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    tensors[f"{name}_scale_inv"] = torch.ones(1)
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadWeightsError, match="row 3, column 5"):
        convert(tiny, "gguf:f16", tmp_path / "a.gguf", quality="reference")
    convert(tiny, "gguf:f16", tmp_path / "a.gguf", quality="reference", allow_nan=True)
