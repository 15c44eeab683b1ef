"""Encoders of ggml's 2-bit lattice formats: IQ2_S, IQ2_XS and IQ2_XXS.

Byte for byte ``quantize_iq2_s``, ``quantize_iq2_xs`` and ``quantize_iq2_xxs`` of ggml-quants.c
(llama.cpp as vendored by llama-cpp-python 0.3.36) where the C compiler does not contract multiply
and add. Eight weights are a point of a lattice times a scale, and their signs; IQ2_XS and IQ2_XXS
store seven signs, so an even number of the eight must be negative.

The importance of columns is as in ``ggml_importance``; σ² is the mean square of the super-block
(IQ2_S: twice that). Only IQ2_S can do without: the error of x then counts σ²/4 + x².
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.ggml_importance import sum_squares
from mlxedge.fallback.ggml_iq_maps import lattice
from mlxedge.fallback.ggml_iq_search import (
    AGAIN_ALWAYS,
    AGAIN_THERE,
    SQUARE_AND_VARIANCE,
    even_signs,
    finish,
    magnitudes,
    make_search,
    read_sub_blocks,
)
from mlxedge.fallback.ggml_k import nearest_int
from mlxedge.fallback.ggml_search import TINY, search_positive
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import LANES, inline, inner, load, put_half, spread, store, where

SUPER_BLOCK = 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_TWO = np.float32(2.0)
_THREE = np.float32(3.0)
_FIVE = np.float32(5.0)
_SIZE = np.float32(SUPER_BLOCK)
_SCALES = np.float32(31.0)
#: Sub-blocks of IQ2_S with no weight above this are zero (GROUP_MAX_EPS_IQ2_S), and the factor of
#: its d.
_TINY_S, _FACTOR_S = np.float32(1e-8), np.float32(0.9875)

_search_16 = make_search(16, 2, -9, 9, 0.1, AGAIN_THERE).search
_search_32 = make_search(32, 2, -6, 6, 0.1, AGAIN_ALWAYS).search


@inline
def scale_code(inverse: Any, scale: Any, top: Any) -> Any:
    """The code l of a scale that is stored as (2·l + 1) / 2 units."""
    return max(0, min(top, nearest_int(_HALF * (inverse * scale - _ONE))))


@inline
def clear(out: Any, at: Any, count: Any) -> None:
    for i in range(at, at + count):
        out[i] = 0


@inner
def greatest_of(found: Any, first: Any, count: Any) -> Any:
    greatest = _ZERO
    for j in range(first, first + count):
        greatest = greatest if greatest > found[j] else found[j]
    return greatest


@inner
def code_scales(found: Any, first: Any, count: Any, top: Any, units: Any, codes: Any) -> Any:
    """Fill ``codes`` of the scales; the greatest of these, and d: that in ``units``."""
    greatest = greatest_of(found, first, count)
    d = greatest / units
    inverse = _ONE / d if greatest != _ZERO else _ZERO
    for j in range(first, first + count):
        codes[j] = scale_code(inverse, found[j], top)
    return greatest, d


@inner
def put_s(
    numbers: Any, signs: Any, ids: Any, codes: Any, greatest: Any, d: Any, out: Any, at: Any
) -> None:
    """Write an IQ2_S block: f16 d, 32 low bytes of points, 32 of signs, 8 of high bits, scales."""
    clear(out, at, 82)
    for j in range(16):
        for k in range(2):
            point = ids[numbers[LANES * k + j]]
            out[at + 2 + 2 * j + k] = point & 255
            out[at + 34 + 2 * j + k] = signs[LANES * k + j]
            out[at + 66 + j // 2] |= point >> 8 << 2 * (2 * (j % 2) + k)
    if greatest == _ZERO:
        return
    put_half(out, at, d)
    for j in range(8):
        out[at + 74 + j] = codes[2 * j] | codes[2 * j + 1] << 4


@inner
def put_xs(
    numbers: Any, signs: Any, ids: Any, codes: Any, greatest: Any, d: Any, out: Any, at: Any
) -> None:
    """Write an IQ2_XS block: f16 d, 32 of 9 bits of point and 7 signs, scales."""
    clear(out, at, 74)
    if greatest == _ZERO:
        return
    for j in range(16):
        for k in range(2):
            code = ids[numbers[LANES * k + j]] | signs[LANES * k + j] << 9
            out[at + 2 + 4 * j + 2 * k] = code & 255
            out[at + 3 + 4 * j + 2 * k] = code >> 8
    put_half(out, at, d)
    for j in range(8):
        out[at + 66 + j] = codes[2 * j] | codes[2 * j + 1] << 4


@inner
def put_xxs(
    numbers: Any,
    signs: Any,
    ids: Any,
    codes: Any,
    lane: Any,
    greatest: Any,
    d: Any,
    out: Any,
    at: Any,
) -> None:
    """Write an IQ2_XXS block: f16 d, 8 of 4 points and 4 x 7 signs with a scale."""
    clear(out, at, 66)
    if greatest == _ZERO:
        return
    put_half(out, at, d)
    for j in range(8):
        base = at + 2 + 8 * j
        word = codes[lane + j] << 28
        for k in range(4):
            out[base + k] = ids[numbers[LANES * k + lane + j]]
            word |= signs[LANES * k + lane + j] << 7 * k
        for k in range(4):
            out[base + 4 + k] = word >> 8 * k & 255


@kernel
def _encode_16(
    x: Any, importance: Any, cols: Any, ids: Any, lists: Any, signed: Any, out: Any
) -> None:
    """IQ2_S (``signed``: all signs are stored) or IQ2_XS."""
    tile = np.empty(16 * LANES, np.float32)
    weights = np.empty(16 * LANES, np.float32)
    roots = np.empty(16 * LANES, np.float32)
    costs = np.empty(3 * 16 * LANES, np.float32)
    words = np.empty(2 * LANES, np.float32)
    kept = np.empty(2 * LANES, np.float32)
    signs = np.empty(2 * LANES, np.float32)
    found = np.empty(LANES, np.float32)
    codes = np.empty(LANES, np.int64)
    variances = np.empty(LANES, np.float32)
    numbers, chosen = words.view(np.int32), kept.view(np.int32)
    sign_words = signs.view(np.int32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        group = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        squares = sum_squares(x, start, SUPER_BLOCK, group, SUPER_BLOCK, tile)
        if signed:
            squares = _TWO * squares
        store(variances, 0, squares / _SIZE)
        for b in range(group):
            here, column = start + SUPER_BLOCK * b, start % cols + SUPER_BLOCK * b
            read_sub_blocks(
                x,
                importance,
                here,
                column,
                16,
                16,
                spread(variances[b]),
                SQUARE_AND_VARIANCE,
                tile,
                weights,
            )
            largest = magnitudes(tile, 16, signs)
            if not signed:
                largest = even_signs(tile, weights, 16, signs)
            scale = _search_16(
                tile,
                weights,
                roots,
                costs,
                words,
                numbers,
                kept,
                found,
                largest,
                largest / _FIVE,
                16,
                lists,
            )
            zero = largest < (_TINY_S if signed else TINY)
            store(found, 0, finish(2, 2, scale, zero, 255 if signed else 127, kept, signs))
            greatest, d = code_scales(found, 0, 16, 15, _SCALES, codes)
            block = first + b
            if signed:
                d = d * _FACTOR_S
                put_s(chosen, sign_words, ids, codes, greatest, d, out, 82 * block)
            else:
                put_xs(chosen, sign_words, ids, codes, greatest, d, out, 74 * block)


@kernel
def _encode_xxs(x: Any, importance: Any, cols: Any, ids: Any, lists: Any, out: Any) -> None:
    tile = np.empty(32 * LANES, np.float32)
    weights = np.empty(32 * LANES, np.float32)
    roots = np.empty(32 * LANES, np.float32)
    costs = np.empty(3 * 32 * LANES, np.float32)
    words = np.empty(4 * LANES, np.float32)
    kept = np.empty(4 * LANES, np.float32)
    signs = np.empty(4 * LANES, np.float32)
    found = np.empty(LANES, np.float32)
    codes = np.empty(LANES, np.int64)
    variances = np.empty(LANES, np.float32)
    of_lane = np.empty(LANES, np.float32)
    numbers, chosen = words.view(np.int32), kept.view(np.int32)
    sign_words = signs.view(np.int32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        group = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        squares = sum_squares(x, start, SUPER_BLOCK, group, SUPER_BLOCK, tile)
        store(variances, 0, squares / _SIZE)
        for pair in range(0, group, 2):
            count = min(2, group - pair)
            here, column = start + SUPER_BLOCK * pair, start % cols + SUPER_BLOCK * pair
            for k in range(LANES):
                of_lane[k] = variances[pair + k // 8]
            variance = load(of_lane, 0)
            read_sub_blocks(
                x,
                importance,
                here,
                column,
                32,
                8 * count,
                variance,
                SQUARE_AND_VARIANCE,
                tile,
                weights,
            )
            magnitudes(tile, 32, signs)
            largest = even_signs(tile, weights, 32, signs)
            guess = search_positive(tile, weights, costs, 32, 4)
            spread_out = guess * _THREE
            zero = (largest < TINY) | (spread_out < _ZERO) | (spread_out == _ZERO)
            scale = _search_32(
                tile,
                weights,
                roots,
                costs,
                words,
                numbers,
                kept,
                found,
                where(zero, spread(_ONE), spread_out),
                guess,
                8 * count,
                lists,
            )
            store(found, 0, finish(4, 4, scale, zero, 127, kept, signs))
            for b in range(count):
                greatest, d = code_scales(found, 8 * b, 8, 15, _SCALES, codes)
                at = 66 * (first + pair + b)
                put_xxs(chosen, sign_words, ids, codes, 8 * b, greatest, d, out, at)


def encode_iq2_s(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq2_s")
    _encode_16(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), True, out)


def encode_iq2_xs(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq2_xs")
    _encode_16(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), False, out)


def encode_iq2_xxs(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq2_xxs")
    _encode_xxs(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), out)
