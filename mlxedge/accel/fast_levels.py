"""Searches for formats whose blocks have one stored scale and a fixed table of levels, on MLX.

The fallback's module of the same name tells what is searched, and how; every operation here is one
of its operations, on ``[position, row, block]``. The functions that ``mx.compile`` may fuse follow
the rules of ``k_search``: products that meet a sum pass through ``one``, and constants of more than
seven digits come in as arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlxedge.accel.arrays import MAGIC, first_absmax, join_fields, pack_stream
from mlxedge.accel.casts import DTYPES
from mlxedge.accel.ggml_legacy import _fifth_bits, _nibbles
from mlxedge.accel.k_search import KSearch
from mlxedge.encodings import Encoding
from mlxedge.ops import Parts

#: Weights in one evaluation.
WEIGHTS_AT_ONCE = 1 << 22

_LARGEST_HALF, _LARGEST_E4M3 = 0x7BFF, 126
_LARGEST_BYTE_E2M1, _LARGEST_BYTE_E4M3 = 252, 246

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4_STEPS = tuple(((a + b) / 2, b - a) for a, b in pairwise(_IQ4_LEVELS))

Level = Callable[[mx.array, mx.array], mx.array]


def _integers(low: float, high: float) -> Level:
    def nearest(v: mx.array, magic: mx.array) -> mx.array:
        v = mx.where(v < high, v, high)
        return (mx.where(v > low, v, low) + magic) - magic

    return nearest


def _iq4(v: mx.array, magic: mx.array) -> mx.array:
    level = mx.full(v.shape, float(_IQ4_LEVELS[-1]))
    for middle, step in _IQ4_STEPS:
        level = level - mx.where(v < middle, float(step), 0.0)
    return level


def _trits(v: mx.array, magic: mx.array) -> mx.array:
    return (v > 0.5).astype(mx.float32)


def _e2m1(v: mx.array, magic: mx.array) -> mx.array:
    v = mx.where(v < 6.0, v, 6.0)
    magic = mx.where(v < 2.0, magic * 0.5, mx.where(v < 4.0, magic, magic * 2.0))
    return (v + magic) - magic


def _e4m3(v: mx.array, magic: mx.array) -> mx.array:
    v = mx.where(v < 448.0, v, 448.0)
    exponent = mx.maximum(v.view(mx.int32) & 0x7F800000, 121 << 23)
    own = (exponent + ((20 << 23) | 0x400000)).view(mx.float32)
    return (v + own) - own


def _signed_code(offset: int) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda level, v: level.astype(mx.int32) + offset


def _iq4_code(level: mx.array, v: mx.array) -> mx.array:
    code = mx.full(v.shape, len(_IQ4_STEPS), mx.int32)
    for middle, _ in _IQ4_STEPS:
        code = code - (v < middle).astype(mx.int32)
    return code


def _negated_code(level: mx.array, v: mx.array) -> mx.array:
    code = level.astype(mx.int32)
    return mx.where(v < 0, -code, code)


def _e2m1_code(level: mx.array, v: mx.array) -> mx.array:
    code = mx.where(level < 1.0, 1, (level.view(mx.int32) >> 22) - 252)
    code = mx.where(level > 0, code, 0)
    return mx.where((v < 0) & (code > 0), code | 8, code)


def _e4m3_code(level: mx.array, v: mx.array) -> mx.array:
    tiny = (level * 512.0).astype(mx.int32)
    code = mx.where(level < 2.0**-6, tiny, (level.view(mx.int32) >> 20) - (120 << 3))
    return mx.where((v < 0) & (code > 0), code | 128, code)


@dataclass(frozen=True)
class _Levels:
    """A table of levels: the nearest level of a number, or, unless ``signed``, of a magnitude; the
    code of a level and the number (with its sign) that has it."""

    nearest: Level
    code: Callable[[mx.array, mx.array], mx.array]
    signed: bool = False


_INT4 = _Levels(_integers(-8.0, 7.0), _signed_code(8), signed=True)
_INT5 = _Levels(_integers(-16.0, 15.0), _signed_code(16), signed=True)
_IQ4 = _Levels(_iq4, _iq4_code, signed=True)
_INT8 = _Levels(_integers(0.0, 127.0), _negated_code)
_E2M1 = _Levels(_e2m1, _e2m1_code)
_E4M3 = _Levels(_e4m3, _e4m3_code)


@dataclass(frozen=True, eq=False)
class _Format:
    """What the fallback's kernel of this format is compiled for.

    With a float16 scale: ``rule``, the level that the runtime gives to the extreme weight, and
    ``tries``, the levels it may have. With one of a byte: ``rule``, the byte of zeros, and
    ``tries``, steps of the byte.
    """

    levels: _Levels
    scale: str
    rule: float
    tries: tuple[float, ...]


def _both(negative: tuple[float, ...], positive: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-v for v in negative) + positive


_FORMATS = {
    "q4_0": _Format(
        _INT4,
        "f16",
        -8.0,
        _both(
            (7.2, 7.5, 7.8, 8.0, 8.3, 8.6, 8.9, 9.2),
            (6.3, 6.6, 6.9, 7.2, 7.5, 7.8, 8.1, 8.4),
        ),
    ),
    "q5_0": _Format(
        _INT5,
        "f16",
        -16.0,
        _both(
            (12.8, 13.4, 14.0, 14.6, 15.2, 15.8, 16.4, 17.0, 17.6, 18.3),
            (12.0, 12.6, 13.2, 13.8, 14.4, 15.0, 15.6, 16.2, 16.8, 17.4),
        ),
    ),
    "q8_0": _Format(_INT8, "f16", 127.0, tuple(range(105, 131))),
    "iq4_nl": _Format(
        _IQ4,
        "f16",
        -127.0,
        _both(
            (112.0, 117.0, 122.0, 127.0, 131.0, 135.0),
            (100.0, 105.0, 110.0, 113.0, 117.0, 121.0),
        ),
    ),
    "mxfp4": _Format(_E2M1, "e8m0", 0, (0, -1)),
    "mlx-mxfp4": _Format(_E2M1, "e8m0", 127, (0, -1)),
    "mlx-mxfp8": _Format(_E4M3, "e8m0", 127, (0, -1)),
    "mlx-nvfp4": _Format(_E2M1, "e4m3", 0, tuple(range(-2, 9))),
}


def _ints(x: mx.array) -> mx.array:
    return x.view(mx.int32)


def _floats(bits: mx.array) -> mx.array:
    return bits.view(mx.float32)


def _half_bits(v: mx.array) -> mx.array:
    bits = _ints(v)
    normal = ((bits - 0x37FFF001) + ((bits >> 13) & 1)) >> 13
    tiny = _ints(v + 0.5) - 0x3F000000
    return mx.minimum(mx.where(bits > 0x387FFFFF, normal, tiny), _LARGEST_HALF)


def _half_value(bits: mx.array, sign: mx.array, power: mx.array) -> mx.array:
    tiny = bits.astype(mx.float32) * 2.0**-24
    value = mx.where(bits > 0x3FF, _floats((bits << 13) + (112 << 23)), tiny)
    return _floats(_ints(value * power) | sign)


def _sign(x: mx.array) -> mx.array:
    return _ints(x) & -0x80000000


def _e4m3_rule(largest: mx.array) -> mx.array:
    v = largest / 6.0
    bits = _ints(v)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = _ints(v + 2.0**14) - 0x46800000
    return mx.minimum(mx.where(bits > 0x3C7FFFFF, normal, tiny), _LARGEST_E4M3)


def _e8m0_rule(largest: mx.array, levels: _Levels, zero: int) -> mx.array:
    if zero == 0:
        return mx.maximum((_ints(largest) >> 23) - 2, 0)
    bits = _ints(largest / (6.0 if levels is _E2M1 else 448.0))
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    below = mx.where(exponent > 0, 0, 0x400000)
    byte = exponent + (mantissa > below).astype(mx.int32)
    return mx.where(bits > 0, byte, zero)


def _inverse(scale: mx.array) -> mx.array:
    return mx.where(scale != 0, 1.0 / scale, 0.0)


class _Search:
    """The search of one format, on a chunk of rows."""

    def __init__(self, form: _Format, *, compiled: bool) -> None:
        nearest = form.levels.nearest

        def fit_terms(
            x: mx.array,
            products: mx.array,
            w: mx.array,
            inverse: mx.array,
            magic: mx.array,
            one: mx.array,
        ) -> tuple[mx.array, mx.array]:
            level = nearest((x * inverse) * one, magic)
            return products * level, (level * level) * w

        def error_terms(
            x: mx.array,
            w: mx.array,
            scale: mx.array,
            inverse: mx.array,
            magic: mx.array,
            one: mx.array,
        ) -> mx.array:
            difference = x - (nearest((x * inverse) * one, magic) * scale) * one
            return (difference * difference) * w

        self._form = form
        self._fit_terms = mx.compile(fit_terms) if compiled else fit_terms
        self._error_terms = mx.compile(error_terms) if compiled else error_terms
        self._sum = KSearch(compiled=compiled).sum
        self._magic, self._one = mx.array(MAGIC), mx.array(1.0)

    def encode(self, x: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        """The scales u16 or u8 ``[blocks]`` and the codes i32 ``[blocks, n]`` of raw weights f32
        ``[n, rows, blocks of a row]`` with importance f32 ``[n, 1, blocks of a row]``."""
        form, signed = self._form, self._form.levels.signed
        pick = 1 if signed else 0
        all_extreme = first_absmax(x, axis=0)[pick]
        extreme = first_absmax(mx.where(w > 0, x, 0.0), axis=0)[pick]
        extreme = mx.where(extreme == 0, all_extreme, extreme)
        exponent = mx.maximum(_ints(mx.abs(extreme)) >> 23, 1)
        power = _floats((255 - exponent) << 23)
        self._w = w
        self._x = x * power
        if not signed:
            self._x = mx.abs(self._x)
        self._x = mx.where(w == 0, 0.0, self._x)
        mx.eval(self._x, power, extreme, all_extreme)
        if form.scale == "f16":
            stored, scale = self._half(all_extreme / form.rule, extreme, exponent, power)
        else:
            stored, scale = self._byte(all_extreme, extreme, exponent, power)
        v = (x * power) * _inverse(scale)
        level = form.levels.nearest(v if signed else mx.abs(v), self._magic)
        codes = form.levels.code(level, v)
        self._x = self._w = mx.array(0.0)
        return stored.reshape(-1), codes.reshape(codes.shape[0], -1).T

    def _fit(self, products: mx.array, inverse: mx.array) -> tuple[mx.array, mx.array]:
        terms = self._fit_terms(self._x, products, self._w, inverse, self._magic, self._one)
        xl, ll = (self._sum(t)[None] for t in terms)
        mx.eval(xl, ll)
        return xl, ll

    def _error(self, scale: mx.array) -> mx.array:
        inverse = _inverse(scale)
        terms = self._error_terms(self._x, self._w, scale, inverse, self._magic, self._one)
        total = self._sum(terms)[None]
        total = mx.where(total < np.inf, total, np.inf)
        mx.eval(total)
        return total

    def _half(
        self, rule: mx.array, extreme: mx.array, exponent: mx.array, power: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The bits of the best float16 scale, and what it is in units of the block."""
        unit = _floats(mx.maximum(exponent - 1, 1) << 23)
        products = self._x * self._w
        whole = extreme * power
        whole = mx.where(whole != 0, whole, 1.0)
        best_xl, best_ll = mx.zeros_like(whole), mx.ones_like(whole)
        for level in self._form.tries:
            xl, ll = self._fit(products, mx.array(level, mx.float32) / whole)
            better = (xl * xl) * best_ll > (best_xl * best_xl) * ll
            best_xl = mx.where(better, xl, best_xl)
            best_ll = mx.where(better, ll, best_ll)
        bits, sign = _half_bits(mx.abs(rule)), _sign(rule)
        error = self._error(_half_value(bits, sign, power))

        def compare(other: mx.array, its_sign: mx.array) -> None:
            nonlocal bits, sign, error
            trial = self._error(_half_value(other, its_sign, power))
            better = trial < error
            error = mx.where(better, trial, error)
            bits = mx.where(better, other, bits)
            sign = mx.where(better, its_sign, sign)

        for turn in range(2):
            if turn:
                best_xl, best_ll = self._fit(products, _inverse(_half_value(bits, sign, power)))
            fitted = mx.where(best_ll != 0, best_xl / best_ll, 0.0)
            compare(_half_bits(mx.abs(fitted) * unit), _sign(fitted))
        middle = bits
        for step in (-1, 1):
            compare(mx.minimum(mx.maximum(middle + step, 0), _LARGEST_HALF), sign)
        stored = (bits | ((sign >> 16) & 0x8000)).astype(mx.uint16)
        return stored, _half_value(bits, sign, power)

    def _byte(
        self, all_largest: mx.array, largest: mx.array, exponent: mx.array, power: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The byte of the best scale, and what it is in units of the block."""
        levels, zero = self._form.levels, int(self._form.rule)
        e4m3 = self._form.scale == "e4m3"
        if e4m3:
            most = _LARGEST_E4M3
            code, middle = _e4m3_rule(all_largest), _e4m3_rule(largest)
        else:
            most = _LARGEST_BYTE_E2M1 if levels is _E2M1 else _LARGEST_BYTE_E4M3
            code = mx.minimum(_e8m0_rule(all_largest, levels, zero), most)
            middle = mx.maximum(exponent - (1 if levels is _E2M1 else 7), 0)

        def value(code: mx.array) -> mx.array:
            if not e4m3:
                return _floats(mx.minimum(mx.maximum(code - exponent + 128, 1), 254) << 23)
            tiny = code.astype(mx.float32) * 2.0**-9
            return mx.where(code > 7, _floats((code << 20) + (120 << 23)), tiny) * power

        error = self._error(value(code))
        for step in self._form.tries:
            other = mx.minimum(mx.maximum(middle + int(step), 0), most)
            trial = self._error(value(other))
            better = trial < error
            error = mx.where(better, trial, error)
            code = mx.where(better, other, code)
        return code.astype(mx.uint8), value(code)


@functools.cache
def _search(name: str, compiled: bool) -> _Search:
    return _Search(_FORMATS[name], compiled=compiled)


def _ggml_block(name: str, scales: mx.array, codes: mx.array) -> mx.array:
    """ggml's blocks of 32, u8 ``[blocks, bytes]``."""
    fields = [scales[:, None].view(mx.uint8)]
    codes = codes.astype(mx.uint32)
    if name == "q8_0":
        return join_fields([*fields, codes & 0xFF])
    if name == "q5_0":
        fields.append(_fifth_bits(codes))
    return join_fields([*fields, _nibbles(codes)])


def search(
    weights: np.ndarray,
    encoding: Encoding,
    importance: np.ndarray | None,
    *,
    compiled: bool | None = None,
) -> Parts:
    """Encode ``weights`` f32 ``[rows, cols]`` in C order; ``importance`` f32 ``[cols]``.

    ``compiled`` tells whether stages are fused by ``mx.compile``; ``None`` means on a GPU.
    """
    if compiled is None:
        compiled = mx.default_device().type == mx.DeviceType.gpu
    rows, cols = weights.shape
    block = encoding.block
    parts = {
        name: np.empty(part.shape, DTYPES[part.dtype])
        for name, part in encoding.parts(weights.shape).items()
    }
    if weights.size == 0:
        return parts
    form = _search(encoding.name, compiled)
    w = mx.contiguous(mx.array(_counts(importance, cols, block)).T)[:, None]
    step = max(1, WEIGHTS_AT_ONCE // cols)
    for start in range(0, rows, step):
        piece = weights[start : start + step]
        x = mx.contiguous(mx.array(piece).reshape(len(piece), -1, block).transpose(2, 0, 1))
        scales, codes = form.encode(x, w)
        if encoding.family == "ggml":
            made = {"weight": _ggml_block(encoding.name, scales, codes)}
        else:
            flat = codes.reshape(-1).astype(mx.uint32)
            bits = 32 * parts["weight"].shape[1] // cols
            made = {"weight": pack_stream(flat, bits), "scales": scales}
        for name, part in made.items():
            out = parts[name][start : start + step]
            out[:] = np.array(part).reshape(out.shape)
    mx.clear_cache()
    return parts


def _counts(importance: np.ndarray | None, cols: int, block: int) -> np.ndarray:
    """``importance`` as the fallback counts it, f32 ``[blocks, block]``: each block's times a power
    of two that makes its greatest 0.5…1; ones where all of a block, or none of it, is important."""
    if importance is None:
        return np.ones((cols // block, block), np.float32)
    blocks = importance.reshape(-1, block)
    greatest = blocks.max(axis=1, keepdims=True)
    counts = np.where(greatest > 0, np.ldexp(blocks, -np.frexp(greatest)[1]), np.float32(1.0))
    return counts.astype(np.float32)
