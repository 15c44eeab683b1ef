"""Casts between f32, f16 and bf16, and the search for NaN and infinities."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles.hard_weights import DTYPES

from mlxedge.encodings import PLAIN
from mlxedge.errors import UsageError
from mlxedge.fallback import OPS
from mlxedge.fallback.plain import cast, first_nonfinite

HALVES = ["f16", "bf16"]


def every(dtype: str) -> np.ndarray:
    """All 65536 numbers of 16 bits."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(DTYPES[dtype])


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    bits = np.uint32 if got.dtype == np.float32 else np.uint16
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_as_f32(dtype: str) -> None:
    values = every(dtype)
    with np.errstate(invalid="ignore"):
        same(cast(values, "f32"), values.astype(np.float32))


@pytest.mark.parametrize(("source", "target"), [("f16", "bf16"), ("bf16", "f16")])
def test_every_half_as_the_other(source: str, target: str) -> None:
    values = every(source)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32).astype(DTYPES[target])
    same(cast(values, target), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_about_every_half(dtype: str) -> None:
    """Each number, each midpoint to the next, and their neighbours in f32."""
    with np.errstate(invalid="ignore"):
        values = every(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    up, down = (np.nextafter(points, np.float32(edge)) for edge in (np.inf, -np.inf))
    points = np.concatenate([points, up, down])
    with np.errstate(over="ignore"):
        same(cast(points, dtype), points.astype(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", HALVES)
def test_random_bit_patterns(dtype: str) -> None:
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    special = [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0x7F7FFFFF, 1]
    values = np.concatenate([patterns, np.array(special, np.uint32)]).view(np.float32)
    with np.errstate(all="ignore"):
        same(cast(values, dtype), values.astype(DTYPES[dtype]))


def test_nan_in_bf16_is_that_of_ml_dtypes() -> None:
    values = np.array([0x7F800001, 0xFFC12345, 0x7FFFFFFF], np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(cast(values, "bf16").view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_strides(dtype: str) -> None:
    values = np.random.default_rng(1).normal(size=(4, 6, 5)).astype(DTYPES[dtype])
    for view in (values, values.T, values[::2, 1:, ::-1], values[0, 0], values[:0]):
        got = cast(view, "f32")
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, view.astype(np.float32))
    whole = cast(values, dtype)
    assert np.shares_memory(whole, values)


def test_casts_to_other_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match="u8"):
        cast(np.zeros(3, np.float32), "u8")
    with pytest.raises(UsageError, match="float64"):
        cast(np.zeros(3), "f16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_encodings(dtype: str) -> None:
    weights = np.random.default_rng(2).normal(size=(3, 7)).astype(np.float32)
    parts = OPS.encode(weights, PLAIN[dtype])
    np.testing.assert_array_equal(parts["weight"], weights.astype(DTYPES[dtype]))
    np.testing.assert_array_equal(
        OPS.decode(parts, PLAIN[dtype]), weights.astype(DTYPES[dtype]).astype(np.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_nonfinite(dtype: str) -> None:
    values = np.full(40_000, ml_dtypes.finfo(DTYPES[dtype]).max, DTYPES[dtype])
    values[::2] *= DTYPES[dtype](-1)
    assert first_nonfinite(values) is None
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for at in (39_999, 20_001, 8192, 8191, 0):
            values[at] = bad
            assert first_nonfinite(values) == at
        values[[39_999, 20_001, 8192, 8191, 0]] = 1


@pytest.mark.parametrize("dtype", HALVES)
def test_every_nonfinite_half_is_found(dtype: str) -> None:
    values = every(dtype)
    finite = np.isfinite(values.astype(np.float32))
    assert first_nonfinite(values[finite]) is None
    for bad in values[~finite]:
        assert first_nonfinite(np.array([1, bad], DTYPES[dtype])) == 1


def test_first_nonfinite_counts_in_c_order() -> None:
    values = np.zeros((5, 7), np.float32)
    values[3, 2] = np.inf
    assert OPS.first_nonfinite(values) == 3 * 7 + 2
    assert OPS.first_nonfinite(values.T) == 2 * 5 + 3
    assert OPS.first_nonfinite(np.empty((0, 4), np.float32)) is None
