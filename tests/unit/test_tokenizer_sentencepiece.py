"""tokenizer.model files, written here byte by byte."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer import TokenizerSpec, load, to_gguf
from mlxedge.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, parse

Pieces = list[tuple[str, float, int]]

SPECIAL: Pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
BYTES: Pieces = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
WORDS: Pieces = [
    ("▁a", -0.0, NORMAL),
    ("ab", -1.0, NORMAL),
    ("▁ab", -2.0, NORMAL),
    ("bc", -3.0, NORMAL),
    ("▁", -4.0, NORMAL),
    ("a", -5.0, NORMAL),
    ("b", -6.0, NORMAL),
    ("c", -7.0, NORMAL),
    ("<tool>", 0.0, USER_DEFINED),
]


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def model(pieces: Pieces, kind: int = 2, prefix: bool = True, squeeze: bool = False) -> bytes:
    body = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, number))
        for text, score, number in pieces
    )
    rules = field(1, b"identity") + field(3, int(prefix)) + field(4, int(squeeze))
    return body + field(2, field(3, kind)) + field(3, rules)


def spec(raw: bytes, config: bytes = b'{"bos_token": "<s>", "eos_token": "</s>"}') -> TokenizerSpec:
    return TokenizerSpec({"tokenizer.model": raw, "tokenizer_config.json": config})


def tokens(raw: bytes, text: str, **options: Any) -> list[str]:
    tokenizer = load(spec(raw))
    return [tokenizer.token(number) for number in tokenizer.encode(text, **options)]


def test_pieces_are_read() -> None:
    found = parse(model([*SPECIAL, *WORDS]))
    assert [(p.text, p.score, p.kind) for p in found.pieces] == [*SPECIAL, *WORDS]
    assert (found.kind, found.space_prefix, found.remove_extra_spaces) == (2, True, False)


def test_the_best_score_is_merged_first() -> None:
    raw = model([*SPECIAL, *BYTES, *WORDS])
    assert tokens(raw, "abc") == ["<s>", "▁ab", "c"]
    # "▁a" (0) is merged before "ab" (-1), and "bc" (-3) only where no "b" was taken before.
    assert tokens(raw, "bc abc", add_special=False) == ["▁", "bc", "▁ab", "c"]


def test_unknown_characters_are_bytes() -> None:
    raw = model([*SPECIAL, *BYTES, *WORDS])
    assert tokens(raw, "aé", add_special=False) == ["▁a", "<0xC3>", "<0xA9>"]
    tokenizer = load(spec(raw))
    assert tokenizer.decode(tokenizer.encode("aé €", add_special=False)) == "aé €"


def test_special_pieces_stand_for_themselves() -> None:
    raw = model([*SPECIAL, *BYTES, *WORDS])
    assert tokens(raw, "a</s><tool>a", add_special=False) == ["▁a", "</s>", "<tool>", "▁a"]
    plain = tokens(raw, "</s><tool>", add_special=False, parse_special=False)
    assert plain[-1] == "<tool>"
    assert "</s>" not in plain


def test_the_space_before_a_text() -> None:
    raw = model([*SPECIAL, *BYTES, *WORDS], prefix=False)
    assert tokens(raw, "a a", add_special=False) == ["a", "▁a"]
    assert to_gguf(spec(raw), {})["tokenizer.ggml.add_space_prefix"].value is False


def test_runs_of_spaces_are_squeezed_where_the_model_says_so() -> None:
    kept = model([*SPECIAL, *BYTES, *WORDS])
    squeezed = model([*SPECIAL, *BYTES, *WORDS], squeeze=True)
    assert tokens(kept, "a  a", add_special=False) == ["▁a", "▁", "▁a"]
    assert tokens(squeezed, " a  a ", add_special=False) == ["▁a", "▁a"]


def test_metadata_keeps_scores_and_kinds() -> None:
    raw = model([*SPECIAL, *BYTES, *WORDS])
    made = to_gguf(spec(raw), {"vocab_size": 270})
    size = len(SPECIAL) + len(BYTES)
    assert made["tokenizer.ggml.model"].value == "llama"
    assert made["tokenizer.ggml.tokens"].value[-2:] == ["[PAD268]", "[PAD269]"]
    assert made["tokenizer.ggml.scores"].value[size : size + 8] == [-float(i) for i in range(8)]
    kinds = made["tokenizer.ggml.token_type"].value
    assert kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert kinds[size:] == [NORMAL] * 8 + [USER_DEFINED, 5, 5]
    assert made["tokenizer.ggml.add_bos_token"].value is True
    assert made["tokenizer.ggml.bos_token_id"].value == 1
    assert made["tokenizer.ggml.unknown_token_id"].value == 0


def test_a_unigram_model_takes_the_likeliest_pieces() -> None:
    pieces = [*SPECIAL, ("▁a", -1.0, 1), ("b", -1.0, 1), ("▁ab", -1.5, 1), ("▁", -9.0, 1)]
    raw = model(pieces, kind=1)
    assert tokens(raw, "ab", add_special=False) == ["▁ab"]
    assert to_gguf(spec(raw), {})["tokenizer.ggml.model"].value == "t5"


def test_the_roles_of_a_model_without_settings() -> None:
    """Names that are no special piece of the vocabulary have no role."""
    raw = model([*SPECIAL, *WORDS]) + field(2, field(3, 2) + field(48, b"</s>"))
    tokenizer = load(TokenizerSpec({"spiece.model": raw}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("a")[0] == 1
    bare = load(TokenizerSpec({"tokenizer.model": model(WORDS)}))
    assert (bare.bos_id, bare.eos_id) == (None, None)


def test_a_unigram_model_with_byte_pieces_is_not_written_to_gguf() -> None:
    """llama.cpp would give the unknown token where the model has bytes."""
    pieces = [*SPECIAL, ("▁a", -1.0, 1), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    with pytest.raises(TokenizerError, match="Unigram with byte fallback"):
        to_gguf(spec(model(pieces, kind=1)), {})


def test_what_a_user_types_is_no_special_piece() -> None:
    pieces = [*SPECIAL, ("▁", -3.0, 1), *((c, -3.0, 1) for c in "</s>unk")]
    tokenizer = load(spec(model(pieces, kind=1)))
    plain = tokenizer.encode("</s><unk>", add_special=False, parse_special=False)
    assert [tokenizer.token(i) for i in plain] == ["▁", *"</s><unk>"]
    parsed = tokenizer.encode("</s><unk>", add_special=False)
    assert [tokenizer.token(i) for i in parsed] == ["</s>", "<unk>"]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "holds no pieces"),
        (b'{"json": 1}', "not a SentencePiece model"),
        (model([("", float("nan"), 1)]), "no finite score"),
        (field(1, field(2, 0.0)), "no text"),
        (field(1, field(1, b"\xff")), "not a SentencePiece model"),
        (model([("x", 0.0, 9)]), "unknown kind"),
        (b"\x0a" + b"\xff" * 11, "too long"),
        (model(SPECIAL) + field(1, field(1, b"x") + field(2, 1)), "not a SentencePiece model"),
        (model(SPECIAL) + field(2, field(46, 1)), "not a SentencePiece model"),
        (model(SPECIAL) + field(3, field(2, 1)), "not a SentencePiece model"),
        (model([*SPECIAL, ("x" * 2000, 0.0, 1)]), "2000 characters"),
        (model(SPECIAL, kind=3), "kind 3"),
    ],
)
def test_a_bad_file_is_a_tokenizer_error(raw: bytes, problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        load(spec(raw))


@given(st.integers(0, 400), st.binary(max_size=12))
def test_a_damaged_file_never_fails_otherwise(at: int, damage: bytes) -> None:
    raw = model([*SPECIAL, *WORDS])
    for broken in (raw[:at], raw[:at] + damage + raw[at + len(damage) :]):
        with contextlib.suppress(TokenizerError):
            assert parse(broken).pieces
