"""Encoded matrices as scalar grids: value = scale · level[code] + offset, code by code.

Most formats give every weight a code of its own and small groups of weights a scale, and an offset
where the format has one. Error feedback chooses codes for given scales, in whichever format; here
is what it needs to read them and write them back. Values equal the decoders' bit for bit: product
and sum are rounded to float32, one after the other, and a format without offsets adds -0.

Plain NumPy, for both backends. Layouts of ggml's blocks are those of ``ggml-common.h`` (llama.cpp
as vendored by llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from mlxedge.encodings import Affine, Encoding, MlxFloat
from mlxedge.errors import UnsupportedEncodingError

if TYPE_CHECKING:
    from mlxedge.ops import Parts

_NO_OFFSET = np.float32(-0.0)
_BYTES = np.arange(256, dtype=np.uint8)
_E8M0 = _BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
_E4M3 = _BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
#: ggml holds E2M1 doubled and the scales of mxfp4 halved, without E8M0's NaN.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_HALF_E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that the weights of a matrix ``[rows, cols]`` may take.

    ``scale`` and ``offset``: f32 ``[rows, cols / group]``. ``levels``: f32, by code. ``ranked``:
    u8, the codes to choose from, their levels rising; of two codes for one level the lower.
    """

    scale: np.ndarray
    offset: np.ndarray
    group: int
    levels: np.ndarray
    ranked: np.ndarray

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What u8 ``codes`` ``[rows, cols]`` stand for, f32."""
        rows, cols = codes.shape
        levels = self.levels[codes].reshape(rows, cols // self.group, self.group)
        with np.errstate(invalid="ignore", over="ignore"):
            values = self.scale[..., None] * levels + self.offset[..., None]
        return values.reshape(rows, cols)


@dataclass(frozen=True)
class _Plane:
    """Bytes ``start…stop`` of a block as fields of ``width`` bits, in runs of ``run`` bytes.

    A run holds run · 8 / width weights: field i, low first, of its byte l is that of weight
    i · run + l. The field is the bits of the code from ``shift`` on.
    """

    start: int
    stop: int
    width: int
    run: int
    shift: int = 0

    def read(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        """OR the fields of ``blocks`` ``[n, block bytes]`` into ``codes`` ``[n, weights]``."""
        n, runs = len(blocks), (self.stop - self.start) // self.run
        raw = blocks[:, self.start : self.stop].reshape(n, runs, self.run)
        fields = codes.reshape(n, runs, 8 // self.width, self.run)
        mask = (1 << self.width) - 1
        for i in range(8 // self.width):
            fields[:, :, i] |= (raw >> (i * self.width) & mask) << self.shift

    def write(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        """The inverse of :meth:`read`, over what ``blocks`` held."""
        n, runs = len(blocks), (self.stop - self.start) // self.run
        fields = codes.reshape(n, runs, 8 // self.width, self.run)
        raw = np.zeros((n, runs, self.run), np.uint8)
        mask = (1 << self.width) - 1
        for i in range(8 // self.width):
            raw |= (fields[:, :, i] >> self.shift & mask) << (i * self.width)
        blocks[:, self.start : self.stop] = raw.reshape(n, runs * self.run)


class _Trits:
    """The codes of tq1_0: five ternary digits a byte (four in the last four bytes), the first the
    most significant, as ceil(256 · number / 243)."""

    #: (first byte, last, digits a byte)
    _RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))

    def read(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        at = 0
        for start, stop, digits in self._RUNS:
            raw = blocks[:, start:stop]
            for n in range(digits):
                digit = (raw * np.uint8(3**n)).astype(np.uint16) * 3 >> 8
                codes[:, at : at + stop - start] = digit
                at += stop - start

    def write(self, codes: np.ndarray, blocks: np.ndarray) -> None:
        at = 0
        for start, stop, digits in self._RUNS:
            number = np.zeros((len(blocks), stop - start), np.uint32)
            for n in range(5):
                number *= 3
                if n < digits:
                    number += codes[:, at : at + stop - start]
                    at += stop - start
            blocks[:, start:stop] = (number * 256 + 242) // 243


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte ``at`` of each block, f32 ``[n, 1]``."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _float(codes: np.ndarray, minus: int = 0) -> np.ndarray:
    return (codes.astype(np.int32) - minus).astype(np.float32)


_Scales = tuple[np.ndarray, "np.ndarray | None"]


def _d_at(at: int) -> Callable[[np.ndarray], _Scales]:
    return lambda blocks: (_f16(blocks, at), None)


def _d_and_m(blocks: np.ndarray) -> _Scales:
    return _f16(blocks, 0), _f16(blocks, 2)


def _scales_mxfp4(blocks: np.ndarray) -> _Scales:
    return _HALF_E8M0[blocks[:, :1]], None


def _scales_q2_k(blocks: np.ndarray) -> _Scales:
    factors = blocks[:, :16]
    return _f16(blocks, 80) * _float(factors & 15), -(_f16(blocks, 82) * _float(factors >> 4))


def _scales_q3_k(blocks: np.ndarray) -> _Scales:
    raw, high = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([raw & 15, raw >> 4], axis=1)
    top = np.concatenate([high >> i & 3 for i in (0, 2, 4, 6)], axis=1)
    return _f16(blocks, 108) * _float(low | top << 4, 32), None


def _scales_6bit(blocks: np.ndarray) -> _Scales:
    first, second, third = (blocks[:, i : i + 4] for i in (4, 8, 12))
    factors = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    lows = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return _f16(blocks, 0) * _float(factors), -(_f16(blocks, 2) * _float(lows))


def _scales_q6_k(blocks: np.ndarray) -> _Scales:
    return _f16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _scales_iq4_xs(blocks: np.ndarray) -> _Scales:
    raw, high = blocks[:, 4:8], blocks[:, 2:4]
    low = np.stack([raw & 15, raw >> 4], axis=2).reshape(-1, 8)
    top = np.stack([high >> i & 3 for i in (0, 2, 4, 6)], axis=2).reshape(-1, 8)
    return _f16(blocks, 0) * _float(low | top << 4, 32), None


def _integers(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where a type of ggml holds codes and scales. Codes are XORed with ``flip`` as stored; those
    from ``choices`` on are only read."""

    group: int
    levels: np.ndarray
    scales: Callable[[np.ndarray], _Scales]
    planes: tuple[_Plane | _Trits, ...]
    flip: int = 0
    choices: int = 256


