"""Integer codes in groups along a row, each with a scale and a zero point: w = scale · (q - zero).

GPTQ, AWQ and compressed-tensors differ in how they lay such weights out; what they mean is the same
and is written here once. Affine groups of ours keep codes and weights exactly where the scales are
of 16 bits: scale · zero then needs at most 19 of the 24 bits of an f32 bias, and no bit more than
the scale where zero is a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxedge.encodings import Affine
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import check_rows, numpy_dtype
from mlxedge.sources.quantized.stored import Stored, decoded

#: Scales ``[rows, groups]`` as stored, and zero points ``[rows, groups]``, or ``None`` where all
#: are the middle code.
Scales = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Integers:
    """A matrix ``[rows, cols]`` of codes of ``bits``.

    ``words(start, stop)`` gives rows of codes as one little-endian bit stream, u32
    ``[rows, cols · bits / 32]``; ``scales(start, stop)`` what they are scaled by, of which the
    array called ``scale_name`` in the file holds the scales. ``groups`` counts them in a row;
    ``group_of()``, if there is one, gives the group of each column, which else go in order.
    """

    stored: Stored
    shape: tuple[int, int]
    bits: int
    groups: int
    scale_name: str
    words: Callable[[int, int], np.ndarray]
    scales: Callable[[int, int], Scales]
    symmetric: bool
    group_of: Callable[[], np.ndarray] | None = None

    def tensor(self, name: str) -> SourceTensor:
        """As affine groups where those are exact, else decoded to f32."""
        cols = self.shape[1]
        size, rest = divmod(cols, self.groups)
        scale_dtype = self.stored.entry(self.scale_name).dtype
        group = next((g for g in reversed(AFFINE_GROUPS) if not rest and size % g == 0), None)
        keeps = self.group_of is None and scale_dtype in ("f16", "bf16")
        if group is None or not keeps or self.bits not in AFFINE_BITS:
            return decoded(name, self.shape, self._decode)
        encoding = Affine(self.bits, group, scale_dtype if self.symmetric else "f32")
        return self._affine(name, encoding, size // group)

    def _affine(self, name: str, encoding: Affine, repeat: int) -> SourceTensor:
        dtype = numpy_dtype(encoding.scale_dtype)

        def read_scales(start: int, stop: int) -> dict[str, np.ndarray]:
            check_rows(name, self.shape[0], start, stop)
            scale, zero = self._checked(start, stop)
            with np.errstate(over="ignore"):
                bias = (-scale * zero).astype(dtype)
            self.stored.scales(self.scale_name, bias)
            parts = {"scales": scale.astype(dtype), "biases": bias}
            return {part: np.repeat(values, repeat, axis=1) for part, values in parts.items()}

        def read_rows(start: int, stop: int) -> dict[str, np.ndarray]:
            scales = read_scales(start, stop)
            return {"weight": np.ascontiguousarray(self.words(start, stop)), **scales}

        return SourceTensor(name, self.shape, encoding, read_rows, read_scales)

    def _checked(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points as f32."""
        scale, zero = self.scales(start, stop)
        wide = self.stored.scales(self.scale_name, scale)
        if zero is None:
            zero = np.full(scale.shape, 1 << (self.bits - 1))
        return wide, zero.astype(np.float32)

    def _decode(self, start: int, stop: int) -> np.ndarray:
        cols = self.shape[1]
        codes = unpack(self.words(start, stop), self.bits)[:, :cols].astype(np.float32)
        scale, zero = self._checked(start, stop)
        if self.group_of is not None:
            index = self.group_of()
        else:
            index = np.arange(cols) // -(-cols // self.groups)
        codes -= zero[:, index]
        codes *= scale[:, index]
        return codes


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes u8 ``[rows, words · 32 // bits]`` of bit streams u32 ``[rows, words]``."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((raw[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)
    single = np.unpackbits(raw, axis=1, bitorder="little")
    count = single.shape[1] // bits
    of_code = single[:, : count * bits].reshape(len(raw), count, bits)
    return np.packbits(of_code, axis=2, bitorder="little")[:, :, 0]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The way back: u32 ``[rows, cols · bits / 32]`` of codes u8 ``[rows, cols]``."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))).view("<u4")
    single = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")
