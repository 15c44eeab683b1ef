"""GGUF models in several files, as llama.cpp's gguf-split writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxedge import gguf_values as gv
from mlxedge.outputs.gguf_file import ALIGNMENT, header_bytes
from mlxedge.sources.gguf import GgufTensor, read_gguf

STEM = "tiny-F32"


def write_part(
    path: Path,
    source: Path,
    tensors: Sequence[GgufTensor],
    number: int,
    count: int,
    total: int,
    **keys: gv.GgufValue,
) -> None:
    """One part, as ``split_strategy`` of llama.cpp's tools/gguf-split writes it."""
    metadata = dict(read_gguf(source).metadata) if number == 0 else {}
    metadata |= {
        "split.no": gv.GgufValue("u16", number),
        "split.count": gv.GgufValue("u16", count),
        "split.tensors.count": gv.GgufValue("i32", total),
        **keys,
    }
    infos, end, data = [], 0, b""
    raw = source.read_bytes()
    for tensor in tensors:
        infos.append((tensor.name, tensor.shape, tensor.encoding, end))
        content = raw[tensor.offset : tensor.offset + tensor.nbytes]
        data += content + bytes(-len(content) % ALIGNMENT)
        end = len(data)
    path.write_bytes(header_bytes(metadata, infos) + data)


def split(source: Path, folder: Path, sizes: Sequence[int]) -> list[Path]:
    """``source`` in as many parts as there are ``sizes``, which count their tensors."""
    tensors = read_gguf(source).tensors
    folder.mkdir()
    paths = []
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        paths.append(folder / f"{STEM}-{number + 1:05d}-of-{len(sizes):05d}.gguf")
        write_part(
            paths[-1], source, tensors[first : first + size], number, len(sizes), len(tensors)
        )
    assert sum(sizes) == len(tensors)
    return paths
