"""Vocabularies by rank, and tekken.json."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer import TokenizerSpec, load, to_gguf
from mlxedge.tokenizer.pre import FAMILIES
from mlxedge.tokenizer.ranks import byte_level_vocabulary

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [b"ab", b"bc", b"abc", b" a", "é".encode(), b"\xff\xfe"]


def test_merges_are_all_splits_by_rank() -> None:
    vocab, merges = byte_level_vocabulary([*BYTES, *WORDS])
    assert vocab["ab"] == 256
    assert vocab["Ġa"] == 259
    assert merges[:4] == [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    assert ["Ã", "©"] in merges


def test_a_token_of_no_two_others_is_an_error() -> None:
    with pytest.raises(TokenizerError, match=r"token 256, b'abc'"):
        byte_level_vocabulary([*BYTES, b"abc"])


def tekken(special: Any = None, **changes: Any) -> dict[str, bytes]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
        for rank, token in enumerate([*BYTES, *WORDS, b"beyond"])
    ]
    config = {
        "pattern": FAMILIES["tekken"][0],
        "default_vocab_size": 30 + 256 + len(WORDS),
        "default_num_special_tokens": 30,
        **changes,
    }
    made = {"config": config, "vocab": vocab, "special_tokens": special}
    return {"tekken.json": json.dumps(made).encode()}


def test_tekken() -> None:
    tokenizer = load(TokenizerSpec(tekken()))
    assert tokenizer.vocab_size == 292
    assert [tokenizer.token(i) for i in (1, 2, 3, 25)] == ["<s>", "</s>", "[INST]", "<SPECIAL_25>"]
    assert tokenizer.encode("abc") == [1, 30 + 258]
    assert tokenizer.encode("[INST]", parse_special=False) != [1, 3]
    assert tokenizer.end_ids == {2}
    made = to_gguf(TokenizerSpec(tekken()), {"vocab_size": 292})
    assert made["tokenizer.ggml.pre"].value == "tekken"
    assert made["tokenizer.ggml.add_bos_token"].value is True


def test_tekken_with_special_tokens_of_its_own() -> None:
    special = [{"rank": 0, "token_str": "<unk>"}, {"rank": 29, "token_str": "[THINK]"}]
    tokenizer = load(TokenizerSpec(tekken(special)))
    assert tokenizer.encode("[THINK]", add_special=False) == [29]
    assert tokenizer.token(1) == "<SPECIAL_1>"
    assert tokenizer.bos_id is None


@pytest.mark.parametrize(
    "files",
    [
        tekken([{"rank": 31, "token_str": "x"}]),
        tekken([{"rank": 1, "token_str": "x"}, {"rank": 2, "token_str": "x"}]),
        tekken([{"rank": 1, "token_str": "a"}]),
        tekken(pattern=None),
        tekken(default_vocab_size=1000),
        tekken(default_num_special_tokens="30"),
    ],
)
def test_a_bad_tekken_is_a_tokenizer_error(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerError, match="tekken"):
        load(TokenizerSpec(files))
