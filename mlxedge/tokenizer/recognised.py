"""What belongs to a tiktoken vocabulary that is not written down in ``tiktoken``.

llama.cpp knows tokenizers by the ids that they give to one text (``pre_hashes``). A vocabulary is
tried with every way of cutting that llama.cpp has; where the ids are those that it has on its list
for that very way, they are those of the model, and the vocabulary with them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer import pre, ranks, tiktoken
from mlxedge.tokenizer.pre_hashes import CHECK_TEXT, NAMES_BY_HASH
from mlxedge.tokenizer.tiktoken import Known

#: Where settings name the special tokens, which then need not be known.
DECLARED = "added_tokens_decoder"


def find(raw: bytes, name: str, settings: Mapping[str, Any]) -> tuple[Known, list[bytes]]:
    """What is known of a vocabulary, and its tokens in the order of their ranks.

    Raises TokenizerError for a damaged file, and where the way of cutting or the special tokens are
    not to be found out.
    """
    tokens, known = tiktoken.read(raw, name), tiktoken.known(raw, name)
    what = f"{name}: a tiktoken vocabulary of {len(tokens)} tokens"
    advice = "put the model's tokenizer.json beside it"
    if known is not None:
        return known, tokens
    declared = settings.get(DECLARED)
    if not isinstance(declared, Mapping) or not declared:
        raise TokenizerError(
            f"{what} that mlxedge does not know, and no tokenizer_config.json that names its "
            f"special tokens ({DECLARED}): {advice}"
        )
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, Mapping) else bos
    named = (
        int(number)
        for number, token in declared.items()
        if number.isdecimal() and isinstance(token, Mapping) and token.get("content") == bos
    )
    known = _by_ids(raw, name, next(named, None))
    if known is None:
        raise TokenizerError(
            f"{what} that neither mlxedge nor llama.cpp knows; such a file does not say how text "
            f"is cut: {advice}"
        )
    return known, tokens


@functools.lru_cache(2)
def _by_ids(raw: bytes, name: str, bos: int | None) -> Known | None:
    """By the ids with BOS before them, as the tokenizers give them that add it, else without."""
    from mlxedge.tokenizer.files import byte_level_document
    from mlxedge.tokenizer.runtime import build

    vocab, merges = ranks.byte_level_vocabulary(tiktoken.read(raw, name))
    without: Known | None = None
    for ignore_merges in (False, True):
        tokenizer = build(byte_level_document(vocab, merges, pre.splitting(), ignore_merges))
        for family, expressions in pre.FAMILIES.items():
            small = byte_level_document({}, [], pre.splitting(*expressions))
            tokenizer.pre_tokenizer = build(small).pre_tokenizer
            ids = tokenizer.encode(CHECK_TEXT, add_special_tokens=False).ids
            for lead in ([bos] if bos is not None else [], []):
                found = _listed([*lead, *ids], family, ignore_merges)
                if found is None:
                    continue
                adds = ("bos_token",) if lead or pre.PRE[found].add_bos else ()
                made = Known(found, expressions, (), {}, adds, ignore_merges=ignore_merges)
                if lead:
                    return made
                without = without or made
    return without


def _listed(ids: Sequence[int], family: str, ignore_merges: bool) -> str | None:
    """llama.cpp's name for a tokenizer that gives these ids, if it cuts and merges like this."""
    name = NAMES_BY_HASH.get(hashlib.sha256(str(list(ids)).encode()).hexdigest())
    rules = pre.PRE.get(name or "")
    fits = rules is not None and (rules.family, rules.ignore_merges) == (family, ignore_merges)
    return name if fits else None
