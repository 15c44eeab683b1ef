"""The search for affine groups: the same bytes from both backends, never worse than the rule."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles.hard_weights import COLS, KINDS, ROWS, hard_weights

from mlxedge.accel import backend
from mlxedge.encodings import GGML, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.ops import Ops, Parts, load_ops, load_reference

NUMPY, MLX = load_reference(), load_ops("mlx")

_DTYPES = ("bf16", "f16", "f32")
#: Every width with every group and with every dtype.
AFFINE = [
    Affine(bits, group, _DTYPES[(i + j) % 3])
    for i, bits in enumerate(AFFINE_BITS)
    for j, group in enumerate(AFFINE_GROUPS)
]
ENCODINGS: list[Encoding] = [*AFFINE, GGML["q4_1"], GGML["q5_1"]]
NAMES = np.repeat(KINDS, ROWS)


def label(encoding: Encoding) -> str:
    return f"{encoding}-{getattr(encoding, 'scale_dtype', 'f16')}"


def all_kinds() -> np.ndarray:
    return np.concatenate([hard_weights(kind, "f32") for kind in KINDS])


def uneven(cols: int = COLS) -> np.ndarray:
    """Importance over four decades, some of it zero, of 64 columns all of it."""
    importance = np.random.default_rng(1).random(cols, np.float32) ** 4
    importance[5::17] = 0.0
    importance[64:128] = 0.0
    return importance


def encode(weights: np.ndarray, encoding: Encoding, importance: np.ndarray | None) -> Parts:
    return NUMPY.encode(weights, encoding, importance, quality="fast")


def assert_same(got: Parts, expected: Parts, names: np.ndarray) -> None:
    assert got.keys() == expected.keys()
    for part, there in expected.items():
        assert (got[part].dtype, got[part].shape) == (there.dtype, there.shape)
        wrong = (got[part].view(np.uint8) != there.view(np.uint8)).any(axis=1)
        assert not wrong.any(), f"{part} differs in {sorted(set(names[wrong]))}"


def bits_of(encoding: Encoding) -> int:
    return encoding.bits if isinstance(encoding, Affine) else int(encoding.name[1])


def pairs_and_codes(parts: Parts, encoding: Encoding) -> tuple[np.ndarray, ...]:
    """Scales and biases ``[rows, groups, 1]`` and codes ``[rows, groups, group]``, by hand."""
    if isinstance(encoding, Affine):
        rows = len(parts["weight"])
        stream = np.unpackbits(parts["weight"].view(np.uint8), axis=1, bitorder="little")
        bits = stream.reshape(rows, -1, encoding.group, encoding.bits)
        codes = (bits.astype(np.int64) << np.arange(encoding.bits)).sum(axis=-1)
        pair = (parts[name].astype(np.float64)[..., None] for name in ("scales", "biases"))
        return *pair, codes
    raw = parts["weight"].reshape(len(parts["weight"]), -1, encoding.nbytes((32,)))
    halves = np.ascontiguousarray(raw[..., :4]).view(np.float16).astype(np.float64)
    codes = np.concatenate([raw[..., -16:] & 15, raw[..., -16:] >> 4], axis=-1).astype(np.int64)
    if encoding.name == "q5_1":
        fifth = np.unpackbits(np.ascontiguousarray(raw[..., 4:8]), axis=-1, bitorder="little")
        codes += fifth.astype(np.int64) << 4
    return halves[..., :1], halves[..., 1:], codes


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=label)
def test_same_bytes(encoding: Encoding, weighted: bool) -> None:
    weights, importance = all_kinds(), uneven() if weighted else None
    got = MLX.encode(weights, encoding, importance, quality="fast")
    assert_same(got, encode(weights, encoding, importance), NAMES)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
factors = st.one_of(st.just(0.0), st.floats(0, 1, width=32), st.floats(0, 2.0**100, width=32))


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (2, 128), elements=st.one_of(st.floats(-2, 2, width=32), numbers)),
    st.one_of(st.none(), arrays(np.float32, 128, elements=factors)),
    st.sampled_from(ENCODINGS),
)
def test_same_bytes_of_any_finite_weights(
    weights: np.ndarray, importance: np.ndarray | None, encoding: Encoding
) -> None:
    got = MLX.encode(weights, encoding, importance, quality="fast")
    assert_same(got, encode(weights, encoding, importance), np.array(["weights"] * 2))


def errors(parts: Parts, encoding: Encoding, weights: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted squared errors ``[rows, groups]``."""
    off = NUMPY.decode(parts, encoding).astype(np.float64) - weights
    return (w * off * off).reshape(len(weights), -1, encoding.block).sum(axis=2)


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=label)
def test_never_worse_than_the_rule(encoding: Encoding, weighted: bool) -> None:
    """But for the roundings of the search's and the decoder's own arithmetic."""
    weights = all_kinds()
    importance = uneven() if weighted else None
    w = np.ones(COLS) if importance is None else importance.astype(np.float64)
    groups = w.reshape(-1, encoding.block)
    groups[groups.max(axis=1) == 0] = 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        rule = errors(NUMPY.encode(weights, encoding), encoding, weights, w)
        found = errors(encode(weights, encoding, importance), encoding, weights, w)
        size = np.abs(weights).astype(np.float64).reshape(*rule.shape, -1)
        noise = (groups * (size.max(axis=2, keepdims=True) * 2.0**-22) ** 2).sum(axis=2)
    worse = (found > rule * (1 + 1e-4) + noise).any(axis=1)
    assert not worse.any(), set(NAMES[worse])
    if weighted or bits_of(encoding) > 3:
        assert found[: 2 * ROWS].sum() < 0.9 * rule[: 2 * ROWS].sum()  # of ordinary weights


