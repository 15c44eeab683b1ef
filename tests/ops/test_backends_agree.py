"""MLX gives the bytes of the fallback, for every encoding, on weights that quantizers find hard."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles.ggml_blocks import random_blocks
from oracles.hard_weights import DTYPES, KINDS, hard_weights

from mlxedge.accel import backend
from mlxedge.accel.backend import MlxOps
from mlxedge.encodings import GGML, MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.errors import UnsupportedEncodingError, UsageError
from mlxedge.ops import Parts, load_ops

MLX, NUMPY = load_ops("mlx"), load_ops("numpy")

#: Three K-quant blocks: an odd number, in rows that no power of two divides evenly.
COLS = 768
AFFINE = [
    Affine(bits, group, scale)
    for bits in AFFINE_BITS
    for group in AFFINE_GROUPS
    for scale in ("bf16", "f16", "f32")
]
GGML_WRITABLE = [e for e in GGML.values() if e.name in MlxOps.ggml_types]
WRITABLE = [*PLAIN.values(), *AFFINE, *MLX_FLOAT.values(), *GGML_WRITABLE]
READ_ONLY = [e for e in GGML.values() if not e.writable]
#: What only the fallback writes, by name, so that nothing else drops out of these tests.
FALLBACK_ONLY = [
    "iq1_m", "iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs", "iq4_nl", "iq4_xs",
    "mxfp4", "tq1_0", "tq2_0",
]  # fmt: skip
K_QUANTS = [e for e in GGML_WRITABLE if e.block == 256]


def label(encoding: Encoding) -> str:
    scale = f"-{encoding.scale_dtype}" if isinstance(encoding, Affine) else ""
    return f"{encoding}{scale}"


def weights_of_all_kinds(dtype: str) -> tuple[np.ndarray, list[str]]:
    """Weights ``[rows, 768]`` and what each row is."""
    rng = np.random.default_rng(11)
    pieces = {kind: hard_weights(kind, dtype).reshape(-1, COLS) for kind in KINDS}
    top = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    for power in range(-42, 38, 4):
        scaled = np.clip(rng.normal(size=(1, COLS)) * 10.0**power, -top, top)
        pieces[f"normal, times 1e{power}"] = scaled.astype(DTYPES[dtype])
    pieces["far from zero"] = (7 + 0.01 * rng.normal(size=(1, COLS))).astype(DTYPES[dtype])
    names = [kind for kind, piece in pieces.items() for _ in piece]
    return np.vstack(list(pieces.values())), names


def differing_rows(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Indices of rows that are not the same bytes; in f32, all NaN count as the same."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    rows = len(expected)
    same = got.reshape(rows, -1).view(np.uint8) == expected.reshape(rows, -1).view(np.uint8)
    if got.dtype == np.float32:
        both_nan = np.isnan(got) & np.isnan(expected)
        same |= np.repeat(both_nan, 4, axis=1)
    return np.flatnonzero(~same.all(axis=1))


def assert_same(got: Parts, expected: Parts, names: list[str]) -> None:
    assert got.keys() == expected.keys()
    for part in expected:
        wrong = differing_rows(got[part], expected[part])
        assert not len(wrong), f"{part} differs in {sorted({names[row] for row in wrong})}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", WRITABLE, ids=label)
def test_same_bytes(encoding: Encoding, dtype: str) -> None:
    weights, names = weights_of_all_kinds(dtype)
    expected = NUMPY.encode(weights, encoding)
    assert_same(MLX.encode(weights, encoding), expected, names)
    decoded = {"weights": MLX.decode(expected, encoding)}
    assert_same(decoded, {"weights": NUMPY.decode(expected, encoding)}, names)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, (1, 256), elements=st.one_of(finite, st.floats(-2, 2, width=32))),
    st.sampled_from(WRITABLE),
)
def test_same_bytes_of_any_finite_weights(weights: np.ndarray, encoding: Encoding) -> None:
    assert_same(MLX.encode(weights, encoding), NUMPY.encode(weights, encoding), ["weights"])


@pytest.mark.parametrize("encoding", GGML.values(), ids=label)
def test_same_weights_from_any_ggml_block(encoding: Encoding) -> None:
    parts = {"weight": random_blocks(encoding.name, 5, COLS)}
    assert_same(
        {"weights": MLX.decode(parts, encoding)},
        {"weights": NUMPY.decode(parts, encoding)},
        [f"row {i}" for i in range(5)],
    )


@pytest.mark.parametrize("encoding", MLX_FLOAT.values(), ids=label)
def test_same_weights_from_any_small_float(encoding: Encoding) -> None:
    codes, scales = encoding.parts((3, COLS)).values()
    rng = np.random.default_rng(5)
    parts = {
        "weight": rng.integers(0, 2**32, codes.shape, np.uint32),
        "scales": rng.integers(0, 256, scales.shape, np.uint8),
    }
    got, expected = MLX.decode(parts, encoding), NUMPY.decode(parts, encoding)
    assert not len(differing_rows(got, expected))


def test_special_numbers_are_cast_alike() -> None:
    halves = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    singles = np.random.default_rng(3).integers(0, 2**32, (64, 4096), np.uint32).view(np.float32)
    for source in (halves.view(np.float16), halves.view(ml_dtypes.bfloat16), singles):
        for encoding in PLAIN.values():
            got, expected = MLX.encode(source, encoding), NUMPY.encode(source, encoding)
            bits = got["weight"].view(np.uint8), expected["weight"].view(np.uint8)
            np.testing.assert_array_equal(*bits, err_msg=f"{source.dtype} to {encoding}")


@pytest.mark.parametrize("name", ["f16", "q4_0", "q4_k"])
def test_pieces_join_without_a_seam(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = PLAIN.get(name) or GGML[name]
    weights = np.random.default_rng(0).normal(size=(5, COLS)).astype(np.float32)
    whole = MLX.encode(weights, encoding)
    decoded = MLX.decode(whole, encoding)
    monkeypatch.setattr(backend, "WEIGHTS_AT_ONCE", 1024)
    np.testing.assert_array_equal(MLX.encode(weights, encoding)["weight"], whole["weight"])
    np.testing.assert_array_equal(MLX.decode(whole, encoding), decoded)


def test_strided_and_read_only_weights() -> None:
    weights = np.random.default_rng(0).normal(size=(COLS, 6)).astype(np.float16)
    weights.flags.writeable = False
    got = MLX.encode(weights.T, GGML["q8_0"])
    expected = NUMPY.encode(np.ascontiguousarray(weights.T), GGML["q8_0"])
    np.testing.assert_array_equal(got["weight"], expected["weight"])


def test_memory_does_not_grow_with_the_tensor() -> None:
    weights = np.zeros((4096, 4096), np.float16)
    mx.reset_peak_memory()
    MLX.encode(weights, GGML["q8_0"])
    assert mx.get_peak_memory() < 300e6
    assert mx.get_active_memory() < 1e6


def test_no_rows_at_all() -> None:
    for encoding in WRITABLE:
        parts = MLX.encode(np.zeros((0, 256), np.float32), encoding)
        assert {name: part.shape for name, part in parts.items()} == {
            name: part.shape for name, part in encoding.parts((0, 256)).items()
        }
        assert MLX.decode(parts, encoding).shape == (0, 256)


@pytest.mark.parametrize("encoding", READ_ONLY, ids=label)
def test_formats_that_can_only_be_read(encoding: Encoding) -> None:
    with pytest.raises(UnsupportedEncodingError, match="can be read but not written"):
        MLX.encode(np.zeros((1, 256), np.float32), encoding)


def test_what_only_the_fallback_writes() -> None:
    weights = np.zeros((1, 256), np.float32)
    writable = {e.name for e in GGML.values() if e.writable}
    assert sorted(writable - MlxOps.ggml_types) == FALLBACK_ONLY
    for name in FALLBACK_ONLY:
        with pytest.raises(UnsupportedEncodingError, match=f"{name} .*--backend numpy"):
            MLX.encode(weights, GGML[name])


@pytest.mark.parametrize("encoding", WRITABLE, ids=label)
def test_importance_is_refused_or_has_no_use(encoding: Encoding) -> None:
    weights = np.random.default_rng(2).normal(size=(3, 256)).astype(np.float32)
    importance = np.random.default_rng(3).random(256, np.float32)
    if getattr(encoding, "weighs", False):
        with pytest.raises(UnsupportedEncodingError, match=r"importance .*--backend numpy"):
            MLX.encode(weights, encoding, importance)
    else:
        parts = MLX.encode(weights, encoding, importance)
        assert_same(parts, NUMPY.encode(weights, encoding, importance), ["weights"])


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (np.zeros(256, np.float32), UsageError),
        (np.zeros((1, 256), np.float64), UsageError),
        (np.zeros((1, 255), np.float32), UnsupportedEncodingError),
    ],
    ids=["rank", "dtype", "width"],
)
def test_weights_that_make_no_sense(weights: np.ndarray, error: type[Exception]) -> None:
    for ops in (MLX, NUMPY):
        with pytest.raises(error):
            ops.encode(weights, GGML["q4_k"])


@pytest.mark.parametrize(
    "change",
    [{"weight": None}, {"scales": None}, {"scales": np.zeros((2, 7), np.float32)}],
    ids=str,
)
def test_parts_that_do_not_fit(change: dict[str, np.ndarray | None]) -> None:
    encoding = Affine(4, 64, "f32")
    whole = MLX.encode(np.ones((2, 256), np.float32), encoding)
    parts = {name: part for name, part in (whole | change).items() if part is not None}
    for ops in (MLX, NUMPY):
        with pytest.raises(UsageError, match="part"):
            ops.decode(parts, encoding)


COMPILED = """
import sys
import numpy as np
from mlxedge.accel.backend import MlxOps
from mlxedge.encodings import GGML

weights = np.load(sys.argv[1])
ops = MlxOps(compiled=True)
parts = {name: ops.encode(weights, GGML[name])["weight"] for name in sys.argv[3:]}
np.savez(sys.argv[2], **parts)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="without g++ MLX compiles nothing on a CPU")
def test_fused_stages_survive_contraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that may contract a·b + c, as those for GPUs do, changes nothing.

    MLX compiles for plain x86-64, which has no instruction to contract to; so g++ is told of one.
    """
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and " fma " in cpu.read_text():
        compiler = tmp_path / "g++"
        compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -mavx2 -mfma -mf16c\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where MLX keeps what it compiled
    weights, names = weights_of_all_kinds("f32")
    given, made = tmp_path / "weights.npy", tmp_path / "made.npz"
    np.save(given, weights)
    arguments = [str(given), str(made), *(e.name for e in K_QUANTS)]
    subprocess.run([sys.executable, "-c", COMPILED, *arguments], check=True, timeout=600)
    compiled = dict(np.load(made))
    assert any(tmp_path.glob("mlx/**/*.so")), "nothing was compiled"
    expected = {e.name: NUMPY.encode(weights, e)["weight"] for e in K_QUANTS}
    assert_same(compiled, expected, names)
