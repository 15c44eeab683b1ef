"""Affine groups in ggml's blocks and in other groups, K-quants in affine groups, with scales that
are kept or rounded once; and the way to MLX and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracles.ggml_blocks import random_blocks

from mlxedge.encodings import GGML, MLX_FLOAT, Affine, Encoding
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.fallback import OPS
from mlxedge.ops import Parts

DTYPES: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
#: ggml type: bits, the code of zero where there is no bias.
BLOCKS = {"q4_0": (4, 8), "q4_1": (4, None), "q5_0": (5, 16), "q5_1": (5, None), "q8_0": (8, 128)}
ROWS, COLS = 6, 256


def groups(
    source: Affine, zero: Any = None, seed: int = 0, top: float = 0.01
) -> tuple[Parts, np.ndarray]:
    """Random groups and their codes. ``zero``: their biases are -zero · scale."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**source.bits, (ROWS, COLS), dtype=np.uint8)
    shape = (ROWS, COLS // source.group)
    dtype = DTYPES[source.scale_dtype]
    drawn = (random.uniform(top / 10, top, shape) * random.choice([-1, 1], shape)).astype("<f4")
    # Of 16 bits, so that f32 holds products with zero points, and f16 does not hold them.
    scales = (drawn.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32).astype(dtype)
    if zero is None:
        biases = random.uniform(-top, top, shape).astype(dtype)
    else:
        biases = (-scales.astype(np.float32) * zero).astype(dtype)
    bits = np.unpackbits(codes[..., None], axis=2, count=source.bits, bitorder="little")
    weight = np.packbits(bits.reshape(ROWS, -1), axis=1, bitorder="little").view("<u4")
    return {"weight": weight, "scales": scales, "biases": biases}, codes


def spread(values: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(values.astype(np.float32), group, axis=1)


def assert_same(made: Parts, target: Encoding, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(OPS.decode(made, target), expected)


@pytest.mark.parametrize("scale_dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("name", "bits"), [("q4_1", b) for b in (2, 3, 4)] + [("q5_1", 5)])
def test_types_with_a_bias(name: str, bits: int, group: int, scale_dtype: str) -> None:
    source, target = Affine(bits, group, scale_dtype), GGML[name]
    parts, codes = groups(source)
    scales = {part: parts[part] for part in ("scales", "biases")}
    held = {p: v.astype(np.float16) for p, v in scales.items()}
    kept = all((held[p].astype(np.float32) == scales[p].astype(np.float32)).all() for p in held)
    assert kept == (scale_dtype != "f32")  # of bf16, f16 holds those that are drawn here
    assert OPS.can_transcode(source, target)
    assert OPS.fidelity(source, target, scales) == ("exact" if kept else "rounded once")
    worst = OPS.fidelity(source, target)
    assert worst == ("exact" if scale_dtype == "f16" else "rounded once")
    made = OPS.transcode(parts, source, target, rounded=True)
    d, m = spread(held["scales"], group), spread(held["biases"], group)
    assert_same(made, target, d * codes + m)
    if kept:
        assert_same(OPS.transcode(parts, source, target), target, OPS.decode(parts, source))
    else:
        with pytest.raises(UnsupportedEncodingError, match="exactly"):
            OPS.transcode(parts, source, target)


@pytest.mark.parametrize("scale_dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(
    ("name", "bits", "zeros"),
    [
        ("q4_0", 4, [8]),
        ("q4_0", 3, range(9)),
        ("q5_0", 5, [16]),
        ("q5_0", 4, range(1, 17)),
        ("q8_0", 4, range(113)),
        ("q8_0", 8, [128]),
    ],
)
def test_types_without_a_bias(name: str, bits: int, zeros: Any, scale_dtype: str) -> None:
    """They hold whole zero points, such as those of AWQ, as far as codes stay in range."""
    source, target = Affine(bits, 64, scale_dtype), GGML[name]
    random = np.random.default_rng(bits)
    zero = random.choice(list(zeros), (ROWS, COLS // 64))
    if scale_dtype != "f32":
        zero = 1 << np.log2(np.maximum(zero, 1)).astype(int)  # so that 16 bits hold the bias
        zero = np.maximum(zero, min(zeros))
    parts, codes = groups(source, zero)
    scales = {part: parts[part] for part in ("scales", "biases")}
    kept = OPS.fidelity(source, target, scales)
    assert kept == ("rounded once" if scale_dtype == "f32" else "exact")
    assert OPS.fidelity(source, target) is None  # the scales decide
    made = OPS.transcode(parts, source, target, rounded=True)
    d = spread(parts["scales"].astype(np.float16), 64)
    assert_same(made, target, d * (codes.astype(np.float32) - spread(zero, 64)))


@pytest.mark.parametrize(
    ("name", "bits", "zero"),
    [("q4_0", 4, 7), ("q4_0", 4, 9), ("q4_0", 3, 9), ("q5_0", 4, 17), ("q8_0", 8, 0)],
)
def test_zero_points_out_of_range(name: str, bits: int, zero: int) -> None:
    source, target = Affine(bits, 32, "f32"), GGML[name]
    parts, _ = groups(source, zero)
    assert OPS.can_transcode(source, target)
    assert OPS.fidelity(source, target, parts) is None
    with pytest.raises(UnsupportedEncodingError):
        OPS.transcode(parts, source, target, rounded=True)


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_a_bias_that_is_no_multiple_is_refused(name: str) -> None:
    source = Affine(4, 32, "f16")
    parts, _ = groups(source, 8)
    assert OPS.fidelity(source, GGML[name], parts) == "exact"
    parts["biases"][2, 3] = np.nextafter(parts["biases"][2, 3], np.float16(1))
    assert OPS.fidelity(source, GGML[name], parts) is None


@pytest.mark.parametrize("name", ["q4_1", "q4_0"])
@pytest.mark.parametrize("value", [1e5, -1e9, np.inf, np.nan])
def test_scales_too_large_for_f16_are_refused(name: str, value: float) -> None:
    source = Affine(4, 32, "bf16")
    parts, _ = groups(source, 8)
    parts["scales"][1, 1], parts["biases"][1, 1] = value, -8 * value
    assert OPS.fidelity(source, GGML[name], parts) is None
    with pytest.raises(UnsupportedEncodingError):
        OPS.transcode(parts, source, GGML[name], rounded=True)


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("scale_dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(("bits", "wide"), [(4, 4), (3, 3), (4, 8), (2, 5), (3, 6)])
@pytest.mark.parametrize(("group", "into"), [(64, 64), (128, 32)])
def test_other_groups(
    bits: int, wide: int, group: int, into: int, scale_dtype: str, to: str
) -> None:
    source, target = Affine(bits, group, scale_dtype), Affine(wide, into, to)
    parts, codes = groups(source)
    exact = to in ("f32", scale_dtype) or (to, scale_dtype) == ("f16", "bf16")
    kept = OPS.fidelity(source, target, parts)
    assert kept == ("exact" if exact else "rounded once")
    made = OPS.transcode(parts, source, target, rounded=True)
    assert {p: (a.dtype, a.shape) for p, a in made.items()} == {
        p: (np.dtype(np.uint32 if p == "weight" else DTYPES[to]), part.shape)
        for p, part in target.parts((ROWS, COLS)).items()
    }
    scale, bias = (spread(parts[p].astype(DTYPES[to]), group) for p in ("scales", "biases"))
    product = scale.astype(np.float64) * codes  # exact
    assert np.abs(OPS.decode(made, target) - (product + bias)).max() < 1e-7
    if exact:
        assert_same(OPS.transcode(parts, source, target), target, OPS.decode(parts, source))


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(("name", "bits"), [("q4_k", 4), ("q5_k", 5), ("q5_k", 8)])
def test_k_quants(name: str, bits: int, to: str) -> None:
    source, target = GGML[name], Affine(bits, 32, to)
    blocks = random_blocks(name, 20, 512, seed=3)
    expected = OPS.decode({"weight": blocks}, source)
    kept = OPS.fidelity(source, target)
    assert kept == ("exact" if to == "f32" else "rounded once")
    made = OPS.transcode({"weight": blocks}, source, target, rounded=True)
    exact = OPS.transcode({"weight": blocks}, source, Affine(bits, 32, "f32"))
    np.testing.assert_array_equal(made["weight"], exact["weight"])
    for part in ("scales", "biases"):
        np.testing.assert_array_equal(made[part], exact[part].astype(DTYPES[to]))
    got = OPS.decode(made, target)
    if to == "f32":
        np.testing.assert_array_equal(got, expected)
        return
    reach = (2 ** (5 if name == "q5_k" else 4) - 1) * np.abs(exact["scales"]) + np.abs(
        exact["biases"]
    )
    unit = 2.0**-11 if to == "f16" else 2.0**-8
    assert (np.abs(got - expected) <= np.repeat(reach, 32, axis=1) * unit + 2.0**-24).all()
    assert (got != expected).any()
    with pytest.raises(UnsupportedEncodingError):
        OPS.transcode({"weight": blocks}, source, target)


@pytest.mark.parametrize("name", BLOCKS)
def test_bf16_scales_of_simple_blocks_are_rounded_once(name: str) -> None:
    bits, zero = BLOCKS[name]
    target = Affine(bits, 32, "bf16")
    blocks = random_blocks(name, 4, 256)
    assert OPS.fidelity(GGML[name], target) == "rounded once"
    made = OPS.transcode({"weight": blocks}, GGML[name], target, rounded=True)
    exact = OPS.transcode({"weight": blocks}, GGML[name], Affine(bits, 32, "f32"))
    np.testing.assert_array_equal(made["weight"], exact["weight"])
    np.testing.assert_array_equal(made["scales"], exact["scales"].astype(DTYPES["bf16"]))
    if zero is not None:  # the bias is that of the rounded scale, and so its own product
        expected = -np.float32(zero) * made["scales"].astype(np.float32)
        np.testing.assert_array_equal(made["biases"].astype(np.float32), expected)


@pytest.mark.parametrize("name", [*BLOCKS, "mxfp4"])
def test_there_and_back(name: str) -> None:
    """The bytes of a GGUF tensor survive the way through MLX."""
    bits, zero = BLOCKS.get(name, (4, None))
    between = MLX_FLOAT["mxfp4"] if name == "mxfp4" else Affine(bits, 32, "f16")
    blocks = random_blocks(name, 20, 512)
    if zero is not None:
        blocks[1, :2] = 0  # a scale of zero
    made = OPS.transcode({"weight": blocks}, GGML[name], between)
    assert OPS.fidelity(between, GGML[name], made) == "exact"
    again = OPS.transcode(made, between, GGML[name])
    np.testing.assert_array_equal(again["weight"], blocks)


def test_mxfp4_of_a_scale_that_ggml_reads_otherwise() -> None:
    parts = {"weight": np.zeros((2, 8), np.uint32), "scales": np.zeros((2, 2), np.uint8)}
    OPS.transcode(parts, MLX_FLOAT["mxfp4"], GGML["mxfp4"])
    parts["scales"][1, 1] = 255
    with pytest.raises(UnsupportedEncodingError):
        OPS.transcode(parts, MLX_FLOAT["mxfp4"], GGML["mxfp4"])
