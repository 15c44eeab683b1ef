"""ggml's block formats to float32.

Values equal, bit for bit, ``dequantize_row_*`` of ``ggml-quants.c`` (llama.cpp as vendored by
llama-cpp-python 0.3.36) built without fused multiply-add: the operations and their order are the
same, each rounded to float32. Layouts are those of ``ggml-common.h``; the comments below name the
fields of a block in order.

``DECODERS[name](source, out)`` decodes u8 ``[rows, row_bytes]`` into f32 ``[rows, cols]`` that is
in C order. It releases the GIL and allocates nothing of the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxedge.encodings import GGML
from mlxedge.errors import UsageError
from mlxedge.fallback import ggml_decode_iq
from mlxedge.fallback.bits import as_input, half
from mlxedge.fallback.jit import kernel

_FLOAT, _INT, _U32 = np.float32, np.int32, np.uint32

#: The weights that a 4-bit code of iq4_nl and iq4_xs stands for, before scaling.
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
#: Twice the E2M1 values of mxfp4 and nvfp4; the scales below are halved to match.
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _half_e8m0() -> np.ndarray:
    """Half of 2^(byte - 127); ggml reads byte 255 as 2^128 and not as NaN."""
    return np.ldexp(np.float32(1.0), np.arange(256) - 128).astype(np.float32)


def _half_e4m3() -> np.ndarray:
    """Half of the E4M3 value, without its sign; ggml reads 0x7F as 0, 0xFF as 480."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 11)
    return np.where(byte == 0x7F, 0, values).astype(np.float32)


_MX_SCALES = _half_e8m0()
_NV_SCALES = _half_e4m3()


@kernel
def _float(code: Any) -> Any:
    """A small integer as float32, without a detour over 64 bits."""
    return _FLOAT(_INT(code))


@kernel
def _f16(block: np.ndarray, at: int) -> Any:
    """The f16 at byte ``at``."""
    return half(_U32(block[at]) | _U32(_U32(block[at + 1]) << _U32(8)))


@kernel
def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, qs[16]
        d, qs, y = _f16(blocks[i], 0), blocks[i, 2:18], out[i]
        for j in range(16):
            y[j] = d * _float((qs[j] & 15) - 8)
            y[j + 16] = d * _float((qs[j] >> 4) - 8)


@kernel
def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, m f16, qs[16]
        d, m, qs, y = _f16(blocks[i], 0), _f16(blocks[i], 2), blocks[i, 4:20], out[i]
        for j in range(16):
            y[j] = d * _float(qs[j] & 15) + m
            y[j + 16] = d * _float(qs[j] >> 4) + m


@kernel
def _fifth_bits(block: np.ndarray, at: int) -> Any:
    """The u32 at byte ``at``: bit j is bit 4 of code j."""
    return (
        _U32(block[at])
        | (_U32(block[at + 1]) << _U32(8))
        | (_U32(block[at + 2]) << _U32(16))
        | (_U32(block[at + 3]) << _U32(24))
    )


@kernel
def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, qh[4], qs[16]
        d, qs, y = _f16(blocks[i], 0), blocks[i, 6:22], out[i]
        qh = _U32(_fifth_bits(blocks[i], 2))
        for j in range(16):
            low = _INT((qh >> _U32(j)) & _U32(1)) << 4
            high = _INT((qh >> _U32(j + 16)) & _U32(1)) << 4
            y[j] = d * _float(((qs[j] & 15) | low) - 16)
            y[j + 16] = d * _float(((qs[j] >> 4) | high) - 16)


@kernel
def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, m f16, qh[4], qs[16]
        d, m, qs, y = _f16(blocks[i], 0), _f16(blocks[i], 2), blocks[i, 8:24], out[i]
        qh = _U32(_fifth_bits(blocks[i], 4))
        for j in range(16):
            low = _INT((qh >> _U32(j)) & _U32(1)) << 4
            high = _INT((qh >> _U32(j + 16)) & _U32(1)) << 4
            y[j] = d * _float((qs[j] & 15) | low) + m
            y[j + 16] = d * _float((qs[j] >> 4) | high) + m


@kernel
def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, qs i8[32]
        d, qs, y = _f16(blocks[i], 0), blocks[i, 2:34].view(np.int8), out[i]
        for j in range(32):
            y[j] = d * _float(qs[j])


@kernel
def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # scales[16] (scale, min << 4), qs[64], d f16, dmin f16
        block = blocks[i]
        d, dmin = _f16(block, 80), _f16(block, 82)
        for s in range(16):
            scale, low = d * _float(block[s] & 15), dmin * _float(block[s] >> 4)
            start = 16 + s // 8 * 32 + s % 2 * 16
            qs, y = block[start : start + 16], out[i, s * 16 : s * 16 + 16]
            shift = s // 2 % 4 * 2
            for j in range(16):
                y[j] = scale * _float((qs[j] >> shift) & 3) - low


