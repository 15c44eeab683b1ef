"""ggml's block formats: one u8 part of whole blocks per row.

Sizes are those of ``ggml-common.h`` (llama.cpp as vendored by llama-cpp-python 0.3.36); the
numbers are ggml's ``enum ggml_type``, which a GGUF file stores per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlxedge.encodings.base import Encoding, Part


@dataclass(frozen=True)
class GgmlBlock(Encoding):
    """A ggml type: ``block_bytes`` bytes hold ``block_size`` weights.

    Shape ``[..., cols]`` is stored as u8 ``[..., cols / block_size * block_bytes]``.
    ``writable`` tells whether mlxedge has an encoder; every type here has a decoder.
    ``weighs`` tells whether that encoder has a use for the importance of columns.
    """

    type_name: str
    type_id: int
    block_size: int
    block_bytes: int
    writable: bool
    weighs: bool = False
    family: ClassVar[str] = "ggml"

    @property
    def name(self) -> str:
        return self.type_name

    @property
    def block(self) -> int:
        return self.block_size

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        width = shape[-1] // self.block_size * self.block_bytes
        return {"weight": Part("u8", (*shape[:-1], width))}


_TYPES = [
    #         name       id  block bytes writable weighs
    GgmlBlock("q4_0", 2, 32, 18, True, True),
    GgmlBlock("q4_1", 3, 32, 20, True, True),
    GgmlBlock("q5_0", 6, 32, 22, True, True),
    GgmlBlock("q5_1", 7, 32, 24, True, True),
    GgmlBlock("q8_0", 8, 32, 34, True),
    GgmlBlock("q2_k", 10, 256, 84, True, True),
    GgmlBlock("q3_k", 11, 256, 110, True, True),
    GgmlBlock("q4_k", 12, 256, 144, True, True),
    GgmlBlock("q5_k", 13, 256, 176, True, True),
    GgmlBlock("q6_k", 14, 256, 210, True, True),
    GgmlBlock("iq2_xxs", 16, 256, 66, True, True),
    GgmlBlock("iq2_xs", 17, 256, 74, True, True),
    GgmlBlock("iq3_xxs", 18, 256, 98, True, True),
    GgmlBlock("iq1_s", 19, 256, 50, True, True),
    GgmlBlock("iq4_nl", 20, 32, 18, True, True),
    GgmlBlock("iq3_s", 21, 256, 110, True, True),
    GgmlBlock("iq2_s", 22, 256, 82, True, True),
    GgmlBlock("iq4_xs", 23, 256, 136, True, True),
    GgmlBlock("iq1_m", 29, 256, 56, True, True),
    GgmlBlock("tq1_0", 34, 256, 54, True),
    GgmlBlock("tq2_0", 35, 256, 66, True),
    GgmlBlock("mxfp4", 39, 32, 17, True),
    GgmlBlock("nvfp4", 40, 64, 36, False),
]

#: By lower-case name ("q4_k") and by ggml type number.
GGML = {t.type_name: t for t in _TYPES}
GGML_BY_ID = {t.type_id: t for t in _TYPES}
