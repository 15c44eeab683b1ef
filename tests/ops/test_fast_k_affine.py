"""The search for Q2_K, Q4_K and Q5_K: both backends' bytes, and how good they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import ggml
from oracles.hard_weights import KINDS, hard_weights

from mlxedge.accel import fast_k_affine as accel
from mlxedge.encodings import GGML
from mlxedge.fallback import fast_k_affine as fallback
from mlxedge.ops import load_ops

NUMPY = load_ops("numpy")
NAMES = sorted(fallback.LAYOUTS)
BLOCK = 256


def _importances(cols: int) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(cols)
    random = rng.random(cols)
    made = {
        "random": random,
        "mean squares": rng.normal(size=cols) ** 2 * 10.0 ** rng.uniform(-3, 3, cols),
        "zeros in places": random * (rng.random(cols) < 0.5),
        "whole sub-blocks of zeros": random * np.repeat(rng.random(cols // 16) < 0.5, 16),
        "one column": (np.arange(cols) == 5) * 1.0,
        "all zeros": np.zeros(cols),
        "greatest": np.full(cols, 3.4e38),
        "tiny": 1e-40 * random,
        "every magnitude": 10.0 ** rng.uniform(-44, 38, cols),
    }
    return {"none": None, **{name: values.astype(np.float32) for name, values in made.items()}}


def _model_weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_t(4, size=(rows, cols))).astype(np.float32)


def search(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    found: np.ndarray = fallback.search(x, GGML[name], importance)["weight"]
    return found


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    return NUMPY.decode({"weight": blocks}, GGML[name])


def errors(name: str, x: np.ndarray, blocks: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The weighted error of each super-block, f64."""
    rest = (decode(name, blocks).astype(np.float64) - x) ** 2 * importance
    summed: np.ndarray = rest.reshape(-1, BLOCK).sum(axis=1)
    return summed