@pytest.mark.parametrize("encoding", ENCODINGS, ids=label)
def test_codes_are_the_best_for_the_stored_pair(encoding: Encoding) -> None:
    weights = all_kinds()
    parts = encode(weights, encoding, uneven())
    scale, bias, codes = pairs_and_codes(parts, encoding)
    assert np.isfinite(scale).all()
    assert np.isfinite(bias).all()
    grid = scale * codes + bias
    off = np.abs(NUMPY.decode(parts, encoding).reshape(grid.shape) - grid)
    assert (off <= 1e-6 * (np.abs(scale * codes) + np.abs(bias)) + 2.0**-140).all()
    x = weights.astype(np.float64).reshape(grid.shape)
    best = np.full(x.shape, np.inf)
    for code in range(2 ** bits_of(encoding)):
        best = np.minimum(best, np.abs(scale * code + bias - x))
    # Scales without an inverse in float32 leave all codes 0; ties and roundings are open.
    usable = np.broadcast_to(np.abs(scale) > 2.0**-126, x.shape)
    slack = 1e-4 * np.abs(scale) + 1e-6 * np.abs(bias)
    worse = ((np.abs(grid - x) > best * (1 + 1e-6) + slack) & usable).any(axis=(1, 2))
    assert not worse.any(), set(NAMES[worse])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=label)
