"""The fallback decodes ggml's blocks to the same bits as ggml and as the gguf package."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from oracles import ggml
from oracles.ggml_blocks import random_blocks

from mlxedge.encodings import GGML, GGML_BY_ID
from mlxedge.errors import UsageError
from mlxedge.fallback import OPS
from mlxedge.fallback.ggml_decode import DECODERS

NAMES = tuple(GGML)
ROWS, COLS = 24, 1024


def same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(got.reshape(-1).view(np.uint32), expected.view(np.uint32))


def test_every_type_has_a_decoder() -> None:
    assert set(DECODERS) == set(GGML)


def test_the_table_is_that_of_gguf() -> None:
    for kind, (block_size, block_bytes) in GGML_QUANT_SIZES.items():
        encoding = GGML_BY_ID.get(int(kind))
        if encoding is not None:
            assert encoding.type_name == kind.name.lower()
            assert (encoding.block_size, encoding.block_bytes) == (block_size, block_bytes)
        elif block_size > 1:  # never in a file, or gguf cannot decode it either
            assert kind.name in ("Q8_1", "Q8_K", "Q1_0")


@pytest.mark.skipif(not ggml.EXACT, reason="ggml's build for this machine may contract")
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_ggml(name: str) -> None:
    blocks = random_blocks(name, ROWS, COLS)
    got = OPS.decode({"weight": blocks}, GGML[name])
    assert got.shape == (ROWS, COLS)
    assert np.isfinite(got).all()
    assert np.unique(got).size > 100
    same_bits(got, ggml.dequantize(name, blocks, ROWS * COLS))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_gguf_package(name: str) -> None:
    blocks = random_blocks(name, ROWS, COLS, seed=1)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    same_bits(OPS.decode({"weight": blocks}, GGML[name]), expected.reshape(-1))


@pytest.mark.parametrize("name", NAMES)
def test_infinite_and_nan_scales_do_not_pass_for_weights(name: str) -> None:
    blocks = np.full((1, GGML[name].block_bytes), 0xFF, np.uint8)
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        expected = gguf.quants.dequantize(blocks, kind)[0]
    got = OPS.decode({"weight": blocks}, GGML[name])[0]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "iq2_xs"])
def test_strided_and_read_only_bytes(name: str) -> None:
    encoding = GGML[name]
    blocks = random_blocks(name, 6, 2 * COLS)
    half = blocks[::2, : encoding.nbytes((COLS,))]
    half.flags.writeable = False
    expected = OPS.decode({"weight": half.copy()}, encoding)
    same_bits(OPS.decode({"weight": half}, encoding), expected.reshape(-1))
    unaligned = np.frombuffer(b"x" + half.tobytes(), np.uint8, offset=1).reshape(half.shape)
    same_bits(OPS.decode({"weight": unaligned}, encoding), expected.reshape(-1))


def test_no_rows() -> None:
    for name, encoding in GGML.items():
        empty = np.empty((0, encoding.nbytes((512,))), np.uint8)
        assert OPS.decode({"weight": empty}, encoding).shape == (0, 512), name


def test_a_wrong_output_is_refused() -> None:
    blocks = random_blocks("q8_0", 2, 64)
    with pytest.raises(UsageError, match="hold 128 weights, not 96"):
        DECODERS["q8_0"](blocks, np.empty((2, 48), np.float32))
    with pytest.raises(UsageError, match="C order"):
        DECODERS["q8_0"](blocks, np.empty((64, 2), np.float32).T)
    with pytest.raises(UsageError, match="f32"):
        DECODERS["q8_0"](blocks, np.empty((2, 64), np.float64))
