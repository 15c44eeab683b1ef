"""The quality "fast" for ggml's lattice formats.

IQ3_S and IQ3_XXS: x ≈ d · (2·scale + 1) · level, with one f16 d for 256 weights. The error of a
weight counts the importance of its column alone, and levels are those that decoders read:

1. Of every 32 weights a scale and points are sought as ggml seeks them (``ggml_iq_search``), over a
   wider range of scales; points nearby are compared by the same error.
2. Several d are tried. Each gives the scales nearest to those found; these give the d of least
   squares, which is rounded to f16 and gives the scales to be stored. The least error is kept.
3. Points are chosen again for the scales as stored, and then 2. again, where the error falls.

Importance below a millionth of the mean counts as that much.

IQ2 and IQ1 are written as ggml writes them: there the same search had 17 % less error and yet made
a model worse. Without importance all columns count alike, also where ggml would refuse.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.encodings import GgmlBlock
from mlxedge.fallback.bits import as_input, half, to_half
from mlxedge.fallback.ggml import encode
from mlxedge.fallback.ggml_importance import SPARE, read_weights
from mlxedge.fallback.ggml_iq3 import put_s, put_xxs
from mlxedge.fallback.ggml_iq_maps import lattice
from mlxedge.fallback.ggml_iq_search import (
    AGAIN_THERE,
    TRUE_ODD,
    WIDE,
    Search,
    even_signs,
    finish,
    magnitudes,
    make_search,
)
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import (
    LANES,
    as_bits,
    as_float,
    inner,
    load,
    spread,
    store,
    where,
)
from mlxedge.ops import Parts

BLOCK, SUPER_BLOCK = 32, 256
#: Sub-blocks of a super-block.
_PER = SUPER_BLOCK // BLOCK
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_HALF = np.float32(0.5)
_F16_MAX = np.float32(65504.0)
_HUGE = np.float32(3e38)
_FIFTEEN = np.float32(15.0)
_LEAST_IMPORTANCE = 1e-6
#: d tried: fractions of the d that gives the greatest scale the highest code.
_FRACTIONS = tuple(np.float32(0.9 + 0.03 * i) for i in range(10))
_ROUNDS = 2
_TOP = 15


@inner
def _error(d: Any, xq: Any, qq: Any, first: Any, count: Any, codes: Any) -> Any:
    """Of a super-block: the error, less what no choice changes."""
    error = _ZERO
    for j in range(first, first + count):
        scale = d * np.float32(2 * codes[j] + 1)
        error = error + (qq[j] * scale - _TWO * xq[j]) * scale
    return error


@inner
def _nearest_codes(d: Any, xq: Any, qq: Any, first: Any, count: Any, codes: Any) -> None:
    for j in range(first, first + count):
        code = 0
        if _ZERO < qq[j] < _HUGE and _ZERO < xq[j] < _HUGE:
            code = int(min(np.float32(_TOP), xq[j] / qq[j] / d * _HALF))
        codes[j] = code


@inner
def _fit_d(d: Any, xq: Any, qq: Any, first: Any, count: Any, codes: Any, trial: Any) -> Any:
    """The d and ``codes`` of a super-block with less error than those given, if found."""
    greatest = _ZERO
    for j in range(first, first + count):
        if qq[j] > _ZERO and xq[j] / qq[j] > greatest:
            greatest = xq[j] / qq[j]
    best = _error(d, xq, qq, first, count, codes)
    if not greatest > _ZERO:
        return d
    for fraction in _FRACTIONS:
        here = greatest / np.float32(2 * _TOP + 1) * fraction
        if not here > _ZERO:
            continue
        _nearest_codes(here, xq, qq, first, count, trial)
        over = _ZERO
        under = _ZERO
        for j in range(first, first + count):
            level = np.float32(2 * trial[j] + 1)
            over = over + xq[j] * level
            under = under + qq[j] * level * level
        here = half(to_half(min(over / under, _F16_MAX)))
        if not here > _ZERO:
            continue
        _nearest_codes(here, xq, qq, first, count, trial)
        error = _error(here, xq, qq, first, count, trial)
        if error < best:
            best = error
            d = here
            for j in range(first, first + count):
                codes[j] = trial[j]
    return d


def _make_improve(search: Search) -> Any:
    """Steps 2 and 3, which change ``kept`` and fill ``codes`` and ``steps``: each d."""
    choose, fit = search.choose, search.fit

    @inner
    def improve(
        tile: Any,
        weights: Any,
        roots: Any,
        words: Any,
        numbers: Any,
        kept: Any,
        scales: Any,
        xq: Any,
        qq: Any,
        count: Any,
        codes: Any,
        trial: Any,
        steps: Any,
        lists: Any,
    ) -> None:
        sum_xq, sum_qq = fit(tile, weights, kept)
        store(xq, 0, sum_xq)
        store(qq, 0, sum_qq)
        for j in range(LANES):
            codes[j] = 0
        for b in range(count // _PER):
            steps[b] = _fit_d(_ZERO, xq, qq, _PER * b, _PER, codes, trial)
        for _ in range(_ROUNDS):
            for j in range(LANES):
                scales[j] = steps[j // _PER] * np.float32(2 * codes[j] + 1)
            scale = load(scales, 0)
            inverse = where(scale > _ZERO, _ONE / scale, spread(_ZERO))
            choose(tile, roots, tile, words, numbers, scales, inverse, scale, count, lists)
            new_xq, new_qq = fit(tile, weights, words)
            old_xq, old_qq = load(xq, 0), load(qq, 0)
            better = (new_qq * scale - _TWO * new_xq) * scale < (
                old_qq * scale - _TWO * old_xq
            ) * scale
            for k in range(8):
                word = as_bits(load(words, LANES * k)) & 0xFFFF
                word = where(better, word, as_bits(load(kept, LANES * k)))
                store(kept, LANES * k, as_float(word))
            store(xq, 0, where(better, new_xq, old_xq))
            store(qq, 0, where(better, new_qq, old_qq))
            for b in range(count // _PER):
                steps[b] = _fit_d(steps[b], xq, qq, _PER * b, _PER, codes, trial)

    return improve


_ODD = make_search(BLOCK, 3, -10, 14, 0.4, AGAIN_THERE, TRUE_ODD)
_WIDE = make_search(BLOCK, 3, -10, 14, 0.4, AGAIN_THERE, WIDE)
_search_s, _improve_s = _ODD.search, _make_improve(_ODD)
_search_xxs, _improve_xxs = _WIDE.search, _make_improve(_WIDE)


@kernel
def _encode(
    x: Any, importance: Any, cols: Any, ids: Any, lists: Any, signed: Any, out: Any
) -> None:
    """IQ3_S (``signed``: all signs are stored) or IQ3_XXS."""
    tile = np.empty(BLOCK * LANES, np.float32)
    weights = np.empty(BLOCK * LANES, np.float32)
    roots = np.empty(BLOCK * LANES, np.float32)
    words = np.empty(8 * LANES, np.float32)
    kept = np.empty(8 * LANES, np.float32)
    signs = np.empty(4 * LANES, np.float32)
    scales = np.empty(LANES, np.float32)
    present = np.ones(LANES, np.float32)
    xq = np.empty(LANES, np.float32)
    qq = np.empty(LANES, np.float32)
    steps = np.zeros(2, np.float32)
    codes = np.empty(LANES, np.int64)
    trial = np.empty(LANES, np.int64)
    numbers, chosen = words.view(np.int32), kept.view(np.int32)
    sign_words = signs.view(np.int32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, 2):
        lanes = _PER * min(2, blocks - first)
        start = SUPER_BLOCK * first
        read_weights(x, start, BLOCK, lanes, tile)
        read_weights(importance, start % cols, BLOCK, lanes, weights)
        largest = magnitudes(tile, BLOCK, signs)
        if not signed:
            largest = even_signs(tile, weights, BLOCK, signs)
        zero = (largest < _ZERO) | (largest == _ZERO)
        largest = where(zero, spread(_ONE), largest)
        guess = largest / _FIFTEEN
        if signed:
            scale = _search_s(
                tile, weights, roots, tile, words, numbers, kept, scales, largest, guess, lanes,
                lists,
            )  # fmt: skip
        else:
            scale = _search_xxs(
                tile, weights, roots, tile, words, numbers, kept, scales, largest, guess, lanes,
                lists,
            )  # fmt: skip
        finish(8, 4, scale, zero | (scale < _ZERO), 0, kept, signs)
        if signed:
            _improve_s(
                tile, weights, roots, words, numbers, kept, scales, xq, qq, lanes, codes, trial,
                steps, lists,
            )  # fmt: skip
        else:
            _improve_xxs(
                tile, weights, roots, words, numbers, kept, scales, xq, qq, lanes, codes, trial,
                steps, lists,
            )  # fmt: skip
        for b in range(lanes // _PER):
            d, lane, block = steps[b], _PER * b, first + b
            if signed:
                put_s(chosen, sign_words, ids, codes, present, lane, d, d, out, 110 * block)
            else:
                put_xxs(chosen, sign_words, ids, codes, lane, d, d, out, 98 * block)


def _columns(importance: np.ndarray, cols: int) -> np.ndarray:
    """Importance about 1, none of it zero, and ``SPARE`` more from the start again."""
    exact = importance.astype(np.float64) if importance.any() else np.ones(cols)
    least = _LEAST_IMPORTANCE * exact.mean()
    weights = (np.maximum(exact, least) / exact.mean()).astype(np.float32)
    return as_input(np.resize(weights, cols + SPARE))


def search(weights: np.ndarray, encoding: GgmlBlock, importance: np.ndarray | None) -> Parts:
    """Encode ``weights``, f32 ``[rows, cols]``, heeding importance f32 ``[cols]`` or None."""
    cols = weights.shape[1]
    if importance is None:
        importance = np.ones(cols, np.float32)
    if encoding.name not in ("iq3_s", "iq3_xxs"):
        return encode(weights, encoding, importance)
    tables, signed = lattice(encoding.name), encoding.name == "iq3_s"
    levels = 2 * tables.levels if signed else 2 * tables.levels + (tables.levels == 15)
    lists = (tables.lists, tables.words, as_input(levels.astype(np.int8)), tables.masks)
    out = np.empty(encoding.parts(weights.shape)["weight"].shape, np.uint8)
    columns = _columns(importance, cols)
    _encode(
        as_input(weights).reshape(-1), columns, cols, tables.ids, lists, signed, out.reshape(-1)
    )
    return {"weight": out}
