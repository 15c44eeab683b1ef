"""Error feedback: codes chosen one column after the other, each making up for those before.

For the scales that a search found, this chooses the codes q of a row w so that the error of the
layer's output is small: tr(E H Eᵀ) with E = w - q and H the mean of x·xᵀ over inputs x. With
H = V·Vᵀ, V upper triangular, that is the squared length of E·V, whose j-th element is
``E_j·V_jj + Σ_{i<j} E_i·V_ij``: column by column, the nearest code to
``w_j + Σ_{i<j} E_i·V_ij / V_jj`` makes it least for the errors made before. These are the codes of
GPTQ (Frantar et al. 2022, arXiv 2210.17323), in the form that needs no inverse of H (LDLQ, Chee et
al. 2023, arXiv 2307.13304, theorem 6). Columns of large inputs come first, while there are many
left to make up for their errors (GPTQ's act-order; groups need not be contiguous, for their scales
stay). Then sweeps of coordinate descent: each code in turn is the best for all others as they are.

A row whose error is not less than with the codes of the search keeps those. Sixteen rows at a time
are the lanes of vectors, zeros where there are fewer; in each lane every sum is made of fused
multiply-adds in the order of columns. So a row's codes depend on nothing but that row, its scales
and the :class:`~mlxedge.ops.Feedback`.

:func:`prepare` factors H in float32, blocks on the diagonal in float64. Its products are those of
the BLAS, whose last bits may differ from one machine to another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils

from mlxedge import grids
from mlxedge.encodings import Encoding
from mlxedge.errors import UsageError
from mlxedge.fallback.bits import as_input
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    F32,
    LANES,
    inline,
    lanes_set,
    load,
    nearest,
    spread,
    store,
    where,
)
from mlxedge.fallback.memory import ADDRESS, FLOAT, I64, NOTHING, VOID, call, op, read, target
from mlxedge.fallback.memory import spread as fill
from mlxedge.fallback.memory import write as put
from mlxedge.ops import Feedback, Parts

#: What is added to each element of the diagonal of H: so many times itself, and this part of the
#: mean. A few thousand tokens tell little of how the inputs of another text go together. With H as
#: it was measured on 2048 tokens, and GPTQ's 0.01 of the mean, Q4_0's errors on other text were
#: 1.11 times those of the search. With twice itself, which makes the products of different columns
#: count a third, those of affine 4-bit were 0.86 times.
DAMPING, MEAN_DAMPING = 2.0, 0.1
#: How often the diagonal is raised before products of different columns are given up.
_TRIES = 6
#: Coordinate descent ends after so many sweeps over the columns.
SWEEPS = 2
#: Rows and columns of a block that is factored in float64.
_BLOCK = 256
#: Weights in flight: the errors of so many are to stay in a core's cache.
_IN_FLIGHT = 1 << 18
#: With more levels than this, the nearest is found by bisection.
_FEW = 16
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)


def prepare(hessian: np.ndarray) -> Feedback:
    """From the mean of x·xᵀ over a layer's inputs, f32 ``[cols, cols]``.

    The diagonal is raised (``DAMPING``, ``MEAN_DAMPING``), tenfold again until a factor exists, or
    until it is plain that this is no mean of x·xᵀ: then the diagonal alone is kept.
    Columns without input, and a Hessian of zeros, thus count little but not nothing: their codes
    become the nearest. H is scaled by a power of two to a mean of 0.5…1 of its diagonal. No third
    matrix of its size is needed beside the two of the result.

    Raises UsageError unless it is square, finite and has no negative diagonal.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != np.float32:
        raise UsageError(
            f"the Hessian is {hessian.dtype} {list(hessian.shape)}: f32 [cols, cols] is needed"
        )
    diagonal = hessian.diagonal().astype(np.float64)
    if not all(np.isfinite(row).all() for row in hessian):
        raise UsageError("the Hessian has NaN or infinite elements: check the calibration")
    if hessian.size and diagonal.min() < 0:
        raise UsageError("the Hessian has a negative diagonal: it must be the mean of x·xᵀ")
    order = np.argsort(-diagonal, kind="stable").astype(np.int32)
    # The scale of H does not matter, but sums of its squares must not overflow.
    mean, exponent = np.frexp(diagonal.mean() if diagonal.any() else 1.0)
    damped = hessian[np.ix_(order, order)]
    with np.errstate(over="ignore"):
        np.ldexp(damped, -exponent, out=damped)
    diagonal = np.ldexp(diagonal[order], -exponent)
    for power in range(_TRIES):
        more = 10.0**power
        np.fill_diagonal(damped, diagonal * (1 + more * DAMPING) + more * mean * MEAN_DAMPING)
        factor = _upper_factor(damped)
        if factor is not None:
            return Feedback(as_input(order), as_input(damped), as_input(factor))
    damped = np.diag(diagonal + mean * MEAN_DAMPING).astype(np.float32)
    return Feedback(as_input(order), as_input(damped), as_input(np.sqrt(damped)))