_LAYOUTS: dict[str, _Layout] = {
    "q4_0": _Layout(32, _integers(-8, 16), _d_at(0), (_Plane(2, 18, 4, 16),)),
    "q4_1": _Layout(32, _integers(0, 16), _d_and_m, (_Plane(4, 20, 4, 16),)),
    "q5_0": _Layout(
        32, _integers(-16, 32), _d_at(0), (_Plane(6, 22, 4, 16), _Plane(2, 6, 1, 1, 4))
    ),
    "q5_1": _Layout(32, _integers(0, 32), _d_and_m, (_Plane(8, 24, 4, 16), _Plane(4, 8, 1, 1, 4))),
    "q8_0": _Layout(32, _integers(-128, 256), _d_at(0), (_Plane(2, 34, 8, 32),), flip=0x80),
    "q2_k": _Layout(16, _integers(0, 4), _scales_q2_k, (_Plane(16, 80, 2, 32),)),
    "q3_k": _Layout(
        16, _integers(-4, 8), _scales_q3_k, (_Plane(32, 96, 2, 32), _Plane(0, 32, 1, 32, 2))
    ),
    "q4_k": _Layout(32, _integers(0, 16), _scales_6bit, (_Plane(16, 144, 4, 32),)),
    "q5_k": _Layout(
        32, _integers(0, 32), _scales_6bit, (_Plane(48, 176, 4, 32), _Plane(16, 48, 1, 32, 4))
    ),
    "q6_k": _Layout(
        16, _integers(-32, 64), _scales_q6_k, (_Plane(0, 128, 4, 64), _Plane(128, 192, 2, 32, 4))
    ),
    "iq4_nl": _Layout(32, _IQ4, _d_at(0), (_Plane(2, 18, 4, 16),)),
    "iq4_xs": _Layout(32, _IQ4, _scales_iq4_xs, (_Plane(8, 136, 4, 16),)),
    "mxfp4": _Layout(32, _E2M1_DOUBLED, _scales_mxfp4, (_Plane(1, 17, 4, 16),)),
    "tq1_0": _Layout(256, _integers(-1, 3), _d_at(52), (_Trits(),)),
    "tq2_0": _Layout(256, _integers(-1, 4), _d_at(64), (_Plane(0, 64, 2, 32),), choices=3),
}

#: By mode: what the codes and the bytes of scales stand for.
_FLOATS = {"mxfp4": (_E2M1, _E8M0), "mxfp8": (_E4M3, _E8M0), "nvfp4": (_E2M1, _E4M3)}


def has_grid(encoding: Encoding) -> bool:
    """Whether each weight of ``encoding`` has a code of its own."""
    return isinstance(encoding, Affine | MlxFloat) or encoding.name in _LAYOUTS


