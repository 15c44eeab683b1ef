"""Products of small matrices held in registers, and the float functions of a forward pass.

Here sums may be fused and reordered; nothing in this module makes bytes of a file.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mlxedge.fallback.lanes import F32, I32, LANES
from mlxedge.fallback.memory import (
    ADDRESS,
    FLOAT,
    I64,
    NOTHING,
    VOID,
    call,
    op,
    read,
    spread,
    target,
    write,
)


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    return call(b, f"llvm.fmuladd.v{x.type.count}f32", x.type, x, y, z)


def _sum(b: Any, v: Any) -> Any:
    start = ir.Constant(FLOAT, -0.0)
    name = f"llvm.vector.reduce.fadd.v{v.type.count}f32"
    return call(b, name, FLOAT, start, v, fastmath=("reassoc",))


def _fill(value: float, kind: Any = F32.vector) -> Any:
    return kind([value] * kind.count)


@op(F32)
def zeros(b: Any) -> Any:
    return _fill(0.0)


@op(F32, F32, F32, F32)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x · y + z, fused where the processor can."""
    return _fused(b, x, y, z)


@op(types.float32, F32)
def total(b: Any, v: Any) -> Any:
    """The sum of the lanes."""
    return _sum(b, v)


@op(types.float32, F32)
def highest(b: Any, v: Any) -> Any:
    """The largest lane; lanes must not be NaN."""
    return call(b, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, v, fastmath=("nnan",))


@op(F32, F32, types.int64, types.int64, types.float32)
def keep_lanes(b: Any, v: Any, first: Any, stop: Any, other: Any) -> Any:
    """``v`` in lanes ``first <= lane < stop``, ``other`` elsewhere."""
    lane = I32.vector(list(range(LANES)))
    low, high = (spread(b, b.trunc(n, ir.IntType(32)), I32.vector) for n in (first, stop))
    inside = b.and_(b.icmp_signed(">=", lane, low), b.icmp_signed("<", lane, high))
    return b.select(inside, v, spread(b, other, F32.vector))


@op(F32, I32)
def to_float(b: Any, v: Any) -> Any:
    return b.sitofp(v, F32.vector)


#: e^r for |r| <= ln 2 / 2, minus its first two terms: Cephes' ``expf``.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


@op(F32, F32)
def exp(b: Any, x: Any) -> Any:
    """e^x to about 1e-7 relative; 0 below -87, and not beyond 88.

    Cephes' method: the remainder of x by ln 2 (held in two parts) through a polynomial, the power
    of two put into the exponent bits.
    """
    floor, ceiling = _fill(-87.0), _fill(88.0)
    alive = b.fcmp_ordered(">", x, floor)
    x = b.select(alive, x, floor)
    x = b.select(b.fcmp_ordered("<", x, ceiling), x, ceiling)
    n = call(b, f"llvm.rint.v{LANES}f32", F32.vector, b.fmul(x, _fill(1.4426950408889634)))
    r = _fused(b, n, _fill(-0.693359375), x)
    r = _fused(b, n, _fill(2.12194440e-4), r)
    y = _fill(_EXP[0])
    for coefficient in _EXP[1:]:
        y = _fused(b, y, r, _fill(coefficient))
    y = b.fadd(_fused(b, b.fmul(r, r), y, r), _fill(1.0))
    biased = b.add(b.fptosi(n, I32.vector), I32.vector([127] * LANES))
    power = b.bitcast(b.shl(biased, I32.vector([23] * LANES)), F32.vector)
    return b.select(alive, b.fmul(y, power), _fill(0.0))


def _tile_shape() -> tuple[int, int, int]:
    """(lanes, rows, columns) of a tile whose sums fit the processor's registers."""
    features = target()[1]
    if "+avx512f" in features:
        return 16, 4, 4
    if "+avx," in features:
        return 8, 4, 2
    return 4, 4, 4


TILE_LANES, TILE_ROWS, TILE_COLS = _tile_shape()


@op(NOTHING, ADDRESS, types.int64, ADDRESS, types.int64, types.int64, ADDRESS, types.int64)
def dot_tile(b: Any, w: Any, w_row: Any, x: Any, x_row: Any, n: Any, out: Any, out_row: Any) -> Any:
    """out[c, r] = Σ_k w[r, k] · x[c, k] for ``TILE_ROWS`` rows of w and ``TILE_COLS`` of x.

    All f32, with ``n`` (a multiple of ``LANES``) columns, and rows ``*_row`` bytes apart.
    """
    vector = ir.VectorType(FLOAT, TILE_LANES)
    cells = [(r, c) for r in range(TILE_ROWS) for c in range(TILE_COLS)]
    sums = {cell: cgutils.alloca_once(b, vector) for cell in cells}
    for cell in cells:
        b.store(_fill(0.0, vector), sums[cell])
    ws = [b.add(w, b.mul(w_row, I64(r))) for r in range(TILE_ROWS)]
    xs = [b.add(x, b.mul(x_row, I64(c))) for c in range(TILE_COLS)]
    with cgutils.for_range(b, b.udiv(n, I64(TILE_LANES))) as loop:
        at = b.mul(loop.index, I64(4 * TILE_LANES))
        columns = [read(b, b.add(p, at), vector, 4) for p in xs]
        for r, p in enumerate(ws):
            weights = read(b, b.add(p, at), vector, 4)
            for c, values in enumerate(columns):
                b.store(_fused(b, weights, values, b.load(sums[r, c])), sums[r, c])
    for r, c in cells:
        place = b.add(b.add(out, b.mul(out_row, I64(c))), I64(4 * r))
        write(b, place, _sum(b, b.load(sums[r, c])))
    return VOID


def _make_outer_tile(rows: int, vectors: int) -> Any:
    @op(NOTHING, *[types.int64] * 8)
    def outer_tile(
        b: Any, a: Any, a_row: Any, v: Any, v_step: Any, v_col: Any, n: Any, out: Any, out_row: Any
    ) -> Any:
        cells = [(r, c) for r in range(rows) for c in range(vectors)]
        sums = {cell: cgutils.alloca_once(b, F32.vector) for cell in cells}
        for cell in cells:
            b.store(_fill(0.0), sums[cell])
        with cgutils.for_range(b, n) as loop:
            base = b.add(v, b.mul(loop.index, v_step))
            values = [
                read(b, b.add(base, b.mul(v_col, I64(c))), F32.vector, 4) for c in range(vectors)
            ]
            for r in range(rows):
                at = b.add(b.add(a, b.mul(a_row, I64(r))), b.mul(loop.index, I64(4)))
                factor = spread(b, read(b, at, FLOAT, 4), F32.vector)
                for c in range(vectors):
                    b.store(_fused(b, factor, values[c], b.load(sums[r, c])), sums[r, c])
        for r, c in cells:
            place = b.add(b.add(out, b.mul(out_row, I64(r))), I64(4 * LANES * c))
            write(b, place, b.load(sums[r, c]))
        return VOID

    return outer_tile


#: out[r] = Σ_k a[r, k] · v[k] for 1 or 4 rows of ``a`` and vectors side by side.
#: Arguments: a, bytes to its next row; v, bytes to its next k and to its next vector; number of k;
#: out, bytes to its next row.
outer_1x1, outer_1x4 = _make_outer_tile(1, 1), _make_outer_tile(1, 4)
outer_4x1, outer_4x4 = _make_outer_tile(4, 1), _make_outer_tile(4, 4)