@np.errstate(over="ignore", invalid="ignore")
def _upper_factor(hessian: np.ndarray) -> np.ndarray | None:
    """The upper triangular f32 V with V·Vᵀ = ``hessian``, or None if there is none."""
    factor = np.triu(hessian)
    for stop in range(len(factor), 0, -_BLOCK):
        first = max(0, stop - _BLOCK)
        block = slice(first, stop)
        # Few and large products: a BLAS shares each among threads, and waits for the last of them,
        # which on busy processors takes far longer than a small product does.
        known = factor[:stop, stop:] @ factor[block, stop:].T
        corner = factor[block, block].astype(np.float64) - known[first:]
        inverse = np.zeros_like(corner)
        if not _factor_corner(corner, inverse):
            return None
        factor[block, block] = corner
        rest = factor[:first, block] - known[:first]
        factor[:first, block] = rest @ inverse.T.astype(np.float32)
    return factor if np.isfinite(factor).all() else None


@kernel
def _factor_corner(corner: Any, inverse: Any) -> Any:
    """Whether there is an upper triangular U with U·Uᵀ = ``corner``, f64 ``[n, n]`` of which the
    upper triangle is read: then it is U, and ``inverse``, which was zeros, that of U."""
    n = len(corner)
    column = np.empty(n)
    for j in range(n - 1, -1, -1):
        if not 0.0 < corner[j, j] < np.inf:
            return False
        root = np.sqrt(corner[j, j])
        corner[j, j] = root
        corner[j, :j] = 0.0
        for i in range(j):
            column[i] = corner[i, j] / root
        for i in range(j):
            corner[i, j] = column[i]
            for k in range(i, j):
                corner[i, k] -= column[i] * column[k]
    for i in range(n - 1, -1, -1):
        inverse[i, i] = 1.0
        for k in range(i + 1, n):
            for j in range(k, n):
                inverse[i, j] -= corner[i, k] * inverse[k, j]
        inverse[i, i:] /= corner[i, i]
    return True


