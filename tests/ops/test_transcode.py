"""GGUF blocks become MLX groups that decode to the same float32 numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import mlx
from oracles.ggml_blocks import random_blocks

from mlxedge.encodings import GGML, MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.fallback import OPS
from mlxedge.ops import Parts

BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}
#: |d| above which a bias of -8 d, -16 d or -128 d overflows f16.
LIMIT = {"q4_0": 8188.0, "q5_0": 4094.0, "q8_0": 511.75}


def assert_kept(name: str, blocks: np.ndarray, target: Encoding) -> Parts:
    source = GGML[name]
    made = OPS.transcode({"weight": blocks}, source, target)
    expected = OPS.decode({"weight": blocks}, source)
    got = OPS.decode(made, target)
    np.testing.assert_array_equal(got, expected)  # as numbers: -0 may become +0
    differ = got.view(np.uint32) != expected.view(np.uint32)
    assert (expected[differ] == 0).all()
    return made


@pytest.mark.parametrize("scale_dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", BITS)
def test_random_blocks(name: str, scale_dtype: str) -> None:
    target = Affine(BITS[name], 32, scale_dtype)
    assert OPS.can_transcode(GGML[name], target)
    made = assert_kept(name, random_blocks(name, 20, 512), target)
    assert {n: p.shape for n, p in made.items()} == {
        n: p.shape for n, p in target.parts((20, 512)).items()
    }


@pytest.mark.parametrize("name", BITS)
def test_mlx_computes_the_same_weights(name: str) -> None:
    blocks = random_blocks(name, 20, 512, seed=2)
    expected = OPS.decode({"weight": blocks}, GGML[name])
    exact = Affine(BITS[name], 32, "f32")
    made = OPS.transcode({"weight": blocks}, GGML[name], exact)
    np.testing.assert_array_equal(mlx.dequantize(made, exact), expected)
    # With f16 scales MLX rounds scale · code, and the sum, to f16.
    rounded = Affine(BITS[name], 32, "f16")
    made = OPS.transcode({"weight": blocks}, GGML[name], rounded)
    codes = 2 ** BITS[name] - 1
    reach = codes * np.abs(made["scales"].astype(np.float64)) + np.abs(
        made["biases"].astype(np.float64)
    )
    difference = np.abs(mlx.dequantize(made, rounded).astype(np.float64) - expected)
    assert (difference <= np.repeat(reach, 32, axis=1) * 2.0**-10 + 2.0**-23).all()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(BITS)), st.binary(min_size=34, max_size=34), st.data())
def test_any_finite_block(name: str, content: bytes, data: st.DataObject) -> None:
    block = np.frombuffer(content[: GGML[name].block_bytes], np.uint8).copy()
    halves = block[: 4 if name.endswith("_1") else 2].view(np.float16)
    top = LIMIT.get(name, 65504.0)
    finite = st.floats(-top, top, width=16)
    halves[:] = [data.draw(finite) for _ in halves]
    assert_kept(name, block[None], Affine(BITS[name], 32, "f16"))


@pytest.mark.parametrize("name", LIMIT)
def test_scales_too_large_for_f16_are_refused(name: str) -> None:
    blocks = random_blocks(name, 1, 32)
    target = Affine(BITS[name], 32, "f16")
    for sign in (1.0, -1.0):
        largest = np.float16(sign * LIMIT[name])
        blocks[:, :2].view(np.float16)[:] = largest
        assert_kept(name, blocks, target)
        blocks[:, :2].view(np.float16)[:] = np.nextafter(largest, np.float16(sign * np.inf))
        with pytest.raises(UnsupportedEncodingError, match="f32 scales"):
            OPS.transcode({"weight": blocks}, GGML[name], target)
        assert_kept(name, blocks, Affine(BITS[name], 32, "f32"))


def test_mxfp4() -> None:
    blocks = random_blocks("mxfp4", 20, 512)
    made = assert_kept("mxfp4", blocks, MLX_FLOAT["mxfp4"])
    np.testing.assert_array_equal(
        mlx.dequantize(made, MLX_FLOAT["mxfp4"], "f32"),
        OPS.decode({"weight": blocks}, GGML["mxfp4"]),
    )
    blocks[3, 0] = 255
    with pytest.raises(UnsupportedEncodingError):
        OPS.transcode({"weight": blocks}, GGML["mxfp4"], MLX_FLOAT["mxfp4"])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (GGML["q4_0"], Affine(4, 64, "f16")),
        (GGML["q8_0"], Affine(4, 32, "f16")),
        (GGML["q6_k"], Affine(8, 32, "f32")),
        (GGML["q4_0"], GGML["q8_0"]),
        (GGML["q4_0"], MLX_FLOAT["mxfp4"]),
        (GGML["mxfp4"], MLX_FLOAT["nvfp4"]),
        (MLX_FLOAT["mxfp4"], GGML["nvfp4"]),
        (MLX_FLOAT["nvfp4"], GGML["mxfp4"]),
        (PLAIN["f16"], Affine(4, 32, "f16")),
        (Affine(4, 32, "f16"), GGML["q4_k"]),
        (Affine(5, 32, "f16"), GGML["q4_1"]),
        (Affine(6, 32, "f16"), GGML["q5_1"]),
        (Affine(4, 32, "f16"), Affine(4, 64, "f16")),
        (Affine(4, 32, "f16"), Affine(3, 32, "f16")),
        (Affine(4, 32, "f16"), MLX_FLOAT["mxfp4"]),
    ],
)
def test_other_pairs_are_refused(source: Encoding, target: Encoding) -> None:
    assert not OPS.can_transcode(source, target)
    assert OPS.fidelity(source, target) is None
    parts = {n: np.zeros(p.shape, _DTYPES[p.dtype]) for n, p in source.parts((2, 256)).items()}
    with pytest.raises(UnsupportedEncodingError):
        OPS.transcode(parts, source, target, rounded=True)


_DTYPES = {"u8": np.uint8, "u32": np.uint32, "f16": np.float16}


@pytest.mark.parametrize("encoding", [*GGML.values(), PLAIN["f16"], Affine(3, 64, "f16")], ids=str)
def test_the_same_encoding_keeps_its_bytes(encoding: Encoding) -> None:
    assert OPS.can_transcode(encoding, encoding)
    parts = {n: np.ones(p.shape, _DTYPES[p.dtype]) for n, p in encoding.parts((2, 256)).items()}
    made = OPS.transcode(parts, encoding, encoding)
    assert made.keys() == parts.keys()
    for name, part in parts.items():
        np.testing.assert_array_equal(made[name], part)
