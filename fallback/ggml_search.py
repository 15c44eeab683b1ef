"""The searches inside ggml's K-quants, sixteen sub-blocks at a time.

``make_qkx2_quants`` (and ``make_qkx3_quants``, the same search with weights given),
``make_qx_quants``, ``make_q3_quants`` and ``make_qp_quants`` of ggml-quants.c (llama.cpp as
vendored by llama-cpp-python 0.3.36), every sum in the same order. A tile is float32 ``[n, 16]``,
flat: weight i of sub-block k is ``tile[16·i + k]``.

The C code keeps the codes of the best trial. They are needed only where the sub-block's scale
rounds to zero, so the searches report how to compute them again instead: the inverse scale and
the offset of the best trial.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.lanes import (
    LANES,
    absolute,
    any_lane,
    as_bits,
    as_float,
    inline,
    inner,
    load,
    nearest,
    spread,
    store,
    where,
)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TENTH = np.float32(0.1)
_MAGIC = np.float32(12582912.0)
_MAGIC_BITS = 0x4B400000
_SIGN = -0x80000000
#: What ``nearest_int`` can give.
_LEAST_INT, _GREATEST_INT = -0x400000, 0x3FFFFF

#: Sub-blocks with no weight above this are zero (GROUP_MAX_EPS).
TINY = np.float32(1e-15)

#: Rows of what a search found, float32 ``[4, 16]``, flat.
SCALE, MINIMUM, INVERSE, OFFSET = 0, LANES, 2 * LANES, 3 * LANES
LARGEST = MINIMUM  # of the symmetric searches, which have no minimum


@inner
def search_affine(
    tile: Any,
    weights: Any,
    levels: Any,
    n: Any,
    top: Any,
    first: Any,
    step: Any,
    steps: Any,
    linear: Any,
    found: Any,
) -> None:
    """``make_qkx2_quants``: x ≈ scale · level - minimum with levels 0…top, minimum ≥ 0.

    Trial t = 0…steps uses the inverse scale (first + step · t + top) / (max - min), where min is
    that of the best trial so far. ``linear`` weighs absolute instead of squared errors.
    ``levels`` is scratch. Fills the rows SCALE, MINIMUM, INVERSE and OFFSET of ``found``.
    """
    x = load(tile, 0)
    sum_w = load(weights, 0)
    sum_x = sum_w * x
    low = x
    high = x
    for i in range(1, n):
        x = load(tile, LANES * i)
        w = load(weights, LANES * i)
        low = where(x < low, x, low)
        high = where(x > high, x, high)
        sum_w = sum_w + w
        sum_x = sum_x + w * x
    low = where(low > _ZERO, spread(_ZERO), low)
    width = np.float32(top)

    # Where all weights are equal the inverse is infinite, hence the scale 0 and every level 0.
    inverse = width / (high - low)
    scale = _ONE / inverse
    error = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        difference = scale * nearest(inverse * (x - low), 0, top) + low - x
        difference = absolute(difference) if linear else difference * difference
        error = error + load(weights, LANES * i) * difference
    best_inverse = inverse
    best_offset = low

    for trial in range(steps + 1):
        inverse = (first + step * np.float32(trial) + width) / (high - low)
        sum_l = spread(_ZERO)
        sum_ll = spread(_ZERO)
        sum_xl = spread(_ZERO)
        for i in range(n):
            x = load(tile, LANES * i)
            level = nearest(inverse * (x - low), 0, top)
            store(levels, LANES * i, level)
            wl = load(weights, LANES * i) * level
            sum_l = sum_l + wl
            sum_ll = sum_ll + wl * level
            sum_xl = sum_xl + wl * x
        determinant = sum_w * sum_ll - sum_l * sum_l
        trial_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        trial_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = trial_low > _ZERO
        trial_scale = where(above, sum_xl / sum_ll, trial_scale)
        trial_low = where(above, spread(_ZERO), trial_low)
        trial_error = spread(_ZERO)
        for i in range(n):
            x = load(tile, LANES * i)
            difference = trial_scale * load(levels, LANES * i) + trial_low - x
            difference = absolute(difference) if linear else difference * difference
            trial_error = trial_error + load(weights, LANES * i) * difference
        better = (determinant > _ZERO) & (trial_error < error)
        best_inverse = where(better, inverse, best_inverse)
        best_offset = where(better, low, best_offset)
        error = where(better, trial_error, error)
        scale = where(better, trial_scale, scale)
        low = where(better, trial_low, low)

    store(found, SCALE, scale)
    store(found, MINIMUM, as_float(as_bits(low) ^ _SIGN))
    store(found, INVERSE, best_inverse)
    store(found, OFFSET, best_offset)


@inner
def signed_largest(tile: Any, n: Any, found: Any) -> Any:
    """The first weight of greatest magnitude, in each lane; LARGEST gets the magnitude."""
    largest = spread(_ZERO)
    extreme = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        size = absolute(x)
        more = size > largest
        largest = where(more, size, largest)
        extreme = where(more, x, extreme)
    store(found, LARGEST, largest)
    return extreme


@inline
def _fit(tile: Any, squares: Any, cubes: Any, n: Any, top: Any, inverse: Any) -> Any:
    """Σ w · x · level and Σ w · level² for the levels that ``inverse`` gives."""
    sum_xl = spread(_ZERO)
    sum_ll = spread(_ZERO)
    for i in range(n):
        level = nearest(inverse * load(tile, LANES * i), -top, top - 1)
        sum_xl = sum_xl + load(cubes, LANES * i) * level
        sum_ll = sum_ll + load(squares, LANES * i) * level * level
    return sum_xl, sum_ll


@inner
def search_symmetric(tile: Any, squares: Any, cubes: Any, n: Any, top: Any, found: Any) -> None:
    """``make_qx_quants``: x ≈ scale · level with levels -top…top-1.

    ``squares`` and ``cubes`` hold the weights of the errors w and w·x; without an importance
    matrix w is x·x, whence the names. Trials use the inverse scales
    -(top + 0.1 · t) / extreme, t = 0, then ±1…±9. Fills SCALE, INVERSE and LARGEST.
    """
    extreme = signed_largest(tile, n, found)
    best_inverse = -np.float32(top) / extreme
    sum_xl, sum_ll = _fit(tile, squares, cubes, n, top, best_inverse)
    scale = where(sum_ll != _ZERO, sum_xl / sum_ll, spread(_ZERO))
    best = scale * sum_xl
    for trial in range(-9, 10):
        if trial == 0:
            continue
        inverse = -(np.float32(top) + _TENTH * np.float32(trial)) / extreme
        sum_xl, sum_ll = _fit(tile, squares, cubes, n, top, inverse)
        better = (sum_ll > _ZERO) & (sum_xl * sum_xl > best * sum_ll)
        scale = where(better, sum_xl / sum_ll, scale)
        best = where(better, scale * sum_xl, best)
        best_inverse = where(better, inverse, best_inverse)
    store(found, SCALE, where(load(found, LARGEST) < TINY, spread(_ZERO), scale))
    store(found, INVERSE, best_inverse)


@inner
def search_descent(
    tile: Any, squares: Any, cubes: Any, levels: Any, n: Any, top: Any, found: Any
) -> None:
    """``make_q3_quants``: as :func:`search_symmetric`, by up to five sweeps of coordinate descent.

    Leaves the levels in ``levels``; fills SCALE and LARGEST.
    """
    extreme = signed_largest(tile, n, found)
    inverse = -np.float32(top) / extreme
    sum_xl = spread(_ZERO)
    sum_ll = spread(_ZERO)
    for i in range(n):
        level = nearest(inverse * load(tile, LANES * i), -top, top - 1)
        store(levels, LANES * i, level)
        sum_xl = sum_xl + load(cubes, LANES * i) * level
        sum_ll = sum_ll + load(squares, LANES * i) * level * level
    for _ in range(5):
        # A lane that a sweep leaves alone stays as it is in the next ones, so all lanes go on
        # until none changes.
        changed = spread(_ZERO) > _ZERO
        for i in range(n):
            square = load(squares, LANES * i)
            cube = load(cubes, LANES * i)
            level = load(levels, LANES * i)
            rest_xl = sum_xl - cube * level
            rest_ll = sum_ll - square * level * level
            other = nearest(load(tile, LANES * i) * rest_ll / rest_xl, -top, top - 1)
            other_xl = rest_xl + cube * other
            other_ll = rest_ll + square * other * other
            better = (
                (rest_xl > _ZERO)
                & (other != level)
                & (other_ll > _ZERO)
                & (other_xl * other_xl * sum_ll > sum_xl * sum_xl * other_ll)
            )
            store(levels, LANES * i, where(better, other, level))
            sum_xl = where(better, other_xl, sum_xl)
            sum_ll = where(better, other_ll, sum_ll)
            changed = changed | better
        if not any_lane(changed):
            break
    scale = where(sum_ll > _ZERO, sum_xl / sum_ll, spread(_ZERO))
    store(found, SCALE, where(load(found, LARGEST) < TINY, spread(_ZERO), scale))


@inline
def _byte(level: Any) -> Any:
    """Integers, as float lanes, modulo 256: what a C ``uint8_t`` keeps of them."""
    return as_float((as_bits(level + _MAGIC) & 0xFF) | _MAGIC_BITS) - _MAGIC


@inner
def search_positive(tile: Any, weights: Any, levels: Any, n: Any, top: Any) -> Any:
    """``make_qp_quants``: x ≈ scale · level with levels 0…top. Returns the scale.

    Trials use the inverse scales (top + 0.1 · t) / max, t = 0, then ±1…±4; up to five sweeps of
    coordinate descent follow. A negative x gives a level that wraps to a large byte; where ggml
    sums, some levels have wrapped and others have not.
    """
    most = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        most = where(most > x, most, x)
    width = np.float32(top)
    inverse = width / most
    scale = _ONE / inverse
    error = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        difference = x - scale * _byte(nearest(inverse * x, _LEAST_INT, _GREATEST_INT))
        error = error + load(weights, LANES * i) * difference * difference
    for trial in range(-4, 5):
        if trial == 0:
            continue
        trial_inverse = (_TENTH * np.float32(trial) + width) / most
        trial_scale = _ONE / trial_inverse
        trial_error = spread(_ZERO)
        for i in range(n):
            x = load(tile, LANES * i)
            difference = x - trial_scale * nearest(trial_inverse * x, _LEAST_INT, top)
            trial_error = trial_error + load(weights, LANES * i) * difference * difference
        better = trial_error < error
        error = where(better, trial_error, error)
        inverse = where(better, trial_inverse, inverse)

    sum_xl = spread(_ZERO)
    sum_ll = spread(_ZERO)
    for i in range(n):
        x = load(tile, LANES * i)
        w = load(weights, LANES * i)
        level = nearest(inverse * x, _LEAST_INT, top)
        store(levels, LANES * i, _byte(level))
        sum_xl = sum_xl + w * x * level
        sum_ll = sum_ll + w * level * level
    for _ in range(5):
        changed = spread(_ZERO) > _ZERO
        for i in range(n):
            x = load(tile, LANES * i)
            w = load(weights, LANES * i)
            level = load(levels, LANES * i)
            rest_xl = sum_xl - w * x * level
            rest_ll = sum_ll - w * level * level
            other = nearest(x * rest_ll / rest_xl, _LEAST_INT, top)
            other_xl = rest_xl + w * x * other
            other_ll = rest_ll + w * other * other
            better = (
                (rest_xl > _ZERO)
                & (rest_ll > _ZERO)
                & (other != level)
                & (other_xl * other_xl * sum_ll > sum_xl * sum_xl * other_ll)
            )
            store(levels, LANES * i, where(better, _byte(other), level))
            sum_xl = where(better, other_xl, sum_xl)
            sum_ll = where(better, other_ll, sum_ll)
            changed = changed | better
        if not any_lane(changed):
            break
    zero = most < TINY
    for i in range(n):
        store(levels, LANES * i, where(zero, spread(_ZERO), load(levels, LANES * i)))
    scale = where(sum_ll > _ZERO, sum_xl / sum_ll, spread(_ZERO))
    return where(zero, spread(_ZERO), scale)
