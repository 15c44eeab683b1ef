"""The bytes of a GGUF file around its tensors (GGUF v3, little-endian; ggml's docs/gguf.md)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from mlxedge.encodings import GGML, Encoding
from mlxedge.errors import UnsupportedEncodingError, UnsupportedModelError
from mlxedge.gguf_values import VALUE_TYPES, GgufValue, Metadata

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_NAME = 63  # GGML_MAX_NAME is 64 with its terminating zero

_PLAIN_TYPE = {"f32": 0, "f16": 1, "bf16": 30}


def type_id(encoding: Encoding) -> int:
    """ggml's number of an encoding."""
    if encoding.name in _PLAIN_TYPE:
        return _PLAIN_TYPE[encoding.name]
    if encoding.name in GGML:
        return GGML[encoding.name].type_id
    raise UnsupportedEncodingError(f"GGUF has no type for {encoding.name}")


def header_bytes(
    metadata: Metadata, tensors: Iterable[tuple[str, tuple[int, ...], Encoding, int]]
) -> bytes:
    """Everything before the tensor data, padded to the alignment.

    ``tensors`` are (name, shape, encoding, offset within the data section).
    """
    infos = list(tensors)
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    for name, shape, encoding, offset in infos:
        if len(name.encode()) > MAX_NAME:
            raise UnsupportedModelError(f"tensor name {name!r} is longer than GGUF allows")
        out += _string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", type_id(encoding), offset)
    out += bytes(-len(out) % ALIGNMENT)
    return bytes(out)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: GgufValue) -> bytes:
    number, _ = VALUE_TYPES[value.kind]
    return struct.pack("<I", number) + _payload(value)


def _payload(value: GgufValue) -> bytes:
    if value.kind == "str":
        return _string(value.value)
    if value.kind == "array":
        item = value.item or ""
        item_number, item_format = VALUE_TYPES[item]
        head = struct.pack("<IQ", item_number, len(value.value))
        if item == "str":
            return head + b"".join(_string(text) for text in value.value)
        if item_format is None:
            return head + b"".join(_payload(inner) for inner in value.value)
        return head + struct.pack(f"<{len(value.value)}{item_format}", *value.value)
    return struct.pack(f"<{VALUE_TYPES[value.kind][1]}", value.value)
