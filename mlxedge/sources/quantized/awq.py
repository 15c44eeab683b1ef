"""AWQ checkpoints in the "gemm" layout of AutoAWQ.

Of a layer ``X``: ``X.qweight`` i32 ``[in, out / 8]`` packs the codes of eight outputs in the order
0, 2, 4, 6, 1, 3, 5, 7 from the lowest four bits up, ``X.qzeros`` i32 ``[groups, out / 8]`` the zero
points alike, and ``X.scales`` are ``[groups, out]``; w = scales · (q - zero) (AutoAWQ,
``awq/utils/packing_utils.py``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import shown
from mlxedge.sources.quantized.integers import Integers, Scales, pack
from mlxedge.sources.quantized.stored import FLOATS, Stored

_BITS, _PER_WORD = 4, 8
#: Where in its word, counted from the lowest bits, the code of each output stands.
_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_LAYOUTS = ("gemm",)


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every layer with a ``qweight``."""
    layout, bits = str(rules.get("version") or "gemm").lower(), rules.get("bits", _BITS)
    if layout not in _LAYOUTS or bits != _BITS:
        raise UnsupportedEncodingError(
            f"{stored.folder}: AWQ weights of {shown(str(bits))} bits in the layout "
            f"{shown(layout)!r}; mlxedge reads {_BITS} bits in the layout {', '.join(_LAYOUTS)!r}"
        )
    size = rules.get("group_size", 128)
    if type(size) is not int or (size < 1 and size != -1):
        raise CorruptFileError(
            stored.folder / "config.json", f"group_size is {shown(str(size))}, not a size or -1"
        )
    return {f"{stem}.weight": _layer(stored, stem, size) for stem, _ in stored.ending(".qweight")}


def _layer(stored: Stored, stem: str, size: int) -> SourceTensor:
    codes = f"{stem}.qweight"
    cols, width = stored.take(codes, ("i32", "u32"), (None, None)).shape
    groups, out = 1 if size == -1 else -(-cols // size), width * _PER_WORD
    stored.take(f"{stem}.qzeros", ("i32", "u32"), (groups, width), of=codes)
    stored.take(f"{stem}.scales", FLOATS, (groups, out), of=codes)

    def outputs(name: str, start: int, stop: int) -> np.ndarray:
        first = start // _PER_WORD
        found = stored.columns(name, first, -(-stop // _PER_WORD))
        return _in_order(found)[:, start - first * _PER_WORD : stop - first * _PER_WORD].T

    def words(start: int, stop: int) -> np.ndarray:
        # The codes of a row fill whole words where groups are of 32 and more; others get padding.
        found = outputs(codes, start, stop)
        return pack(np.pad(found, ((0, 0), (0, -cols % _PER_WORD))), _BITS)

    def scales(start: int, stop: int) -> Scales:
        zeros = outputs(f"{stem}.qzeros", start, stop)
        return stored.columns(f"{stem}.scales", start, stop).T, zeros

    name = f"{stem}.scales"
    made = Integers(stored, (out, cols), _BITS, groups, name, words, scales, symmetric=False)
    return made.tensor(f"{stem}.weight")


def _in_order(words: np.ndarray) -> np.ndarray:
    """Codes u8 ``[rows, words · 8]`` of words i32 ``[rows, words]``."""
    shifts = (_PLACE * _BITS).astype(np.uint32)
    codes = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(15)
    return codes.astype(np.uint8).reshape(len(words), -1)
