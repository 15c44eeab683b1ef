"""The fallback's affine groups are those of ``mx.quantize`` on the CPU, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import mlx
from oracles.hard_weights import DTYPES, KINDS, hard_weights

from mlxedge.encodings import Affine
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.fallback import OPS
from mlxedge.ops import Parts


def same_bytes(got: Parts, expected: Parts) -> None:
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert got[name].dtype == part.dtype
        assert got[name].shape == part.shape
        np.testing.assert_array_equal(
            got[name].reshape(-1).view(np.uint8), part.reshape(-1).view(np.uint8), err_msg=name
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", AFFINE_GROUPS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_bytes_are_those_of_mx_quantize(bits: int, group: int, dtype: str) -> None:
    encoding = Affine(bits, group, dtype)
    for kind in KINDS:
        weights = hard_weights(kind, dtype)
        try:
            same_bytes(OPS.encode(weights, encoding), mlx.quantize(weights, encoding))
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from None


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.float32, (2, 128), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    st.sampled_from(AFFINE_BITS),
    st.sampled_from(AFFINE_GROUPS),
)
def test_bytes_of_any_finite_weights(weights: np.ndarray, bits: int, group: int) -> None:
    encoding = Affine(bits, group, "f32")
    same_bytes(OPS.encode(weights, encoding), mlx.quantize(weights, encoding))


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scales_are_rounded_after_the_codes_are_chosen(scale_dtype: str) -> None:
    weights = hard_weights("like a model", "f32")
    exact = OPS.encode(weights, Affine(4, 64, "f32"))
    made = OPS.encode(weights, Affine(4, 64, scale_dtype))
    np.testing.assert_array_equal(made["weight"], exact["weight"])
    for name in ("scales", "biases"):
        np.testing.assert_array_equal(made[name], exact[name].astype(DTYPES[scale_dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_decode_is_scale_times_code_plus_bias(bits: int, dtype: str) -> None:
    encoding = Affine(bits, 32, dtype)
    rng = np.random.default_rng(bits)
    parts = {
        "weight": rng.integers(0, 2**32, (5, 8 * bits), dtype=np.uint32),
        "scales": rng.normal(size=(5, 8)).astype(DTYPES[dtype]),
        "biases": rng.normal(size=(5, 8)).astype(DTYPES[dtype]),
    }
    stream = np.unpackbits(parts["weight"].view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(5, 8, 32, bits) @ (1 << np.arange(bits))
    scales, biases = (parts[n].astype(np.float32)[..., None] for n in ("scales", "biases"))
    expected = codes.astype(np.float32) * scales + biases
    got = OPS.decode(parts, encoding)
    np.testing.assert_array_equal(got.view(np.uint32), expected.reshape(5, 256).view(np.uint32))
    if dtype == "f32":  # where MLX computes in float32 too
        np.testing.assert_array_equal(got, mlx.dequantize(parts, encoding))