def grid(parts: Parts, encoding: Encoding) -> Grid:
    """The grid of an encoded matrix ``[rows, cols]``.

    Raises UnsupportedEncodingError for encodings that have none.
    """
    if isinstance(encoding, Affine):
        scale, offset = (parts[n].astype(np.float32) for n in ("scales", "biases"))
        return _grid(scale, offset, encoding.group, _integers(0, 1 << encoding.bits))
    if isinstance(encoding, MlxFloat):
        levels, bytes_ = _FLOATS[encoding.mode]
        return _grid(bytes_[parts["scales"]], None, encoding.group, levels)
    layout = _layout(encoding)
    blocks = _blocks(parts, encoding)
    with np.errstate(invalid="ignore", over="ignore"):
        scale, low = layout.scales(blocks)
    rows, cols = _shape(parts, encoding)
    return _grid(
        scale.reshape(rows, cols // layout.group),
        None if low is None else low.reshape(rows, cols // layout.group),
        layout.group,
        layout.levels,
        layout.choices,
    )


def codes(parts: Parts, encoding: Encoding) -> np.ndarray:
    """The codes of an encoded matrix, u8 ``[rows, cols]``.

    Raises UnsupportedEncodingError for encodings that have none.
    """
    if isinstance(encoding, Affine | MlxFloat):
        return _unpack(parts["weight"], encoding.bits)
    layout = _layout(encoding)
    blocks = _blocks(parts, encoding)
    read = np.zeros((len(blocks), encoding.block), np.uint8)
    for plane in layout.planes:
        plane.read(blocks, read)
    if layout.flip:
        read ^= np.uint8(layout.flip)
    return read.reshape(_shape(parts, encoding))


def with_codes(parts: Parts, encoding: Encoding, chosen: np.ndarray) -> Parts:
    """``parts`` with the same scales and ``chosen`` codes, u8 ``[rows, cols]``.

    Raises UnsupportedEncodingError for encodings that have none.
    """
    if isinstance(encoding, Affine | MlxFloat):
        return {**parts, "weight": _pack(chosen, encoding.bits)}
    layout = _layout(encoding)
    blocks = _blocks(parts, encoding).copy()
    stored = np.ascontiguousarray(chosen).reshape(len(blocks), encoding.block)
    if layout.flip:
        stored = stored ^ np.uint8(layout.flip)
    for plane in layout.planes:
        plane.write(stored, blocks)
    return {**parts, "weight": blocks.reshape(parts["weight"].shape)}


def _blocks(parts: Parts, encoding: Encoding) -> np.ndarray:
    """The blocks of a matrix in one of ggml's types, u8 ``[n, block bytes]``."""
    size = encoding.nbytes((encoding.block,))
    return parts["weight"].reshape(parts["weight"].size // size, size)


def _shape(parts: Parts, encoding: Encoding) -> tuple[int, int]:
    """``[rows, cols]`` of a matrix in one of ggml's types."""
    rows, width = parts["weight"].shape
    return rows, width // encoding.nbytes((encoding.block,)) * encoding.block


def _layout(encoding: Encoding) -> _Layout:
    layout = _LAYOUTS.get(encoding.name)
    if layout is None:
        raise UnsupportedEncodingError(f"{encoding} has no code for each weight")
    return layout


def _grid(
    scale: np.ndarray,
    offset: np.ndarray | None,
    group: int,
    levels: np.ndarray,
    choices: int = 256,
) -> Grid:
    finite = np.flatnonzero(np.isfinite(levels[:choices]))
    _, first = np.unique(levels[finite], return_index=True)
    if offset is None:
        offset = np.broadcast_to(_NO_OFFSET, scale.shape)
    return Grid(scale, offset, group, levels, finite[first].astype(np.uint8))


# Eight codes, one a byte of a 64-bit word, are moved together in three steps: pairs, fours, all.
_PAIRS, _FOURS = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF)
_LOW = np.uint64(0xFFFFFFFF)


def _pack(chosen: np.ndarray, bits: int) -> np.ndarray:
    """Codes as one little-endian bit stream a row: u32 ``[rows, cols · bits / 32]``."""
    if bits == 8:
        return np.ascontiguousarray(chosen).view(np.uint32)
    x = np.ascontiguousarray(chosen).view(np.uint64)
    x = (x & _PAIRS) | (x >> np.uint64(8) & _PAIRS) << np.uint64(bits)
    x = (x & _FOURS) | (x >> np.uint64(16) & _FOURS) << np.uint64(2 * bits)
    x = (x & _LOW) | x >> np.uint64(32) << np.uint64(4 * bits)
    rows, words = x.shape
    stream = x.view(np.uint8).reshape(rows, words, 8)[:, :, :bits]
    return np.ascontiguousarray(stream).reshape(rows, words * bits).view(np.uint32)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of :func:`_pack`."""
    rows = len(packed)
    stream = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return stream.copy()
    wide = np.zeros((rows, stream.shape[1] // bits, 8), np.uint8)
    wide[:, :, :bits] = stream.reshape(rows, wide.shape[1], bits)
    x = wide.reshape(rows, 8 * wide.shape[1]).view(np.uint64)
    x = (x & np.uint64((1 << 4 * bits) - 1)) | x >> np.uint64(4 * bits) << np.uint64(32)
    pair = np.uint64(((1 << 2 * bits) - 1) * 0x0000000100000001)
    x = (x & pair) | (x >> np.uint64(2 * bits) & pair) << np.uint64(16)
    code = np.uint64(((1 << bits) - 1) * 0x0001000100010001)
    x = (x & code) | (x >> np.uint64(bits) & code) << np.uint64(8)
    return x.view(np.uint8)
