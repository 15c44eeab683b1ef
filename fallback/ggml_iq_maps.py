"""The lattices of ggml's IQ1, IQ2 and IQ3 formats, as their encoders need them.

A format's codes are few points of a lattice: of eight numbers with 3 levels each (IQ1, IQ2) or of
four with 8 (IQ3). The numbers of such a point, packed side by side with the first lowest, are its
*word*. Encoders round to any word; one that the format lacks has a list of points nearby, the best
of which takes its place. The lists are those of ``iq2xs_init_impl`` and ``iq3xs_init_impl``
(ggml-quants.c, llama.cpp as vendored by llama-cpp-python 0.3.36): all points at the one, two or
three least distances, nearest first. The points come from the ``gguf`` package.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from mlxedge.fallback.jit import kernel

#: Points are searched in runs of this many; a list is filled up with its first point.
RUN = 16
#: Numbers of runs fit in the low byte of an entry of ``Lattice.lists``.
RUN_BITS = 8

_I32 = np.int32


class _Kind(NamedTuple):
    source: str  # the class of gguf.quants
    bits: int
    levels: int
    distances: int


_KINDS = {
    "iq3_s": _Kind("IQ3_S", 3, 8, 3),
    "iq3_xxs": _Kind("IQ3_XXS", 3, 8, 2),
    "iq2_s": _Kind("IQ2_S", 2, 3, 1),
    "iq2_xs": _Kind("IQ2_XS", 2, 3, 2),
    "iq2_xxs": _Kind("IQ2_XXS", 2, 3, 2),
    "iq1_s": _Kind("IQ1_S", 2, 3, 3),
    "iq1_m": _Kind("IQ1_S", 2, 3, 3),
}


class Lattice(NamedTuple):
    """Read-only tables of a format, by word, or of runs of 16 points nearby.

    ``ids`` int16 ``[words]``: the number of the point, -1 if it is none.
    ``lists`` int32 ``[words]``: -1 for points; else the first run times 256, plus how many runs.
    ``words`` uint16 ``[runs · 16]``: the points nearby.
    ``levels`` int8 ``[runs · dims · 16]``: their numbers 2·code + 1, by dimension.
    ``masks`` uint16 ``[runs · 2 · dims]``: bit j of number i is set if code i of point j is not 0;
    then, if it is 2. Of use where codes are 0, 1 and 2.
    ``points`` uint16 ``[points]``: their words, in order.
    """

    ids: np.ndarray
    lists: np.ndarray
    words: np.ndarray
    levels: np.ndarray
    masks: np.ndarray
    points: np.ndarray


@kernel
def _find_lists(
    codes: Any, bits: Any, levels: Any, distances: Any, index: Any, lists: Any, words: Any
) -> int:
    """Fill ``lists`` and, where it is long enough, ``words``; the runs needed.

    ``codes`` int16 ``[dims, points]``.
    """
    dims, count = codes.shape
    apart = np.empty(count, np.int16)
    runs = 0
    for word in range(index.size):
        lists[word] = -1
        valid = index[word] < 0
        for i in range(dims):
            valid = valid and (word >> (bits * i)) & ((1 << bits) - 1) < levels
        if not valid:
            continue
        for j in range(count):
            apart[j] = 0
        for i in range(dims):
            code = np.int16((word >> (bits * i)) & ((1 << bits) - 1))
            row = codes[i]
            for j in range(count):
                step = np.int16(row[j] - code)
                apart[j] += step * step
        at = RUN * runs
        first = at
        limit = np.int16(-1)
        for _ in range(distances):
            nearest = np.int16(32767)
            for j in range(count):
                if limit < apart[j] < nearest:
                    nearest = apart[j]
            limit = nearest
            for j in range(count):
                if apart[j] == nearest:
                    if at < words.size:
                        point = 0
                        for i in range(dims):
                            point |= _I32(codes[i, j]) << (bits * i)
                        words[at] = point
                    at += 1
        used = (at - first + RUN - 1) // RUN
        lists[word] = runs << RUN_BITS | used
        runs += used
        if RUN * runs <= words.size:
            for j in range(at, RUN * runs):
                words[j] = words[first]
    return runs


@functools.cache
def lattice(name: str) -> Lattice:
    """The tables of ``name``, made at the first call."""
    import gguf.quants

    kind = _KINDS[name]
    source = getattr(gguf.quants, kind.source)
    source.init_grid()
    grid = source.grid.reshape(-1, source.grid.shape[-1])
    codes = np.searchsorted(np.unique(grid), grid).astype(np.int16)
    dims = codes.shape[1]
    shifts = kind.bits * np.arange(dims)
    points = (codes.astype(np.int32) << shifts).sum(1).astype(np.uint16)
    ids = np.full(1 << kind.bits * dims, -1, np.int16)
    ids[points] = np.arange(len(points))
    lists = np.empty(ids.size, np.int32)
    by_dimension = np.ascontiguousarray(codes.T)
    arguments = by_dimension, kind.bits, kind.levels, kind.distances, ids, lists
    runs = _find_lists(*arguments, np.empty(0, np.uint16))
    words = np.empty(RUN * runs, np.uint16)
    _find_lists(*arguments, words)
    codes_near = words.reshape(runs, 1, RUN) >> shifts[:, None] & (1 << kind.bits) - 1
    bit = (1 << np.arange(RUN)).astype(np.int64)
    masks = np.stack([((codes_near > least) * bit).sum(-1) for least in (0, 1)], 1)
    tables = Lattice(
        ids,
        lists,
        words,
        (2 * codes_near + 1).astype(np.int8).ravel(),
        masks.astype(np.uint16).ravel(),
        points,
    )
    for table in tables:
        table.flags.writeable = False
    return tables
