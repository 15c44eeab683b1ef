"""What every source hands out: named tensors that are read on demand, a config, a tokenizer.

Names and layouts are Hugging Face's (``model.layers.0.self_attn.q_proj.weight``, Q and K rows in
the order of transformers), whatever the file was. Readers of GGUF and MLX map to them, so that
everything after this point knows one kind of model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import Encoding

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.ops import Parts
    from mlxedge.sources.block_cache import BlockCache
    from mlxedge.tokenizer.spec import TokenizerSpec


@dataclass(frozen=True)
class SourceTensor:
    """One tensor that is read when asked for.

    ``shape`` is the tensor's logical shape (``[out, in]`` for a linear layer), ``encoding`` how it
    is stored. ``read_rows(start, stop)`` returns the parts of rows ``start:stop`` of the tensor
    seen as ``[rows, cols]`` (all leading dimensions joined; a 1-D tensor is one row), in fresh
    memory that the caller may keep; it raises CorruptFileError if the file ends early.
    ``read_scales``, where there is one, gives those parts alone that are not codes. ``decoded``
    tells that the file has codes, though what is read are floats. Of what was made of canonical
    tensors for one world (``mlxedge.sources.recasts``) ``like`` is one that has the same input,
    whose columns stand in the order ``columns`` here, if there is one.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    read_rows: Callable[[int, int], Parts] = field(repr=False, compare=False)
    read_scales: Callable[[int, int], Parts] | None = field(default=None, repr=False, compare=False)
    decoded: bool = False
    like: str | None = None
    columns: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.encoding.nbytes(self.shape)

    def read(self) -> Parts:
        return self.read_rows(0, self.rows)


def stacked(name: str, tensors: Sequence[SourceTensor]) -> SourceTensor:
    """Tensors of one shape and one encoding as one: ``[len(tensors), *shape]``."""
    first = tensors[0]

    def joined(readers: Sequence[Callable[[int, int], Parts]]) -> Callable[[int, int], Parts]:
        def read(start: int, stop: int) -> Parts:
            import numpy as np

            found = []
            for index in range(start // first.rows, -(-stop // first.rows)):
                base = index * first.rows
                found.append(readers[index](max(start - base, 0), min(stop - base, first.rows)))
            if len(found) == 1:
                return found[0]
            return {part: np.concatenate([one[part] for one in found]) for part in found[0]}

        return read

    scales = [t.read_scales for t in tensors if t.read_scales is not None]
    return SourceTensor(
        name,
        (len(tensors), *first.shape),
        first.encoding,
        joined([t.read_rows for t in tensors]),
        joined(scales) if len(scales) == len(tensors) else None,
        any(t.decoded for t in tensors),
    )


@dataclass(frozen=True)
class Listed:
    """A file that is read over the network: its size in bytes, and the SHA-256 that is listed for
    it, which nobody has checked."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from.

    ``kind`` is "hf", "gguf" or "mlx" (what the files are), ``repo`` and ``revision`` (the commit
    hash) are set when it came from the Hub, ``path`` is the local file or folder and ``files``
    every file that was or may be read, for hashing and for the record of a run.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]
    repo: str | None = None
    revision: str | None = None
    #: Those of ``files`` that are not on this disk.
    listed: Mapping[Path, Listed] = field(default_factory=dict, compare=False)


class Tensors(Mapping[str, SourceTensor]):
    """Source tensors by canonical name, in the order of the source."""

    def __init__(self, tensors: dict[str, SourceTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass
class Checkpoint(AbstractContextManager["Checkpoint"]):
    """A model at rest.

    ``config`` is config.json as Hugging Face writes it (made up from the metadata for a GGUF
    file); ``tokenizer`` is ``None`` if the source has none. ``name`` is a short name for files.
    """

    name: str
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: TokenizerSpec | None
    generation_config: dict[str, Any]
    origin: Origin
    #: The licence that the model card or the GGUF metadata names, as an identifier.
    license: str | None = None
    #: The Hub id that a model card or the GGUF metadata names as the base.
    base_model: str | None = None
    #: How a Hugging Face checkpoint is quantized, in a few words: "gptq, 4 bits".
    quantized: str | None = None
    #: What was merged into the tensors (``mlxedge.sources.adapter``), for the record.
    adapter: dict[str, Any] | None = None
    #: What whoever converts it should know.
    notes: tuple[str, ...] = ()
    #: What holds parts of files that are read over the network.
    cache: BlockCache | None = field(default=None, repr=False)
    on_close: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def has_weights_here(self) -> bool:
        """Whether weights can be read at no cost: an inspection on the Hub has headers only."""
        return any(file.suffix in (".safetensors", ".gguf") for file in self.origin.files)

    def close(self) -> None:
        self.on_close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