def encode(weights: np.ndarray, parts: Parts, encoding: Encoding, feedback: Feedback) -> Parts:
    """``parts`` with the same scales and codes chosen anew for ``weights``, f32 ``[rows, cols]``.

    Encodings without a code for each weight are returned as they are, and so are the codes of rows
    that have no less error by tr(E H Eᵀ). H is ``feedback.hessian``, which is damped.

    Raises UsageError if the feedback is for another number of columns.
    """
    if not grids.has_grid(encoding):
        return parts
    rows, cols = weights.shape
    if len(feedback.order) != cols:
        raise UsageError(
            f"the feedback is for {len(feedback.order)} columns, the weights have {cols}"
        )
    grid = grids.grid(parts, encoding)
    levels = grid.levels[grid.ranked]
    middles = (levels[1:] + levels[:-1]) * np.float32(0.5)
    steps = np.diff(levels)
    uniform = bool((steps == 1).all())
    codes = grids.codes(parts, encoding)
    at_once = max(4, _IN_FLIGHT // max(1, cols) // LANES) * LANES
    for first in range(0, rows, at_once):
        piece = slice(first, first + at_once)
        _choose(
            as_input(weights[piece]),
            as_input(grid.scale[piece]),
            as_input(grid.offset[piece]),
            as_input(levels),
            as_input(middles),
            as_input(steps),
            uniform,
            as_input(grid.levels),
            as_input(grid.ranked),
            feedback.order,
            feedback.factor,
            feedback.hessian,
            SWEEPS,
            codes[piece],
        )
    return grids.with_codes(parts, encoding, codes)


def _columns_at_once() -> int:
    """How many vectors of sums, of 16 lanes each, the processor's registers hold."""
    return 16 if "+avx512f" in target()[1] else 4


_COLUMNS = _columns_at_once()


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Always one rounding, unlike ``tiles``, so that sums are the same on every processor."""
    return call(b, f"llvm.fma.v{LANES}f32", F32.vector, x, y, z)


@op(F32, F32, F32, F32)
def fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x · y + z, rounded once."""
    return _fused(b, x, y, z)


@op(NOTHING, ADDRESS, ADDRESS, types.int64, ADDRESS)
def _project(b: Any, errors: Any, panel: Any, n: Any, out: Any) -> Any:
    """out[c] = Σ_{k < n} errors[k] · panel[k, c] for 16 columns; all f32, errors of 16 rows."""
    for first in range(0, LANES, _COLUMNS):
        columns = range(first, first + _COLUMNS)
        sums = [cgutils.alloca_once(b, F32.vector) for _ in columns]
        for place in sums:
            b.store(F32.vector([0.0] * LANES), place)
        with cgutils.for_range(b, n) as loop:
            at = b.mul(loop.index, I64(4 * LANES))
            lanes = read(b, b.add(errors, at), F32.vector, 4)
            for c, place in zip(columns, sums, strict=True):
                factor = read(b, b.add(b.add(panel, at), I64(4 * c)), FLOAT, 4)
                value = _fused(b, lanes, fill(b, factor, F32.vector), b.load(place))
                b.store(value, place)
        for c, place in zip(columns, sums, strict=True):
            put(b, b.add(out, I64(4 * LANES * c)), b.load(place))
    return VOID


@inline
def _nearest(u: Any, levels: Any, middles: Any, steps: Any, uniform: Any, scratch: Any) -> Any:
    """The level nearest to ``u``, in each lane; of NaN the lowest."""
    if uniform:
        top = np.float32(levels.size - 1)
        v = u - levels[0]
        v = where(v > _ZERO, v, spread(_ZERO))
        return nearest(where(v < top, v, spread(top)), 0, levels.size - 1) + levels[0]
    if levels.size <= _FEW:
        level = spread(levels[0])
        for i in range(middles.size):
            level = level + where(u > middles[i], spread(steps[i]), spread(_ZERO))
        return level
    store(scratch, 0, u)
    for lane in range(LANES):
        scratch[lane] = levels[_place(middles, scratch[lane])]
    return load(scratch, 0)


@kernel
def _place(middles: Any, value: Any) -> Any:
    """How many of the rising ``middles`` are below ``value``."""
    low, high = 0, middles.size
    while low < high:
        middle = (low + high) // 2
        if value > middles[middle]:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _choose(
    weights: Any,
    scale: Any,
    offset: Any,
    levels: Any,
    middles: Any,
    steps: Any,
    uniform: Any,
    by_code: Any,
    ranked: Any,
    order: Any,
    factor: Any,
    hessian: Any,
    sweeps: Any,
    codes: Any,
) -> None:
    """Choose ``codes`` ``[rows, cols]`` anew; they come in as the search left them."""
    rows, cols = weights.shape
    groups = scale.shape[1]
    size = cols // groups
    tiles = (rows + LANES - 1) // LANES
    # By tile, then by column in ``order``, then by row: weights, levels, and errors with the new
    # codes and with those of the search.
    w = np.zeros(tiles * cols * LANES, np.float32)
    chosen = np.zeros(tiles * cols * LANES, np.float32)
    errors = np.zeros(tiles * cols * LANES, np.float32)
    before = np.zeros(tiles * cols * LANES, np.float32)
    # By tile, group and row: scales, their inverses (0 for none), offsets.
    scales = np.zeros(tiles * groups * LANES, np.float32)
    inverses = np.zeros(tiles * groups * LANES, np.float32)
    offsets = np.zeros(tiles * groups * LANES, np.float32)
    for row in range(rows):
        at = row // LANES * groups * LANES + row % LANES
        for g in range(groups):
            s = scale[row, g]
            scales[at + g * LANES] = s
            offsets[at + g * LANES] = offset[row, g]
            if s != _ZERO:
                inverses[at + g * LANES] = _ONE / s
        at = row // LANES * cols * LANES + row % LANES
        for j in range(cols):
            column = order[j]
            g = column // size
            value = weights[row, column]
            w[at + j * LANES] = value
            product = np.float32(scale[row, g] * by_code[codes[row, column]])
            before[at + j * LANES] = value - np.float32(product + offset[row, g])

    total = np.zeros(tiles * LANES, np.float64)
    total_before = np.zeros(tiles * LANES, np.float64)
    panel = np.empty(cols * LANES, np.float32)
    sums = np.empty(LANES * LANES, np.float32)
    scratch = np.empty(LANES, np.float32)
    for first in range(0, cols, LANES):
        _read_panel(factor, first + LANES, first, panel)
        for tile in range(tiles):
            base, row0 = tile * cols * LANES, tile * LANES
            group0 = tile * groups * LANES
            _sum(before, base, panel, first, sums)
            squares = _residue(before, base, panel, first, sums)
            _add(squares, total_before, row0, scratch)
            _sum(errors, base, panel, first, sums)
            squares = spread(_ZERO)
            for c in range(LANES):
                j = first + c
                at, g = base + j * LANES, group0 + order[j] // size * LANES
                line = j * LANES
                corner = panel[line + c]
                x, pushed = load(w, at), load(sums, c * LANES)
                s, o = load(scales, g), load(offsets, g)
                u = (fused(pushed, spread(_ONE / corner), x) - o) * load(inverses, g)
                level = _nearest(u, levels, middles, steps, uniform, scratch)
                error = x - (s * level + o)
                store(chosen, at, level)
                store(errors, at, error)
                left = fused(error, spread(corner), pushed)
                squares = fused(left, left, squares)
                _push(error, panel, line, c, sums)
            _add(squares, total, row0, scratch)

    moved = np.ones(tiles, np.bool_)
    for _ in range(sweeps):
        again = np.zeros(tiles, np.bool_)
        for first in range(0, cols, LANES):
            _read_panel(hessian, cols, first, panel)
            for tile in range(tiles):
                if not moved[tile]:
                    continue
                base, group0 = tile * cols * LANES, tile * groups * LANES
                _sum(errors, base, panel, cols, sums)
                gains = spread(_ZERO)
                for c in range(LANES):
                    j = first + c
                    at, g = base + j * LANES, group0 + order[j] // size * LANES
                    line = j * LANES
                    corner = panel[line + c]
                    x, slope, old = load(w, at), load(sums, c * LANES), load(chosen, at)
                    s, o = load(scales, g), load(offsets, g)
                    value = s * old + o
                    u = (fused(slope, spread(_ONE / corner), value) - o) * load(inverses, g)
                    level = _nearest(u, levels, middles, steps, uniform, scratch)
                    step = (s * level + o) - value
                    gain = step * (_TWO * slope - step * corner)
                    better = gain > _ZERO
                    if lanes_set(better) != 0:
                        again[tile] = True
                        step = where(better, step, spread(_ZERO))
                        gains = gains + where(better, gain, spread(_ZERO))
                        level = where(better, level, old)
                        store(chosen, at, level)
                        store(errors, at, x - (s * level + o))
                        _push(spread(_ZERO) - step, panel, line, c, sums)
                _add(spread(_ZERO) - gains, total, tile * LANES, scratch)
        moved = again

    for row in range(rows):
        if not total[row] < total_before[row]:
            continue
        at = row // LANES * cols * LANES + row % LANES
        for j in range(cols):
            codes[row, order[j]] = ranked[_place(middles, chosen[at + j * LANES])]


@inline
def _read_panel(matrix: Any, n: Any, first: Any, panel: Any) -> None:
    """Sixteen columns of ``matrix``, side by side: rows 0…n."""
    for k in range(n):
        line = matrix[k]
        for c in range(LANES):
            panel[k * LANES + c] = line[first + c]


@inline
def _sum(errors: Any, base: Any, panel: Any, n: Any, sums: Any) -> None:
    """What the first ``n`` errors of a tile add up to in the columns of the panel."""
    here = np.int64(errors.ctypes.data) + 4 * base
    _project(here, np.int64(panel.ctypes.data), n, np.int64(sums.ctypes.data))


@inline
def _push(error: Any, panel: Any, line: Any, c: Any, sums: Any) -> None:
    """Add the error of column ``c`` of the panel to the sums of the columns after it."""
    for later in range(c + 1, LANES):
        at = later * LANES
        store(sums, at, fused(error, spread(panel[line + later]), load(sums, at)))


@inline
def _residue(errors: Any, base: Any, panel: Any, first: Any, sums: Any) -> Any:
    """Σ (E·V)² over the columns of the panel, by row; ``sums`` has the errors before them."""
    squares = spread(_ZERO)
    for c in range(LANES):
        line = (first + c) * LANES
        error = load(errors, base + line)
        left = fused(error, spread(panel[line + c]), load(sums, c * LANES))
        squares = fused(left, left, squares)
        _push(error, panel, line, c, sums)
    return squares


@inline
def _add(lanes: Any, total: Any, row0: Any, scratch: Any) -> None:
    """Add to float64 totals."""
    store(scratch, 0, lanes)
    for k in range(LANES):
        total[row0 + k] += np.float64(scratch[k])