def test_what_can_be_exact_is(encoding: Encoding) -> None:
    """Groups on a grid that every dtype holds, edges included: their codes are found, and their
    pairs but for float32's roundings."""
    top = 2 ** bits_of(encoding) - 1
    rng = np.random.default_rng(2)
    codes = rng.integers(0, top + 1, (24, 256 // encoding.block, encoding.block))
    codes[..., 0], codes[..., 1] = 0, top
    scale = rng.integers(64, 128, (24, 1, 1)) / 2048.0
    bias = -scale * 2.0 ** rng.integers(0, bits_of(encoding), (24, 1, 1))
    weights = (scale * codes + bias).reshape(24, 256).astype(np.float32)
    parts = encode(weights, encoding, rng.random(256, np.float32) + np.float32(0.01))
    got_scale, _, got_codes = pairs_and_codes(parts, encoding)
    mirrored = got_scale < 0
    np.testing.assert_array_equal(np.where(mirrored, top - got_codes, got_codes), codes)
    np.testing.assert_allclose(np.abs(got_scale) + 0 * scale, scale + 0 * got_scale, rtol=1e-6)
    decoded = NUMPY.decode(parts, encoding)
    if getattr(encoding, "scale_dtype", "f16") == "f32":
        np.testing.assert_allclose(decoded, weights, rtol=0, atol=2e-6 * np.abs(weights).max())
    else:
        np.testing.assert_array_equal(decoded, weights)


def test_at_few_bits_only_importance_moves_pairs() -> None:
    weights = np.random.default_rng(3).normal(size=(5, 256)).astype(np.float32)
    for bits in (2, 3):
        rule = NUMPY.encode(weights, Affine(bits, 64))
        alike, weighted = (encode(weights, Affine(bits, 64), w) for w in (None, uneven()))
        np.testing.assert_array_equal(alike["scales"], rule["scales"])
        moved = weighted["scales"] != rule["scales"]
        assert moved[:, [0, 2, 3]].mean() > 0.9
        assert not moved[:, 1].any()  # no importance there


def test_groups_without_importance_count_alike() -> None:
    weights = np.random.default_rng(4).normal(size=(5, 256)).astype(np.float32)
    importance = np.random.default_rng(5).random(256, np.float32)
    importance[64:128] = 0.0
    for encoding in (Affine(2, 64), Affine(3, 32), Affine(4, 64), Affine(8, 32), GGML["q4_1"]):
        some, none = (encode(weights, encoding, given) for given in (importance, None))
        got, expected = (NUMPY.decode(p, encoding) for p in (some, none))
        np.testing.assert_array_equal(got[:, 64:128], expected[:, 64:128])
        assert (got != expected).any()


def test_columns_without_importance_are_left_to_the_others() -> None:
    """One column that counts, and outliers that do not: it comes out exact."""
    weights = np.random.default_rng(6).normal(size=(4, 64)).astype(np.float32)
    weights[:, 9] *= 50.0
    importance = np.zeros(64, np.float32)
    importance[20:23] = 1.0
    off = NUMPY.decode(encode(weights, Affine(4, 64, "f32"), importance), Affine(4, 64, "f32"))
    rule = NUMPY.decode(NUMPY.encode(weights, Affine(4, 64, "f32")), Affine(4, 64, "f32"))
    off, rule = (((v - weights)[:, 20:23] ** 2).sum() for v in (off, rule))
    assert off < 0.25 * rule


def test_only_ratios_of_importance_matter() -> None:
    weights = np.random.default_rng(7).normal(size=(3, 256)).astype(np.float32)
    importance = np.random.default_rng(8).random(256, np.float32)
    expected = encode(weights, Affine(4, 64), importance)
    for factor in (2.0**-100, 2.0**90):
        got = encode(weights, Affine(4, 64), importance * np.float32(factor))
        assert_same(got, expected, np.array(["normal"] * 3))


@pytest.mark.parametrize("encoding", [Affine(3, 32), Affine(8, 128), GGML["q5_1"]], ids=label)
@pytest.mark.parametrize("ops", [NUMPY, MLX], ids=lambda ops: ops.name)
def test_rows_are_independent(
    ops: Ops, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(9).normal(size=(37, 256)).astype(np.float32)
    whole = ops.encode(weights, encoding, uneven(), quality="fast")
    monkeypatch.setattr(backend, "WEIGHTS_AT_ONCE", 1024)
    for rows in (slice(0, 1), slice(3, 20), slice(20, 37)):
        part = ops.encode(weights[rows], encoding, uneven(), quality="fast")
        names = np.array(["normal"] * len(weights[rows]))
        assert_same(part, {name: p[rows] for name, p in whole.items()}, names)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=label)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_are_not_finite_do_no_harm(encoding: Encoding) -> None:
    """To other groups, that is."""
    weights = np.random.default_rng(10).normal(size=(3, 256)).astype(np.float32)
    clean = NUMPY.decode(encode(weights, encoding, None), encoding)
    weights[0, 3], weights[1, 7], weights[2, 9] = np.nan, np.inf, -np.inf
    decoded = NUMPY.decode(encode(weights, encoding, None), encoding)
    np.testing.assert_array_equal(decoded[:, 128:], clean[:, 128:])
    assert (
        MLX.encode(weights, encoding, None, quality="fast").keys()
        == encoding.parts(weights.shape).keys()
    )


def test_no_rows_at_all() -> None:
    for encoding in (Affine(4, 64), GGML["q4_1"]):
        for ops in (NUMPY, MLX):
            parts = ops.encode(np.zeros((0, 256), np.float32), encoding, quality="fast")
            assert {name: part.shape for name, part in parts.items()} == {
                name: part.shape for name, part in encoding.parts((0, 256)).items()
            }


def test_memory_beside_the_tensor() -> None:
    weights = np.zeros((1280, 4096), np.float32)
    mx.reset_peak_memory()
    MLX.encode(weights, Affine(2, 64), quality="fast")
    assert mx.get_peak_memory() < 2**30
    assert mx.get_active_memory() < 10e6


COMPILED = """
import sys
import numpy as np
from mlxedge.accel.fast_affine import search
from mlxedge.encodings import Affine

weights, importance = np.load(sys.argv[1]), np.load(sys.argv[2])
parts = search(weights, Affine(4, 64, "bf16"), importance, compiled=True)
np.savez(sys.argv[3], **{name: part.view(np.uint8) for name, part in parts.items()})
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
    weights = all_kinds()
    given, factors, made = (tmp_path / name for name in ("x.npy", "w.npy", "made.npz"))
    np.save(given, weights)
    np.save(factors, uneven())
    arguments = [str(given), str(factors), str(made)]
    subprocess.run([sys.executable, "-c", COMPILED, *arguments], check=True, timeout=600)
    assert any(tmp_path.glob("mlx/**/*.so")), "nothing was compiled"
    expected = encode(weights, Affine(4, 64, "bf16"), uneven())
    bytes_of = {name: part.view(np.uint8) for name, part in expected.items()}
    assert_same(dict(np.load(made)), bytes_of, NAMES)
