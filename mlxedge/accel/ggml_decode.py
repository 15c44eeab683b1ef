"""ggml's block formats to f32: each decoder takes u8 ``[N, block bytes]``, gives ``[N, block]``.

The same operations in the same order as ``dequantize_row_*`` of ``ggml/src/ggml-quants.c``
(llama.cpp as vendored by llama-cpp-python 0.3.36). Scales have 11 significant bits and codes at
most 7, so nearly every product is exact, and contraction could not change it. Fields of a block
are named in order in the comments; layouts are those of ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxedge.accel import ggml_decode_iq
from mlxedge.accel.casts import f16_from_bytes

#: The weights that a 4-bit code of iq4_nl and iq4_xs stands for, before scaling.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
#: Twice the E2M1 values of mxfp4 and nvfp4; their scales below are halved to match.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_BYTES = np.arange(256)
#: Half of 2^(byte - 127), without E8M0's NaN.
_HALF_E8M0 = np.ldexp(np.float32(1), _BYTES - 128).astype(np.float32)
#: Half of the E4M3 magnitude; ggml reads 0x7F as 0, and 0xFF as if it were no NaN.
_HALF_E4M3 = np.where(
    _BYTES == 0x7F,
    0,
    np.ldexp((_BYTES & 7) + np.where(_BYTES >> 3 & 15, 8, 0), np.maximum(_BYTES >> 3 & 15, 1) - 11),
).astype(np.float32)


def _float(codes: mx.array, minus: int = 0) -> mx.array:
    """Codes minus an integer, as f32."""
    return (codes.astype(mx.int32) - minus).astype(mx.float32)


def _signed(raw: mx.array) -> mx.array:
    """Bytes read as i8, as f32."""
    return mx.contiguous(raw).view(mx.int8).astype(mx.float32)


def _fields(raw: mx.array, width: int) -> mx.array:
    """Bytes ``[..., n]`` as fields of ``width`` bits, low first: ``[..., 8 / width, n]``."""
    shifts = mx.arange(0, 8, width, dtype=mx.uint8)
    return (raw[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _nibbles(raw: mx.array) -> mx.array:
    """Bytes ``[N, n]`` as codes ``[N, 2n]``: all the low halves, then all the high ones."""
    return _fields(raw, 4).reshape(raw.shape[0], -1)


def _fifth_bits(raw: mx.array) -> mx.array:
    """32 bits of 4 bytes ``[N, 4]``, each worth 16: ``[N, 32]``."""
    return _fields(raw, 1).swapaxes(1, 2).reshape(-1, 32) << 4


def _q4_0(blocks: mx.array) -> mx.array:  # d f16, qs[16]
    return f16_from_bytes(blocks[:, :2]) * _float(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: mx.array) -> mx.array:  # d f16, m f16, qs[16]
    d, m = f16_from_bytes(blocks[:, :2]), f16_from_bytes(blocks[:, 2:4])
    return d * _float(_nibbles(blocks[:, 4:])) + m


def _q5_0(blocks: mx.array) -> mx.array:  # d f16, qh[4], qs[16]
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return f16_from_bytes(blocks[:, :2]) * _float(codes, 16)


def _q5_1(blocks: mx.array) -> mx.array:  # d f16, m f16, qh[4], qs[16]
    d, m = f16_from_bytes(blocks[:, :2]), f16_from_bytes(blocks[:, 2:4])
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return d * _float(codes) + m


def _q8_0(blocks: mx.array) -> mx.array:  # d f16, qs i8[32]
    return f16_from_bytes(blocks[:, :2]) * _signed(blocks[:, 2:])


def _two_bit_codes(raw: mx.array) -> mx.array:
    """64 bytes of 2-bit codes as ``[N, 16, 16]``: byte 32 h + l holds weights 128 h + l + 32 i."""
    return _fields(raw.reshape(-1, 2, 32), 2).reshape(-1, 16, 16)


def _high_bits(raw: mx.array) -> mx.array:
    """32 bytes as 256 bits ``[N, 8, 32]``; bit i of byte l belongs to weight 32 i + l."""
    return _fields(raw, 1)


def _q2_k(blocks: mx.array) -> mx.array:  # scales[16] (scale, min << 4), qs[64], d f16, dmin f16
    scales = blocks[:, :16]
    d, dmin = f16_from_bytes(blocks[:, 80:82]), f16_from_bytes(blocks[:, 82:84])
    scale, low = d * _float(scales & 15), dmin * _float(scales >> 4)
    return scale[..., None] * _float(_two_bit_codes(blocks[:, 16:80])) - low[..., None]


def _q3_k(blocks: mx.array) -> mx.array:  # hmask[32], qs[64], scales[12] (6 bits each), d f16
    scales = _nibbles(blocks[:, 96:104]) | (_fields(blocks[:, 104:108], 2).reshape(-1, 16) << 4)
    scale = f16_from_bytes(blocks[:, 108:110]) * _float(scales, 32)
    high = _high_bits(blocks[:, :32]).reshape(-1, 16, 16)
    codes = _two_bit_codes(blocks[:, 32:96]) | (high << 2)
    return scale[..., None] * _float(codes, 4)


def _scales_and_mins(blocks: mx.array) -> tuple[mx.array, mx.array]:
    """Scale and minimum ``[N, 8, 1]`` of each sub-block of q4_k and q5_k."""
    d, dmin = f16_from_bytes(blocks[:, :2]), f16_from_bytes(blocks[:, 2:4])
    first, second, third = (blocks[:, i : i + 4] for i in (4, 8, 12))
    scales = mx.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    mins = mx.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return (d * _float(scales))[..., None], (dmin * _float(mins))[..., None]


def _four_bit_codes(raw: mx.array) -> mx.array:
    """128 bytes of 4-bit codes as ``[N, 8, 32]``; byte 32 h + l holds weights 64 h + l (+ 32)."""
    return _fields(raw.reshape(-1, 4, 32), 4).reshape(-1, 8, 32)


def _q4_k(blocks: mx.array) -> mx.array:  # d f16, dmin f16, scales[12], qs[128]
    scale, low = _scales_and_mins(blocks)
    return scale * _float(_four_bit_codes(blocks[:, 16:])) - low


def _q5_k(blocks: mx.array) -> mx.array:  # d f16, dmin f16, scales[12], qh[32], qs[128]
    scale, low = _scales_and_mins(blocks)
    codes = _four_bit_codes(blocks[:, 48:]) | (_high_bits(blocks[:, 16:48]) << 4)
    return scale * _float(codes) - low


def _q6_k(blocks: mx.array) -> mx.array:  # ql[128], qh[64], scales i8[16], d f16
    scale = f16_from_bytes(blocks[:, 208:]) * _signed(blocks[:, 192:208])
    low = _fields(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return scale[..., None] * _float(low | (high << 4), 32)


def _iq4_nl(blocks: mx.array) -> mx.array:  # d f16, qs[16]
    return f16_from_bytes(blocks[:, :2]) * mx.take(mx.array(_IQ4), _nibbles(blocks[:, 2:]))


def _iq4_xs(blocks: mx.array) -> mx.array:  # d f16, scales_h u16, scales_l[4], qs[128]
    low = _fields(blocks[:, 4:8], 4).swapaxes(1, 2).reshape(-1, 8)
    high = _fields(blocks[:, 2:4], 2).swapaxes(1, 2).reshape(-1, 8)
    scale = f16_from_bytes(blocks[:, :2]) * _float(low | (high << 4), 32)
    codes = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 8, 32)
    return scale[..., None] * mx.take(mx.array(_IQ4), codes)


def _mxfp4(blocks: mx.array) -> mx.array:  # e (E8M0), qs[16]
    scale = mx.take(mx.array(_HALF_E8M0), blocks[:, :1])
    return scale * mx.take(mx.array(_E2M1_DOUBLED), _nibbles(blocks[:, 1:]))


def _nvfp4(blocks: mx.array) -> mx.array:  # d[4] (E4M3 of 16 weights each), qs[32]
    scale = mx.take(mx.array(_HALF_E4M3), blocks[:, :4])
    codes = _nibbles(blocks[:, 4:].reshape(-1, 8)).reshape(-1, 4, 16)
    return scale[..., None] * mx.take(mx.array(_E2M1_DOUBLED), codes)


def _tq1_0(blocks: mx.array) -> mx.array:  # qs[48], qh[4] (base 3), d f16
    def digits(raw: mx.array, count: int) -> mx.array:
        powers = mx.array([3**i for i in range(count)], mx.uint8)
        shifted = (raw[:, None, :] * powers[:, None]).astype(mx.uint16)
        return (shifted * 3 >> 8).reshape(raw.shape[0], -1)

    codes = mx.concatenate(
        [digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)],
        axis=1,
    )
    return f16_from_bytes(blocks[:, 52:]) * _float(codes, 1)


def _tq2_0(blocks: mx.array) -> mx.array:  # qs[64], d f16
    codes = _two_bit_codes(blocks[:, :64]).reshape(-1, 256)
    return f16_from_bytes(blocks[:, 64:]) * _float(codes, 1)


DECODERS: dict[str, Callable[[mx.array], mx.array]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    **ggml_decode_iq.DECODERS,
}