@kernel
def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # hmask[32], qs[64], scales[12] (6 bits each), d f16
        block = blocks[i]
        d, scales = _f16(block, 108), block[96:108]
        for s in range(16):
            low = (scales[s % 8] >> (s // 8 * 4)) & 15
            high = (scales[8 + s % 4] >> (s // 4 * 2)) & 3
            scale = d * _float((low | (high << 4)) - 32)
            start, where = 32 + s // 8 * 32 + s % 2 * 16, s % 2 * 16
            qs, hmask = block[start : start + 16], block[where : where + 16]
            y = out[i, s * 16 : s * 16 + 16]
            shift, bit = s // 2 % 4 * 2, s // 2
            for j in range(16):
                q = ((qs[j] >> shift) & 3) | (((hmask[j] >> bit) & 1) << 2)
                y[j] = scale * _float(q - 4)


@kernel
def _scale_and_min(scales: np.ndarray, s: int) -> tuple[int, int]:
    """The two 6-bit numbers of sub-block ``s`` of q4_k and q5_k."""
    if s < 4:
        return scales[s] & 63, scales[s + 4] & 63
    return (
        (scales[s + 4] & 15) | (scales[s - 4] >> 6 << 4),
        (scales[s + 4] >> 4) | (scales[s] >> 6 << 4),
    )


@kernel
def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, dmin f16, scales[12], qs[128]
        block = blocks[i]
        d, dmin, scales = _f16(block, 0), _f16(block, 2), block[4:16]
        for s in range(8):
            factor, offset = _scale_and_min(scales, s)
            scale, low = d * _float(factor), dmin * _float(offset)
            start = 16 + s // 2 * 32
            qs, y = block[start : start + 32], out[i, s * 32 : s * 32 + 32]
            shift = s % 2 * 4
            for j in range(32):
                y[j] = scale * _float((qs[j] >> shift) & 15) - low


@kernel
def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, dmin f16, scales[12], qh[32], qs[128]
        block = blocks[i]
        d, dmin, scales, qh = _f16(block, 0), _f16(block, 2), block[4:16], block[16:48]
        for s in range(8):
            factor, offset = _scale_and_min(scales, s)
            scale, low = d * _float(factor), dmin * _float(offset)
            start = 48 + s // 2 * 32
            qs, y = block[start : start + 32], out[i, s * 32 : s * 32 + 32]
            shift = s % 2 * 4
            for j in range(32):
                y[j] = scale * _float(((qs[j] >> shift) & 15) | (((qh[j] >> s) & 1) << 4)) - low


@kernel
def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # ql[128], qh[64], scales i8[16], d f16
        block = blocks[i]
        d, scales = _f16(block, 208), block[192:208].view(np.int8)
        for s in range(16):
            scale = d * _float(scales[s])
            # 128 weights share 64 bytes of ql and 32 of qh; within them, runs of 32 weights.
            part, run, start = s // 8, s // 2 % 4, s % 2 * 16
            at = part * 64 + run % 2 * 32 + start
            ql, y = block[at : at + 16], out[i, s * 16 : s * 16 + 16]
            at = 128 + part * 32 + start
            qh = block[at : at + 16]
            shift, pair = run // 2 * 4, run * 2
            for j in range(16):
                q = ((ql[j] >> shift) & 15) | (((qh[j] >> pair) & 3) << 4)
                y[j] = scale * _float(q - 32)


@kernel
def _iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, qs[16]
        d, qs, y = _f16(blocks[i], 0), blocks[i, 2:18], out[i]
        for j in range(16):
            y[j] = d * IQ4_VALUES[qs[j] & 15]
            y[j + 16] = d * IQ4_VALUES[qs[j] >> 4]


@kernel
def _iq4_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d f16, scales_h u16, scales_l[4], qs[128]
        block = blocks[i]
        d, high = _f16(block, 0), _U32(block[2]) | (_U32(block[3]) << _U32(8))
        for s in range(8):
            low = (block[4 + s // 2] >> (s % 2 * 4)) & 15
            scale = d * _float((low | (((high >> _U32(2 * s)) & 3) << 4)) - 32)
            start = 8 + s * 16
            qs, y = block[start : start + 16], out[i, s * 32 : s * 32 + 32]
            for j in range(16):
                y[j] = scale * IQ4_VALUES[qs[j] & 15]
                y[j + 16] = scale * IQ4_VALUES[qs[j] >> 4]


@kernel
def _mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # e (E8M0), qs[16]
        d, qs, y = _MX_SCALES[blocks[i, 0]], blocks[i, 1:17], out[i]
        for j in range(16):
            y[j] = d * E2M1_DOUBLED[qs[j] & 15]
            y[j + 16] = d * E2M1_DOUBLED[qs[j] >> 4]


@kernel
def _nvfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(out.shape[0]):  # d[4] (E4M3 of 16 weights each), qs[32]
        for s in range(4):
            d, start = _NV_SCALES[blocks[i, s]], 4 + s * 8
            qs, y = blocks[i, start : start + 8], out[i, s * 16 : s * 16 + 16]
            for j in range(8):
                y[j] = d * E2M1_DOUBLED[qs[j] & 15]
                y[j + 8] = d * E2M1_DOUBLED[qs[j] >> 4]


Decoder = Callable[[np.ndarray, np.ndarray], None]

_KERNELS: dict[str, Decoder] = {
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
    **ggml_decode_iq.KERNELS,
}


def _by_rows(name: str) -> Decoder:
    """A kernel over blocks as a decoder of rows."""
    run, encoding = _KERNELS[name], GGML[name]

    def decoder(source: np.ndarray, out: np.ndarray) -> None:
        blocks = as_input(source).reshape(-1, encoding.block_bytes)
        if not out.flags.c_contiguous or out.dtype != np.float32:
            raise UsageError(f"{name} decodes into f32 in C order, not {out.dtype}")
        if out.size != len(blocks) * encoding.block_size:
            raise UsageError(
                f"{name}: {source.size} bytes hold {len(blocks) * encoding.block_size} weights, "
                f"not {out.size}"
            )
        run(blocks, out.reshape(-1, encoding.block_size))

    return decoder


#: Decoders by the name of the encoding.
DECODERS: dict[str, Decoder] = {name: _by_rows(name) for name in _KERNELS}
