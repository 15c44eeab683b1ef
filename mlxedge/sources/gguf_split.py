"""GGUF models that lie in several files, as llama.cpp's gguf-split writes them.

Parts are called ``NAME-00001-of-00003.gguf``. The first has the metadata, all have ``split.no``
(from 0), ``split.count`` and ``split.tensors.count`` (of all parts), and each has tensors of its
own (tools/gguf-split of llama.cpp as vendored by llama-cpp-python 0.3.36). Only the first part may
be without tensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlxedge.errors import CorruptFileError, SourceNotFoundError
from mlxedge.sources.files import Opener, RandomAccessFile, shown
from mlxedge.sources.gguf import GgufFile, GgufTensor, read_gguf
from mlxedge.sources.gguf_names import part_names, stem_of

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def read_model(path: str | Path, open_file: Opener = RandomAccessFile) -> GgufFile:
    """Metadata and tensors of the model that ``path`` is, or is any part of.

    Raises what :func:`mlxedge.sources.gguf.read_gguf` does, SourceNotFoundError for a part that is
    missing, and CorruptFileError for parts that do not belong together.
    """
    path = Path(path)
    named = read_gguf(path, open_file)
    names, count = part_names(path.name), _whole(named, _COUNT, 1)
    if len(names) != count:
        raise CorruptFileError(
            path,
            f"is one of {count} parts ({_COUNT}) by its metadata, and by its name "
            f"{'one of ' + str(len(names)) if len(names) > 1 else 'not a part'}: a part is called "
            f"NAME-00001-of-{count:05d}.gguf",
        )
    if count == 1:
        return named
    parts = [named if name == path.name else _part(path, name, count, open_file) for name in names]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        for key, expected in ((_NUMBER, number), (_COUNT, count)):
            if (found := _whole(part, key, None)) != expected:
                raise CorruptFileError(
                    part.path,
                    f"{key} is {found}, and should be {expected}: parts of several models, or "
                    "renamed ones; get them again",
                )
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise CorruptFileError(
                    part.path,
                    f"tensor {shown(tensor.name)} is also in {names[tensors[tensor.name].part]}",
                    tensor.offset,
                )
            tensors[tensor.name] = replace(tensor, part=number)
    wanted = _whole(parts[0], _TENSORS, len(tensors))
    if wanted != len(tensors):
        raise CorruptFileError(
            parts[0].path,
            f"{_TENSORS} is {wanted}, and the parts hold {len(tensors)} tensors: parts of several "
            "models; get them again",
        )
    keys = (_NUMBER, _COUNT, _TENSORS)
    metadata = {key: value for key, value in parts[0].metadata.items() if key not in keys}
    return replace(
        parts[0],
        metadata=metadata,
        tensors=list(tensors.values()),
        parts=tuple(path.with_name(name) for name in names),
    )


def _part(path: Path, name: str, count: int, open_file: Opener) -> GgufFile:
    try:
        return read_gguf(path.with_name(name), open_file)
    except SourceNotFoundError as error:
        raise SourceNotFoundError(
            f"{path.with_name(name)}: this part is missing: all {count} parts of "
            f"{stem_of(path.name)} must lie in one folder"
        ) from error


def _whole(part: GgufFile, key: str, default: int | None) -> int | None:
    value = part.metadata.get(key)
    if value is None:
        return default
    if type(value.value) is not int:
        raise CorruptFileError(part.path, f"{key} must be a whole number, not {value.kind}")
    number: int = value.value
    return number
