"""A tokenizer's files as a folder needs them for mlx-lm and transformers to load it.

Both read a tokenizer.json with the libraries that they install. From other files they make one only
where a class of transformers is named that does, or they need another package: mistral-common for
tekken.json, tiktoken for its vocabularies.
"""

from __future__ import annotations

import json
from typing import Any

from mlxedge.tokenizer import ranks, tiktoken
from mlxedge.tokenizer.files import (
    document,
    read_json,
    sentencepiece_file,
    settings,
    special_tokens,
    template_ends,
)
from mlxedge.tokenizer.spec import TokenizerSpec

#: Classes of transformers 5 that make a tokenizer of a SentencePiece model alone, and the setting
#: without which they do not add what the model's own library adds.
_OF_SENTENCEPIECE = {
    f"{model}Tokenizer{fast}": setting
    for model, setting in (
        ("Llama", "add_bos_token"),
        ("CodeLlama", "add_bos_token"),
        ("Gemma", "add_bos_token"),
        ("T5", "tokenizer_class"),
    )
    for fast in ("", "Fast")
}
#: Of tokenizer_config.json: what is in tokenizer.json, or needs code that is not there.
_DROPPED = ("added_tokens_decoder", "auto_map")


def saved_files(spec: TokenizerSpec) -> dict[str, bytes]:
    """The files to write for a tokenizer: its own, and a tokenizer.json where it needs one.

    Raises TokenizerError if none can be made.
    """
    files = dict(spec.files)
    replaced = _replaced(spec)
    if replaced is None:
        return files
    made, config = document(spec), settings(spec)
    first, last = template_ends(made.get("post_processor"))
    written: dict[str, Any] = {k: v for k, v in config.items() if k not in _DROPPED}
    written |= special_tokens(config) | {
        "add_bos_token": first is not None,
        "add_eos_token": last is not None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    written.setdefault("clean_up_tokenization_spaces", False)
    files["tokenizer.json"] = json.dumps(made, ensure_ascii=False).encode()
    files["tokenizer_config.json"] = json.dumps(written, ensure_ascii=False, indent=2).encode()
    for name in replaced:
        del files[name]
    return files


def _replaced(spec: TokenizerSpec) -> tuple[str, ...] | None:
    """The files in whose place a tokenizer.json is needed, if one is. A SentencePiece model stays:
    its scores are nowhere else."""
    if "tokenizer.json" in spec.files:
        return None
    if ranks.TEKKEN in spec.files:
        return (ranks.TEKKEN,)
    if sentencepiece_file(spec) is not None:
        config = read_json(spec, "tokenizer_config.json")
        needed = _OF_SENTENCEPIECE.get(str(config.get("tokenizer_class")))
        return None if needed in config and "auto_map" not in config else ()
    if (name := tiktoken.find(spec.files)) is not None:
        return (name,)
    return None
