"""Vocabularies that are a list of byte strings by rank, and Mistral's tekken.json, which holds one.

Such a tokenizer merges whichever two neighbours make the token of the lowest rank. In a
tokenizer.json that is a byte-level BPE whose merges are all splits of every token, by rank.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer.stream import byte_characters

TEKKEN = "tekken.json"
#: Special tokens of the files that name none (versions up to 7), by id; of
#: mistral_common/tokens/tokenizers/tekken.py of mistral-common 1.13.1.
_OLD_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
#: The roles of tekken's special tokens, which the files do not tell.
TEKKEN_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}


def byte_level_vocabulary(
    tokens: Sequence[bytes],
) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary (token → rank) and merges, as a byte-level tokenizer.json spells them.

    ``tokens`` are in the order of their ranks. Raises TokenizerError if a token of several bytes
    cannot be made of two others.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    spelt = {byte: character for character, byte in byte_characters().items()}
    texts = ["".join(spelt[byte] for byte in token) for token in tokens]
    merges: list[list[str]] = []
    for token, text in zip(tokens, texts):
        cuts = [
            cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks
        ]
        if len(token) > 1 and not cuts:
            raise TokenizerError(f"token {ranks[token]}, {token!r}, is made of no two others")
        cuts.sort(key=lambda cut: (ranks[token[:cut]], ranks[token[cut:]]))
        merges += [[text[:cut], text[cut:]] for cut in cuts]
    return {text: rank for rank, text in enumerate(texts)}, merges


def tekken(found: Mapping[str, Any]) -> tuple[list[str], list[bytes], str]:
    """The special tokens, the other tokens and the cutting expression of a tekken.json.

    Special tokens come first in the ids; reserved ones are named ``<SPECIAL_i>``. Raises
    TokenizerError if the file is not one.
    """
    try:
        config = found["config"]
        count, size = config["default_num_special_tokens"], config["default_vocab_size"]
        pattern, listed = config["pattern"], found.get("special_tokens")
        special = [f"<SPECIAL_{i}>" for i in range(count)]
        if listed is None:
            special[: len(_OLD_SPECIAL)] = _OLD_SPECIAL
        for token in listed or ():
            special[token["rank"]] = token["token_str"]
        ranked = sorted(found["vocab"], key=lambda token: token["rank"])[: size - count]
        tokens = [base64.b64decode(token["token_bytes"], validate=True) for token in ranked]
        right = (
            isinstance(pattern, str)
            and all(isinstance(text, str) for text in special)
            and len(set(special)) == count
            and len(set(tokens)) == size - count
            and [token["rank"] for token in ranked] == list(range(size - count))
        )
    except (KeyError, TypeError, ValueError, IndexError, binascii.Error) as error:
        raise TokenizerError(f"{TEKKEN} is not one of Mistral's: {error!r}") from error
    if not right:
        raise TokenizerError(f"{TEKKEN}: tokens are missing, or stand there twice")
    return special, tokens, pattern
