"""Error feedback: less error in a layer's output for the same scales, never more, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from oracles.hard_weights import KINDS, hard_weights

from mlxedge import grids
from mlxedge.accel import feedback as accel
from mlxedge.encodings import F16, GGML, MLX_FLOAT, Affine, Encoding
from mlxedge.errors import UsageError
from mlxedge.fallback import OPS
from mlxedge.fallback import feedback as fallback
from mlxedge.ops import Feedback, Parts

ENCODINGS: list[Encoding] = [
    *(Affine(bits, 64) for bits in (2, 3, 4, 8)),
    Affine(4, 32, "f32"),
    *MLX_FLOAT.values(),
    *(e for e in GGML.values() if e.writable and grids.has_grid(e)),
]


def inputs(cols: int, tokens: int = 2000, seed: int = 0) -> np.ndarray:
    """Correlated inputs of uneven size, as layers have them."""
    rng = np.random.default_rng(seed)
    few = rng.normal(size=(tokens, cols // 4)) @ rng.normal(size=(cols // 4, cols))
    return (few + rng.normal(size=(tokens, cols)) * 2) * np.exp(rng.normal(size=cols))


def hessian_of(x: np.ndarray) -> np.ndarray:
    return (x.T @ x / len(x)).astype(np.float32)


def weights_of(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_t(4, (rows, cols))).astype(np.float32)


def errors(w: np.ndarray, parts: Parts, encoding: Encoding, feedback: Feedback) -> np.ndarray:
    """E H Eᵀ of each row, float64."""
    e = (w.astype(np.float64) - OPS.decode(parts, encoding))[:, feedback.order]
    return np.einsum("ij,jk,ik->i", e, feedback.hessian.astype(np.float64), e)


HESSIAN = hessian_of(inputs(512))
FEEDBACK = OPS.feedback(HESSIAN)
FEW_COLUMNS = OPS.feedback(hessian_of(inputs(256)))


def same(a: Parts, b: Parts) -> bool:
    return all(np.array_equal(a[n].view(np.uint8), b[n].view(np.uint8)) for n in a)


def test_the_factor_is_of_the_damped_hessian_in_order() -> None:
    assert FEEDBACK.order.dtype == np.int32
    assert np.array_equal(np.sort(FEEDBACK.order), np.arange(512))
    assert np.all(np.diff(HESSIAN.diagonal()[FEEDBACK.order]) <= 0)
    factor = FEEDBACK.factor.astype(np.float64)
    assert np.array_equal(factor, np.triu(factor))
    assert np.abs(factor @ factor.T - FEEDBACK.hessian).max() < 1e-6 * FEEDBACK.hessian.max()
    scale = 2.0 ** -np.frexp(HESSIAN.diagonal().mean(dtype=np.float64))[1]
    given = HESSIAN[np.ix_(FEEDBACK.order, FEEDBACK.order)] * np.float32(scale)
    off = ~np.eye(512, dtype=bool)
    assert np.array_equal(FEEDBACK.hessian[off], given[off])
    raised = FEEDBACK.hessian.diagonal() / given.diagonal()
    assert raised.min() > 1


def nearest_one_by_one(
    w: np.ndarray, grid: grids.Grid, feedback: Feedback, sweeps: int
) -> np.ndarray:
    """The definition, in float64: values chosen for one row whose grid is ``grid``."""
    v, h = feedback.factor.astype(np.float64), feedback.hessian.astype(np.float64)
    cols = len(w)
    column = feedback.order // grid.group
    options = (
        grid.scale[0].astype(np.float64)[column, None] * grid.levels[grid.ranked]
        + grid.offset[0].astype(np.float64)[column, None]
    )
    x = w[feedback.order].astype(np.float64)
    value, error = np.zeros(cols), np.zeros(cols)
    for j in range(cols):
        target = x[j] + error[:j] @ v[:j, j] / v[j, j]
        value[j] = options[j, np.abs(options[j] - target).argmin()]
        error[j] = x[j] - value[j]
    for _ in range(sweeps):
        for j in range(cols):
            target = value[j] + error @ h[:, j] / h[j, j]
            value[j] = options[j, np.abs(options[j] - target).argmin()]
            error[j] = x[j] - value[j]
    out = np.empty(cols)
    out[feedback.order] = value
    return out


@pytest.mark.parametrize(
    "encoding", [Affine(3, 64), MLX_FLOAT["mxfp4"], MLX_FLOAT["mxfp8"]], ids=str
)
def test_codes_are_those_of_the_definition(encoding: Encoding) -> None:
    w = weights_of(6, 512)
    parts = OPS.encode(w, encoding)
    made = OPS.decode(fallback.encode(w, parts, encoding, FEEDBACK), encoding)
    equal = 0.0
    for row in range(len(w)):
        one = {n: p[row : row + 1] for n, p in parts.items()}
        grid = grids.grid(one, encoding)
        expected = nearest_one_by_one(w[row], grid, FEEDBACK, fallback.SWEEPS)
        equal += np.mean(np.abs(made[row] - expected) < 1e-6)
    # A tie broken otherwise by float32 changes what comes after it, in its row.
    assert equal / len(w) > 0.95


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_error_falls_and_scales_stay(encoding: Encoding) -> None:
    w = weights_of(21, 512)
    parts = OPS.encode(w, encoding, HESSIAN.diagonal().copy())
    made = fallback.encode(w, parts, encoding, FEEDBACK)
    before, after = (errors(w, p, encoding, FEEDBACK) for p in (parts, made))
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < 0.95 * before.sum()
    old, new = grids.grid(parts, encoding), grids.grid(made, encoding)
    assert np.array_equal(old.scale, new.scale)
    assert np.array_equal(old.offset, new.offset)


@pytest.mark.parametrize("encoding", [Affine(4), GGML["q2_k"], GGML["iq4_xs"]], ids=str)
def test_sweeps_only_lower_the_error(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights_of(17, 512)
    parts = OPS.encode(w, encoding)
    found = []
    for sweeps in range(4):
        monkeypatch.setattr(fallback, "SWEEPS", sweeps)
        found.append(errors(w, fallback.encode(w, parts, encoding, FEEDBACK), encoding, FEEDBACK))
    for more, fewer in zip(found[1:], found, strict=False):
        assert np.all(more <= fewer * (1 + 1e-5))
    assert found[2].sum() < found[0].sum()


@pytest.mark.parametrize("encoding", [Affine(4), MLX_FLOAT["nvfp4"], GGML["q3_k"]], ids=str)
def test_rows_are_independent(encoding: Encoding) -> None:
    w = weights_of(600, 512)
    parts = OPS.encode(w, encoding)
    whole = fallback.encode(w, parts, encoding, FEEDBACK)

    def sliced(piece: slice) -> bool:
        made = fallback.encode(
            w[piece], {n: p[piece] for n, p in parts.items()}, encoding, FEEDBACK
        )
        return same(made, {n: p[piece] for n, p in whole.items()})

    pieces = [slice(0, 1), slice(3, 20), slice(17, 34), slice(255, 600), slice(599, 600)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(sliced, pieces * 2))


@pytest.mark.parametrize("encoding", [Affine(4), MLX_FLOAT["mxfp8"], GGML["q4_k"]], ids=str)
def test_no_rows(encoding: Encoding) -> None:
    parts = OPS.encode(weights_of(0, 512), encoding)
    made = fallback.encode(weights_of(0, 512), parts, encoding, FEEDBACK)
    assert {n: p.shape for n, p in made.items()} == {n: p.shape for n, p in parts.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", [Affine(2), MLX_FLOAT["mxfp8"], GGML["q5_k"]], ids=str)
def test_of_hard_weights(encoding: Encoding, kind: str) -> None:
    w = hard_weights(kind, "f32")
    parts = OPS.encode(w, encoding)
    made = fallback.encode(w, parts, encoding, FEW_COLUMNS)
    with np.errstate(all="ignore"):
        before, after = (errors(w, p, encoding, FEW_COLUMNS) for p in (parts, made))
    worse = after > before * (1 + 1e-5)
    assert not np.any(worse & np.isfinite(before))
    kept = ~np.isfinite(before)
    assert same(*({n: p[kept] for n, p in q.items()} for q in (parts, made)))


HESSIANS = {
    "fewer tokens than columns": hessian_of(inputs(512, tokens=40)),
    "one token": hessian_of(inputs(512, tokens=1)),
    "zeros": np.zeros((512, 512), np.float32),
    "dead columns": hessian_of(inputs(512) * (np.arange(512) % 3 != 0)),
    "an enormous channel": hessian_of(inputs(512) * np.where(np.arange(512) == 7, 1e6, 1.0)),
    "huge": HESSIAN * np.float32(1e30),
    "tiny": HESSIAN * np.float32(1e-34),
    "subnormal": HESSIAN / HESSIAN.max() * np.float32(1e-40),
    "ones": np.ones((512, 512), np.float32),
    "not of inputs": -hessian_of(inputs(512)) + 2 * np.diag(HESSIAN.diagonal()),
}


HESSIANS["nothing on the diagonal"] = np.ones((512, 512), np.float32) - np.eye(512, dtype="f4")
HESSIANS["no end beside the diagonal"] = np.where(np.eye(512), 1e-30, 3e38).astype(np.float32)


@pytest.mark.parametrize("name", HESSIANS)
def test_any_hessian_will_do(name: str) -> None:
    feedback = OPS.feedback(HESSIANS[name])
    assert np.isfinite(feedback.factor).all()
    assert feedback.factor.diagonal().min() > 0
    w = weights_of(9, 512)
    parts = OPS.encode(w, Affine(3))
    made = fallback.encode(w, parts, Affine(3), feedback)
    before, after = (errors(w, p, Affine(3), feedback) for p in (parts, made))
    assert np.all(after <= before * (1 + 1e-5))
    assert after.sum() < before.sum()


@pytest.mark.parametrize(
    ("hessian", "says"),
    [
        (np.zeros((4, 5), np.float32), "f32 \\[cols, cols\\] is needed"),
        (np.zeros((4, 4)), "float64"),
        (np.zeros(4, np.float32), "is needed"),
        (np.full((4, 4), np.nan, np.float32), "NaN or infinite"),
        (np.diag(np.float32([1, np.inf])), "NaN or infinite"),
        (np.diag(np.float32([1, -1])), "negative diagonal"),
    ],
)
def test_what_is_no_hessian_is_refused(hessian: np.ndarray, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        OPS.feedback(hessian)


def test_another_layers_feedback_is_refused() -> None:
    w = weights_of(2, 256)
    with pytest.raises(UsageError, match="for 512 columns, the weights have 256"):
        fallback.encode(w, OPS.encode(w, Affine(4)), Affine(4), FEEDBACK)


@pytest.mark.parametrize("encoding", [F16, GGML["iq2_xxs"], GGML["iq1_s"]], ids=str)
def test_lattices_are_left_as_they_are(encoding: Encoding) -> None:
    w = weights_of(2, 512)
    parts = {
        n: np.zeros(p.shape, np.float16 if p.dtype == "f16" else np.uint8)
        for n, p in encoding.parts(w.shape).items()
    }
    assert fallback.encode(w, parts, encoding, FEEDBACK) is parts


@pytest.mark.parametrize("encoding", [Affine(4), MLX_FLOAT["mxfp4"], GGML["q4_k"]], ids=str)
def test_best_is_the_search_and_then_this(encoding: Encoding) -> None:
    w, importance = weights_of(5, 512), HESSIAN.diagonal().copy()
    best = OPS.encode(w, encoding, importance, quality="best", feedback=FEEDBACK)
    fast = OPS.encode(w, encoding, importance, quality="fast", feedback=FEEDBACK)
    assert same(best, fallback.encode(w, fast, encoding, FEEDBACK))
    assert not same(best, fast)
    assert same(fast, OPS.encode(w, encoding, importance, quality="best"))


def test_large_factors_are_blocked() -> None:
    """More columns than one block on the diagonal, and not a multiple of it."""
    hessian = hessian_of(inputs(592, tokens=700))
    feedback = OPS.feedback(hessian)
    factor = feedback.factor.astype(np.float64)
    assert np.abs(factor @ factor.T - feedback.hessian).max() < 1e-6 * feedback.hessian.max()


#: One of each kind of levels and of scales.
ON_MLX: list[Encoding] = [
    *(Affine(bits) for bits in (2, 3, 4, 8)),
    *MLX_FLOAT.values(),
    *(GGML[name] for name in ("q4_k", "q3_k", "iq4_xs", "q8_0", "tq1_0")),
]


@pytest.mark.parametrize("encoding", ON_MLX, ids=str)
def test_mlx_errs_as_much(encoding: Encoding) -> None:
    """Within the bound that its docstring names."""
    w = weights_of(160, 256)
    parts = OPS.encode(w, encoding)
    ours, theirs = (m.encode(w, parts, encoding, FEW_COLUMNS) for m in (fallback, accel))
    expected, found = (errors(w, p, encoding, FEW_COLUMNS) for p in (ours, theirs))
    assert abs(found.sum() / expected.sum() - 1) < 1e-4
    assert np.all(found <= errors(w, parts, encoding, FEW_COLUMNS) * (1 + 1e-5))
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert (theirs[name].dtype, theirs[name].shape) == (ours[name].dtype, ours[name].shape)


@pytest.mark.parametrize("kind", ["huge", "huge and tiny", "zeros", "subnormal"])
def test_mlx_of_hard_weights(kind: str) -> None:
    w = hard_weights(kind, "f32")
    parts = OPS.encode(w, Affine(3))
    with np.errstate(all="ignore"):
        made = accel.encode(w, parts, Affine(3), FEW_COLUMNS)
        before, after = (errors(w, p, Affine(3), FEW_COLUMNS) for p in (parts, made))
    assert not np.any((after > before * (1 + 1e-5)) & np.isfinite(before))


@pytest.mark.parametrize("chunk", [1, 256 * 7])
def test_mlx_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights_of(9, 256)
    parts = OPS.encode(w, Affine(4))
    whole = errors(w, accel.encode(w, parts, Affine(4), FEW_COLUMNS), Affine(4), FEW_COLUMNS)
    monkeypatch.setattr(accel, "_WEIGHTS_AT_ONCE", chunk)
    pieces = errors(w, accel.encode(w, parts, Affine(4), FEW_COLUMNS), Affine(4), FEW_COLUMNS)
    assert abs(pieces.sum() / whole.sum() - 1) < 1e-4


@pytest.mark.parametrize("encoding", [F16, GGML["iq2_xxs"]], ids=str)
def test_mlx_leaves_lattices(encoding: Encoding) -> None:
    parts = {"weight": np.zeros((2, encoding.nbytes((512,))), np.uint8)}
    assert accel.encode(weights_of(2, 512), parts, encoding, FEEDBACK) is parts


def test_mlx_has_the_same_sweeps() -> None:
    assert accel.SWEEPS == fallback.SWEEPS


def test_mlx_refuses_another_layers_feedback() -> None:
    w = weights_of(2, 256)
    with pytest.raises(UsageError, match="for 512 columns, the weights have 256"):
        accel.encode(w, OPS.encode(w, Affine(4)), Affine(4), FEEDBACK)
