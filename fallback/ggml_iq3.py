"""Encoders of ggml's 3-bit lattice formats: IQ3_S and IQ3_XXS.

Byte for byte ``quantize_iq3_s`` and ``quantize_iq3_xxs`` of ggml-quants.c (llama.cpp as vendored by
llama-cpp-python 0.3.36) where the C compiler does not contract multiply and add. Four weights are
a point of a lattice times a scale, and their signs; IQ3_XXS stores seven signs of eight weights, so
an even number of them must be negative.

The importance of columns is as in ``ggml_importance``; σ² is twice the mean square of the
super-block. Without importance the error of x counts x².
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.ggml_importance import sum_squares
from mlxedge.fallback.ggml_iq2 import clear, code_scales
from mlxedge.fallback.ggml_iq_maps import lattice
from mlxedge.fallback.ggml_iq_search import (
    AGAIN_THERE,
    AGAIN_THROUGHOUT,
    SQUARE,
    even_signs,
    finish,
    magnitudes,
    make_search,
    read_sub_blocks,
)
from mlxedge.fallback.jit import kernel
from mlxedge.fallback.lanes import LANES, inner, load, put_half, store

BLOCK, SUPER_BLOCK = 32, 256
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_FIFTEEN = np.float32(15.0)
_SIZE = np.float32(SUPER_BLOCK)
_SCALES = np.float32(31.0)
#: Sub-blocks of IQ3_XXS with no weight above this are zero (GROUP_MAX_EPS_IQ3_XXS).
_TINY_XXS = np.float32(1e-8)
#: Of d.
_FACTOR_S, _FACTOR_XXS = np.float32(1.033), np.float32(1.0125)

_search_s = make_search(32, 3, -9, 9, 0.2, AGAIN_THROUGHOUT).search
_search_xxs = make_search(32, 3, -15, 15, 0.2, AGAIN_THERE).search


@inner
def put_s(
    numbers: Any,
    signs: Any,
    ids: Any,
    codes: Any,
    tops: Any,
    lane: Any,
    greatest: Any,
    d: Any,
    out: Any,
    at: Any,
) -> None:
    """Write an IQ3_S block: f16 d, 64 low bytes of points, 8 of high bits, 32 of signs, scales.

    ``tops``: the largest magnitudes. ggml leaves no place for the points and signs of sub-blocks
    that are all zero, so those of later ones are read as theirs.
    """
    clear(out, at, 110)
    low, sign = at + 2, at + 74
    for j in range(8):
        if tops[lane + j] == _ZERO:
            continue
        for k in range(8):
            point = ids[numbers[LANES * k + lane + j]]
            out[low + k] = point & 255
            out[at + 66 + j] |= point >> 8 << k
        for k in range(4):
            out[sign + k] = signs[LANES * k + lane + j]
        low += 8
        sign += 4
    if greatest == _ZERO:
        return
    put_half(out, at, d)
    for j in range(4):
        out[at + 106 + j] = codes[lane + 2 * j] | codes[lane + 2 * j + 1] << 4


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
    """Write an IQ3_XXS block: f16 d, 64 points, 8 of 4 x 7 signs and a scale."""
    clear(out, at, 98)
    if greatest == _ZERO:
        return
    put_half(out, at, d)
    for j in range(8):
        word = codes[lane + j] << 28
        for k in range(8):
            out[at + 2 + 8 * j + k] = ids[numbers[LANES * k + lane + j]]
        for k in range(4):
            word |= signs[LANES * k + lane + j] << 7 * k
        for k in range(4):
            out[at + 66 + 4 * j + k] = word >> 8 * k & 255


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
    found = np.empty(LANES, np.float32)
    codes = np.empty(LANES, np.int64)
    variances = np.empty(LANES, np.float32)
    of_lane = np.empty(LANES, np.float32)
    tops = np.empty(LANES, np.float32)
    numbers, chosen = words.view(np.int32), kept.view(np.int32)
    sign_words = signs.view(np.int32)
    blocks = x.size // SUPER_BLOCK
    for first in range(0, blocks, LANES):
        group = min(LANES, blocks - first)
        start = SUPER_BLOCK * first
        squares = sum_squares(x, start, SUPER_BLOCK, group, SUPER_BLOCK, tile)
        store(variances, 0, _TWO * squares / _SIZE)
        for pair in range(0, group, 2):
            count = min(2, group - pair)
            lanes = 8 * count
            here, column = start + SUPER_BLOCK * pair, start % cols + SUPER_BLOCK * pair
            for k in range(LANES):
                of_lane[k] = variances[pair + k // 8]
            variance = load(of_lane, 0)
            read_sub_blocks(
                x, importance, here, column, BLOCK, lanes, variance, SQUARE, tile, weights
            )
            largest = magnitudes(tile, BLOCK, signs)
            store(tops, 0, largest)
            if signed:
                zero = largest == _ZERO
                scale = _search_s(
                    tile,
                    weights,
                    roots,
                    tile,
                    words,
                    numbers,
                    kept,
                    found,
                    largest,
                    largest / _FIFTEEN,
                    lanes,
                    lists,
                )
            else:
                largest = even_signs(tile, weights, BLOCK, signs)
                zero = largest < _TINY_XXS
                scale = _search_xxs(
                    tile,
                    weights,
                    roots,
                    tile,
                    words,
                    numbers,
                    kept,
                    found,
                    largest,
                    largest / _FIFTEEN,
                    lanes,
                    lists,
                )
            store(found, 0, finish(8, 4, scale, zero, 255 if signed else 127, kept, signs))
            for b in range(count):
                block = first + pair + b
                greatest, d = code_scales(found, 8 * b, 8, 15, _SCALES, codes)
                if signed:
                    d, at = d * _FACTOR_S, 110 * block
                    put_s(chosen, sign_words, ids, codes, tops, 8 * b, greatest, d, out, at)
                else:
                    d, at = d * _FACTOR_XXS, 98 * block
                    put_xxs(chosen, sign_words, ids, codes, 8 * b, greatest, d, out, at)


def encode_iq3_s(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq3_s")
    _encode(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), True, out)


def encode_iq3_xxs(x: np.ndarray, importance: np.ndarray, cols: int, out: np.ndarray) -> None:
    t = lattice("iq3_xxs")
    _encode(x, importance, cols, t.ids, (t.lists, t.words, t.levels, t.masks), False, out)
