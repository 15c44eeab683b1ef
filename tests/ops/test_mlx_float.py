"""The fallback's mxfp4, mxfp8 and nvfp4 are those of ``mx.quantize`` on the CPU, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles import mlx
from oracles.hard_weights import DTYPES, KINDS, hard_weights

from mlxedge.encodings import MLX_FLOAT, MlxFloat
from mlxedge.fallback import OPS

MODES = tuple(MLX_FLOAT)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}


def ordinary(weights: np.ndarray, encoding: MlxFloat) -> np.ndarray:
    """The groups where MLX's result is sound; ``mlxedge.fallback.mlx_float`` says which."""
    groups = weights.astype(np.float64).reshape(-1, encoding.group)
    largest = np.abs(groups).max(axis=1) / LARGEST[encoding.mode]
    if encoding.mode == "nvfp4":
        return largest <= 448.0
    return (largest == 0) | (largest > 1.01 * 2.0**-127)


def by_group(part: np.ndarray, groups: int) -> np.ndarray:
    return part.reshape(-1).view(np.uint8).reshape(groups, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_mx_quantize(kind: str, mode: str, dtype: str) -> None:
    encoding, weights = MLX_FLOAT[mode], hard_weights(kind, dtype)
    sound = ordinary(weights, encoding)
    got, expected = OPS.encode(weights, encoding), mlx.quantize(weights, encoding)
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert (got[name].dtype, got[name].shape) == (part.dtype, part.shape)
        np.testing.assert_array_equal(
            by_group(got[name], sound.size)[sound], by_group(part, sound.size)[sound], name
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_scale_bytes_about_every_power_of_two(mode: str, dtype: str) -> None:
    """Where log2 would be rounded: one weight per group, some units away from a power of two."""
    encoding = MLX_FLOAT[mode]
    finite = ml_dtypes.finfo(DTYPES[dtype])
    powers = 2.0 ** np.arange(max(finite.minexp, -120), finite.maxexp - 9) * LARGEST[mode]
    near = powers.astype(DTYPES[dtype])[:, None]
    unsigned = np.uint32 if dtype == "f32" else np.uint16
    largest = near.view(unsigned) + np.arange(-6, 7).astype(unsigned)
    weights = np.zeros((largest.size, 32), DTYPES[dtype])
    weights[:, 5] = largest.reshape(-1).view(DTYPES[dtype])
    sound = ordinary(weights, encoding).reshape(len(weights), -1).all(axis=1)
    assert sound.sum() > 200
    got, expected = OPS.encode(weights, encoding), mlx.quantize(weights, encoding)
    for name, part in expected.items():
        np.testing.assert_array_equal(got[name][sound], part[sound], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_smaller_magnitude(dtype: str) -> None:
    weights = np.zeros((1, 32), DTYPES[dtype])
    weights[0, :8] = [6.0, 0.25, 0.75, 1.25, -1.75, -2.5, 3.5, -5.0]
    weights[0, 8:12] = [-0.25, -0.1, -0.0, -0.26]
    parts = OPS.encode(weights, MLX_FLOAT["mxfp4"])
    codes = parts["weight"].view(np.uint8)[0]
    codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
    assert parts["scales"].item() == 127
    assert codes[:12].tolist() == [7, 0, 1, 2, 11, 12, 5, 14, 0, 0, 0, 9]


@pytest.mark.parametrize("mode", MODES)
def test_decode_is_that_of_mlx(mode: str) -> None:
    encoding = MLX_FLOAT[mode]
    rng = np.random.default_rng(3)
    # Scales that MLX writes: E8M0 but its NaN, E4M3 that is positive.
    top = 127 if mode == "nvfp4" else 255
    scales = rng.integers(0, top, (40, 512 // encoding.group), dtype=np.uint8)
    weight = rng.integers(0, 2**32, (40, 512 * encoding.bits // 32), dtype=np.uint32)
    if mode == "mxfp8":  # E4M3 has two NaN codes; leave them out
        codes = weight.view(np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
    parts = {"weight": weight, "scales": scales}
    got = OPS.decode(parts, encoding)
    expected = mlx.dequantize(parts, encoding, "f32")
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_weights_below_the_smallest_scale_stay_small(mode: str) -> None:
    encoding, weights = MLX_FLOAT[mode], hard_weights("subnormal", "f32")
    parts = OPS.encode(weights, encoding)
    assert (parts["scales"] == 0).all()
    step = 2.0**-127 if mode == "mxfp4" else 2.0**-129
    assert np.abs(OPS.decode(parts, encoding) - weights).max() <= step


def test_nvfp4_saturates() -> None:
    weights = np.full((1, 16), 1e30, np.float32)
    weights[0, 1] = -1e30
    decoded = OPS.decode(OPS.encode(weights, MLX_FLOAT["nvfp4"]), MLX_FLOAT["nvfp4"])
    np.testing.assert_array_equal(decoded, np.sign(weights) * 6 * 448)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_a_group_with_a_bad_weight_decodes_to_nan(mode: str) -> None:
    encoding = MLX_FLOAT[mode]
    for bad in (np.nan, np.inf, -np.inf):
        weights = hard_weights("normal", "f32")
        weights[0, 3] = bad
        decoded = OPS.decode(OPS.encode(weights, encoding), encoding)
        assert np.isnan(decoded[0, :32]).all()
        assert np.isfinite(decoded[0, 32:]).all()
        assert np.isfinite(decoded[1:]).all()
