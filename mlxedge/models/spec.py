"""What one file per ``model_type`` declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.gguf_values import GgufValue, Metadata

if TYPE_CHECKING:
    import numpy as np

#: How the rows of a tensor are laid out in GGUF against Hugging Face. "rope_q" and "rope_k" stand
#: for the interleaved rotary order that llama.cpp's llama graph expects.
RowOrder = Literal["same", "rope_q", "rope_k"]

Config = dict[str, Any]


@dataclass(frozen=True)
class Name:
    """One tensor in both worlds; ``{i}`` stands for the layer."""

    hf: str
    gguf: str
    rows: RowOrder = "same"


@dataclass(frozen=True)
class ModelSpec:
    """An architecture: its names, its metadata, its layout.

    Every ``config`` below is a normalised one (``mlxedge.models.normalise``).

    - ``gguf_metadata(config)``: the architecture's GGUF keys, without ``general.`` and
      ``tokenizer.``.
    - ``gguf_extra(config)``: tensors f32 that only GGUF has, by name (``rope_freqs.weight``).
    - ``config_from_gguf(metadata, extra)``: the way back; ``extra`` holds those tensors, f32.
    - ``mlx_config(config)``: the config.json that mlx-lm reads right.
    - ``objections(config, format)``: why the runtime of ``format`` ("gguf", "mlx") cannot compute
      this model, or nothing.
    """

    model_type: str
    architecture: str
    gguf_arch: str
    names: tuple[Name, ...]
    gguf_metadata: Callable[[Config], Metadata]
    gguf_extra: Callable[[Config], dict[str, np.ndarray]]
    config_from_gguf: Callable[[Mapping[str, GgufValue], Mapping[str, np.ndarray]], Config]
    mlx_config: Callable[[Config], Config]
    objections: Callable[[Config, str], list[str]]
    #: GGUF tensors that ``config_from_gguf`` consumes.
    gguf_only: tuple[str, ...] = ("rope_freqs.weight",)
    #: Source tensors that carry no weights (buffers) and are dropped.
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    @cached_property
    def _by_hf(self) -> list[tuple[re.Pattern[str], Name]]:
        return [(_pattern(n.hf), n) for n in self.names]

    @cached_property
    def _by_gguf(self) -> list[tuple[re.Pattern[str], Name]]:
        return [(_pattern(n.gguf), n) for n in self.names]

    def to_gguf(self, hf_name: str) -> tuple[str, RowOrder] | None:
        """The GGUF name and row order of a Hugging Face tensor, or ``None`` if it is unknown."""
        for pattern, name in self._by_hf:
            if match := pattern.fullmatch(hf_name):
                return name.gguf.format(**match.groupdict()), name.rows
        return None

    def from_gguf(self, gguf_name: str) -> tuple[str, RowOrder] | None:
        """The Hugging Face name and row order of a GGUF tensor, or ``None`` if it is unknown."""
        for pattern, name in self._by_gguf:
            if match := pattern.fullmatch(gguf_name):
                return name.hf.format(**match.groupdict()), name.rows
        return None

    def is_ignored(self, hf_name: str) -> bool:
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)"))
