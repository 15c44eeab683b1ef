"""A tokenizer at rest, as both file formats need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlxedge.gguf_values import GgufValue


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that a Hugging Face folder or a GGUF file says about its tokenizer.

    ``files`` holds the Hugging Face files by name (tokenizer.json, tokenizer_config.json,
    tokenizer.model, chat_template.jinja, …), as bytes: those of the folder, or ones made up from a
    GGUF file's metadata. ``gguf`` holds the ``tokenizer.*`` metadata of the GGUF file it came
    from, and is empty for a folder.
    """

    files: Mapping[str, bytes]
    gguf: Mapping[str, GgufValue] = field(default_factory=dict)