def fields(name: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales and minimums as stored ``[N, sub-blocks]`` and codes ``[N, sub-blocks, size]``, by the
    layouts of ggml-common.h, f64."""
    raw = blocks.reshape(-1, GGML[name].block_bytes)
    halves = slice(80, 84) if name == "q2_k" else slice(0, 4)
    d, dmin = raw[:, halves].copy().view(np.float16).astype(np.float64).T[:, :, None]
    if name == "q2_k":
        ls, lm = raw[:, :16] & 15, raw[:, :16] >> 4
        codes = raw[:, 16:80].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]]) & 3
        return d * ls, dmin * lm, codes.reshape(-1, 16, 16)
    a, b, c = (raw[:, i : i + 4] for i in (4, 8, 12))
    ls = np.hstack([a & 63, c & 15 | a >> 6 << 4])
    lm = np.hstack([b & 63, c >> 4 | b >> 6 << 4])
    nibbles = raw[:, -128:].reshape(-1, 4, 1, 32) >> np.array([[0], [4]]) & 15
    codes = nibbles.reshape(-1, 8, 32)
    if name == "q5_k":
        codes = codes | (raw[:, None, 16:48] >> np.arange(8)[:, None] & 1) << 4
    return d * ls, dmin * lm, codes


@pytest.mark.parametrize("name", NAMES)
def test_mlx_gives_the_bytes_of_numpy(name: str) -> None:
    pieces = [hard_weights(kind, "f32").reshape(-1, 768) for kind in KINDS]
    labels = [kind for kind, piece in zip(KINDS, pieces, strict=True) for _ in piece]
    x = np.vstack([*pieces, _model_weights(9, 768)])
    for what, importance in _importances(768).items():
        expected = search(name, x, importance)
        got = accel.search(x, GGML[name], importance)["weight"]
        wrong = np.flatnonzero((got != expected).any(axis=1))
        assert not wrong.size, f"{what}: {[[*labels, *['model'] * 9][row] for row in wrong]}"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(
    x=arrays(np.float32, 400, elements=st.integers(-2048, 2048).map(lambda i: i / 256.0)),
    bits=arrays(np.uint32, 40, elements=st.integers(0, 0x7F7FFFFF)),
)
def test_mlx_gives_the_bytes_of_numpy_for_any(name: str, x: np.ndarray, bits: np.ndarray) -> None:
    x, importance = np.resize(x, (9, BLOCK)), np.resize(bits.view(np.float32), BLOCK)
    got = accel.search(x, GGML[name], importance)["weight"]
    assert np.array_equal(got, search(name, x, importance))


@pytest.mark.parametrize("name", NAMES)
def test_mlx_in_several_evaluations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "WEIGHTS_AT_ONCE", 5 * BLOCK)
    x, importance = _model_weights(4, 768), _importances(768)["random"]
    got = accel.search(x, GGML[name], importance)["weight"]
    assert np.array_equal(got, search(name, x, importance))


FUSED = """
import sys

import mlx.core as mx
import numpy as np

from mlxedge.accel.fast_k_affine import KAffineSearch

given = np.load(sys.argv[1])
x, w = mx.array(given["x"]), mx.array(given["w"])
made = {name: KAffineSearch(name, compiled=True).encode(x, w) for name in sys.argv[3:]}
np.savez(sys.argv[2], **{name: np.array(blocks) for name, blocks in made.items()})
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="without g++ MLX compiles nothing on a CPU")
def test_fused_stages_survive_contraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a compiler that may contract a·b + c changes nothing.

    MLX compiles for plain x86-64, which has no instruction to contract to; so g++ is told of one.
    """
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and " fma " in cpu.read_text():
        compiler = tmp_path / "g++"
        compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" -mavx2 -mfma -mf16c\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where MLX keeps what it compiled
    x = np.vstack([*(hard_weights(kind, "f32") for kind in KINDS), _model_weights(200, BLOCK)])
    importance = _importances(BLOCK)["mean squares"]
    weights = np.tile(fallback.column_weights(importance, BLOCK), (len(x), 1))
    given, made = tmp_path / "given.npz", tmp_path / "made.npz"
    np.savez(given, x=x, w=weights)
    command = [sys.executable, "-c", FUSED, str(given), str(made), *NAMES]
    subprocess.run(command, check=True, timeout=600)
    assert any(tmp_path.glob("mlx/**/*.so")), "nothing was compiled"
    with np.load(made) as fused:
        for name in NAMES:
            assert np.array_equal(fused[name], search(name, x, importance)), name


@pytest.mark.parametrize("name", NAMES)
def test_both_backends_dispatch_to_the_search(name: str) -> None:
    x, importance = _model_weights(3, 512), _importances(512)["mean squares"]
    expected = search(name, x, importance)
    for backend in ("numpy", "mlx"):
        got = load_ops(backend).encode(x, GGML[name], importance, quality="fast")["weight"]
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(("name", "part"), [("q2_k", 0.89), ("q4_k", 0.93), ("q5_k", 0.88)])
def test_less_error_than_the_reference(name: str, part: float) -> None:
    x = _model_weights(64, 2048)
    for what in ("random", "mean squares", "zeros in places", "whole sub-blocks of zeros"):
        importance = _importances(2048)[what]
        reference = NUMPY.encode(x, GGML[name], importance)["weight"]
        before = errors(name, x, reference, importance)
        after = errors(name, x, search(name, x, importance), importance)
        assert after.sum() < part * before.sum(), what
        assert (after > before).mean() < 0.01, what
        assert (after <= 1.3 * before).all(), what


@pytest.mark.parametrize("name", NAMES)
def test_less_error_without_importance(name: str) -> None:
    x, alike = _model_weights(64, 1024), np.ones(1024, np.float32)
    before = errors(name, x, NUMPY.encode(x, GGML[name])["weight"], alike)
    after = errors(name, x, search(name, x, None), alike)
    assert after.sum() < 0.96 * before.sum()


@pytest.mark.parametrize("name", NAMES)
def test_without_importance_all_columns_are_alike(name: str) -> None:
    x = _model_weights(3, 768)
    expected = search(name, x, None)
    for value in (0.0, 0.25, 2.0**-130, 2.0**127):
        importance = np.full(768, value, np.float32)
        assert np.array_equal(search(name, x, importance), expected), value
    importance = np.random.default_rng(1).random(768, np.float32)
    importance[256:512] = 0
    mixed = search(name, x, importance).reshape(3, 3, -1)
    assert np.array_equal(mixed[:, 1], expected.reshape(3, 3, -1)[:, 1])
    assert not np.array_equal(mixed[:, 0], expected.reshape(3, 3, -1)[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_best_for_the_stored_scales(name: str) -> None:
    x = np.vstack([_model_weights(8, 512), hard_weights("powers of two", "f32").reshape(3, 512)])
    scales, minimums, codes = fields(name, search(name, x, _importances(512)["random"]))
    wanted = x.reshape(codes.shape).astype(np.float64)[..., None]
    every = np.arange(fallback.LAYOUTS[name].top + 1)
    stored = scales[..., None, None] * every - minimums[..., None, None]
    best = np.abs(stored - wanted).min(axis=-1)
    chosen = np.take_along_axis(np.abs(stored - wanted), codes[..., None], axis=-1)[..., 0]
    assert (chosen <= best + 1e-6 * scales[..., None]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_and_read_alike_by_ggml(name: str, kind: str) -> None:
    x = hard_weights(kind, "f32")
    for importance in _importances(BLOCK).values():
        blocks = search(name, x, importance)
        ours = decode(name, blocks)
        assert np.isfinite(ours).all()
        assert np.array_equal(ours.ravel(), ggml.dequantize(name, blocks, x.size))
        assert float(np.abs(ours).max()) <= 2.0 * float(np.abs(x).max()) + 2.0**-24


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_does_no_harm(name: str) -> None:
    x = _model_weights(5, 512)
    expected = search(name, x, None).reshape(10, -1)
    x[1, 3], x[2, 300], x[4, 0] = np.nan, np.inf, -np.inf
    for encoder in (fallback.search, accel.search):
        got = encoder(x, GGML[name], None)["weight"].reshape(10, -1)
        others = np.delete(np.arange(10), [2, 5, 8])
        assert np.array_equal(got[others], expected[others])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cols", [256, 1280, 4352])
def test_rows_are_independent(name: str, cols: int) -> None:
    x, importance = _model_weights(7, cols), _importances(cols)["mean squares"]
    whole = search(name, x, importance)
    for rows in (slice(0, 1), slice(2, 7), slice(6, 7)):
        part = np.ascontiguousarray(x[rows])
        assert np.array_equal(search(name, part, importance), whole[rows])
    assert search(name, x[:0], importance).shape == (0, whole.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_dead_columns_do_not_disturb_the_others(name: str) -> None:
    """What was never active counts nothing: huge weights there take no range from the others."""
    x, importance = _model_weights(16, 1024), np.ones(1024, np.float32)
    clean = errors(name, x, search(name, x, importance), importance).sum()
    importance[::64] = 0
    x[:, ::64] *= 3
    disturbed = errors(name, x, search(name, x, importance), importance).sum()
    assert disturbed < 1.1 * clean


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_stored_is_nearly_found(name: str) -> None:
    layout, rng = fallback.LAYOUTS[name], np.random.default_rng(5)
    subs = BLOCK // layout.size
    ls = rng.integers(layout.limit // 2, layout.limit + 1, (40, subs, 1))
    lm = rng.integers(layout.limit // 4, layout.limit + 1, (40, subs, 1))
    codes = rng.integers(0, layout.top + 1, (40, subs, layout.size))
    codes[..., 0], codes[..., 1] = 0, layout.top
    d, dmin = np.float16(0.0123), np.float16(0.0123 * layout.top / 2)
    x = (np.float32(d) * ls * codes - np.float32(dmin) * lm).astype(np.float32).reshape(8, 1280)
    alike = np.ones(1280, np.float32)
    after = errors(name, x, search(name, x, None), alike)
    before = errors(name, x, NUMPY.encode(x, GGML[name], alike)["weight"], alike)
    assert np.median(after) < 1e-9 * BLOCK
    assert after.sum() < 0.3 * before.sum()
