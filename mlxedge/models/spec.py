"""What one file per ``model_type`` declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from mlxedge.gguf_values import GgufValue, Metadata

#: How the rows of a tensor are laid out in GGUF against Hugging Face. "rope_q" and "rope_k" stand
#: for the interleaved rotary order that llama.cpp's llama graph expects.
RowOrder = Literal["same", "rope_q", "rope_k"]


@dataclass(frozen=True)
class Name:
    """A tensor in each world; ``{i}`` is the layer, and both names end in ``.weight`` or ``.bias``
    as given."""

    hf: str
    gguf: str
    rows: RowOrder = "same"


@dataclass(frozen=True)
class ModelSpec:
    """An architecture: its names, its metadata, its layout.

    ``gguf_metadata(config)`` gives the architecture's GGUF keys without the ``general.`` and
    ``tokenizer.`` ones; ``config_from_gguf(metadata)`` is the way back; ``mlx_config(config)`` the
    config.json that mlx-lm reads right, whichever style ``config`` was written in.
    ``extra_gguf_tensors(config)`` makes tensors that only GGUF has (``rope_freqs.weight``).
    """

    model_type: str
    gguf_arch: str
    names: tuple[Name, ...]
    gguf_metadata: Callable[[dict[str, Any]], Metadata]
    config_from_gguf: Callable[[Mapping[str, GgufValue]], dict[str, Any]]
    mlx_config: Callable[[dict[str, Any]], dict[str, Any]]
    extra_gguf_tensors: Callable[[dict[str, Any]], dict[str, Any]] = field(
        default=lambda config: {}
    )
    #: Source tensors that carry no weights (buffers) and are dropped.
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)

    @cached_property
    def _to_gguf(self) -> list[tuple[re.Pattern[str], Name]]:
        return [(_pattern(n.hf), n) for n in self.names]

    @cached_property
    def _from_gguf(self) -> list[tuple[re.Pattern[str], Name]]:
        return [(_pattern(n.gguf), n) for n in self.names]

    def to_gguf(self, hf_name: str) -> tuple[str, RowOrder] | None:
        """The GGUF name and row order of a Hugging Face tensor, or ``None`` if it is unknown."""
        for pattern, name in self._to_gguf:
            if match := pattern.fullmatch(hf_name):
                return name.gguf.format(**match.groupdict()), name.rows
        return None

    def from_gguf(self, gguf_name: str) -> tuple[str, RowOrder] | None:
        """The Hugging Face name and row order of a GGUF tensor, or ``None`` if it is unknown."""
        for pattern, name in self._from_gguf:
            if match := pattern.fullmatch(gguf_name):
                return name.hf.format(**match.groupdict()), name.rows
        return None


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)"))
