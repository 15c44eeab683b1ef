"""Running a tokenizer: ids, text, streams, chats."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.hard_text import HARD
from oracles.vocabularies import byte_level_files, sentencepiece_metadata
from tokenizers import Tokenizer as Library
from tokenizers import models

from mlxedge.errors import TemplateError, TokenizerError
from mlxedge.tokenizer import Tokenizer, TokenizerSpec, from_gguf, load

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTE_LEVEL = load(TokenizerSpec(byte_level_files()))
SENTENCEPIECE = load(from_gguf(sentencepiece_metadata()))
BOTH = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"]
)


def made(**config: Any) -> Tokenizer:
    return load(TokenizerSpec(byte_level_files(config=config)))


def changed(change: dict[str, Any], **config: Any) -> Tokenizer:
    """The byte-level tokenizer with another tokenizer.json."""
    files = byte_level_files(config=config)
    document = {**json.loads(files["tokenizer.json"]), **change}
    return load(TokenizerSpec({**files, "tokenizer.json": json.dumps(document).encode()}))


@BOTH
@pytest.mark.parametrize("text", HARD)
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer is SENTENCEPIECE:
        # It cannot tell its mark from a space, and puts a space after every token of the user's.
        text = re.sub("\n+", "\n", text.replace("▁", " "))
    assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    stream = tokenizer.stream(**options)
    return "".join(map(stream.add, ids)) + stream.finish()


@BOTH
@pytest.mark.parametrize("text", HARD)
def test_a_stream_gives_the_same_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert streamed(tokenizer, ids, skip_special=True) == tokenizer.decode(ids, skip_special=True)


@given(st.text(max_size=30))
def test_a_stream_hands_out_whole_characters_only(text: str) -> None:
    ids = [BYTE_LEVEL.encode(c, add_special=False, parse_special=False) for c in text]
    stream = BYTE_LEVEL.stream()
    for character, tokens in zip(text, ids):
        parts = [stream.add(token) for token in tokens]
        assert "".join(parts) == character
        assert all(part in ("", character) for part in parts)


@BOTH
def test_an_unfinished_character_is_dropped_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é", add_special=False, parse_special=False)
    byte_ids = ids if len(ids) > 1 else tokenizer.encode("𓀀", add_special=False)
    stream = tokenizer.stream()
    assert [stream.add(token).strip() for token in byte_ids[:-1]] == [""] * (len(byte_ids) - 1)
    assert stream.finish() == ""


def test_a_replacement_character_in_the_text_is_not_held_back() -> None:
    ids = BYTE_LEVEL.encode("a\ufffd", add_special=False)
    stream = BYTE_LEVEL.stream()
    assert "".join(map(stream.add, ids)) == "a\ufffd"


def test_bytes_that_are_no_text_come_out_as_replacement_characters() -> None:
    lone = BYTE_LEVEL.encode("é", add_special=False)[-1:]
    stream = BYTE_LEVEL.stream()
    letter = BYTE_LEVEL.encode("a", add_special=False)
    if BYTE_LEVEL.token(lone[0]) != "©":  # the second byte of é
        lone = [next(i for i in range(BYTE_LEVEL.vocab_size) if BYTE_LEVEL.token(i) == "©")]
    assert "".join(map(stream.add, lone + letter)) == "\ufffda"


def test_a_stream_over_an_unusual_decoder() -> None:
    vocab = {"[UNK]": 0, "un": 1, "##able": 2, "to": 3}
    library = Library(models.WordPiece(vocab, unk_token="[UNK]"))
    document = json.loads(library.to_str())
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    tokenizer = load(TokenizerSpec({"tokenizer.json": json.dumps(document).encode()}))
    assert streamed(tokenizer, [1, 2, 3]) == tokenizer.decode([1, 2, 3]) == "unable to"


def test_text_of_control_tokens_can_be_read_as_text() -> None:
    text = "a<|im_end|>b<tool_call>c"
    control, user = (BYTE_LEVEL.encode(t)[0] for t in ("<|im_end|>", "<tool_call>"))
    assert control in BYTE_LEVEL.encode(text)
    plain = BYTE_LEVEL.encode(text, parse_special=False)
    assert control not in plain
    assert user in plain  # a token of the user's, which controls nothing
    assert BYTE_LEVEL.decode(plain) == text
    assert control in BYTE_LEVEL.encode(text)  # and nothing stays switched


@pytest.mark.parametrize("text", ["<|sep|>", "<pad>", "<｜tool▁calls｜>"])
def test_what_looks_like_a_control_token_is_one(text: str) -> None:
    """Some models forget to say so (``special`` is false in their tokenizer.json)."""
    added = {"id": 5000, "content": text, "special": False}
    tokenizer = made(added_tokens_decoder={"5000": added})
    assert tokenizer.encode(text) == [5000]
    assert 5000 not in tokenizer.encode(text, parse_special=False)


def test_tokenizers_are_shared_between_threads() -> None:
    tokenizer = made(chat_template=CHATML)
    expected = [(tokenizer.encode(t), tokenizer.encode(t, parse_special=False)) for t in HARD]
    found: list[Any] = []

    def work() -> None:
        found.append(
            [(tokenizer.encode(t), tokenizer.encode(t, parse_special=False)) for t in HARD]
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_no_prompt_is_cut_or_filled() -> None:
    tokenizer = changed(
        {
            "truncation": {
                "direction": "Right",
                "max_length": 2,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            "padding": {
                "strategy": {"Fixed": 9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "!",
            },
        }
    )
    assert tokenizer.encode("one two three") == BYTE_LEVEL.encode("one two three")
    assert tokenizer.encode("a") == BYTE_LEVEL.encode("a")


def test_roles() -> None:
    assert BYTE_LEVEL.token(BYTE_LEVEL.bos_id or 0) == "<|im_start|>"
    assert BYTE_LEVEL.token(BYTE_LEVEL.eos_id or 0) == "<|im_end|>"
    assert BYTE_LEVEL.token(BYTE_LEVEL.vocab_size) == f"[PAD{BYTE_LEVEL.vocab_size}]"
    assert made(bos_token=None).bos_id is None
    assert made(bos_token={"content": "<|im_end|>", "__type": "AddedToken"}).bos_id is not None


@pytest.mark.parametrize(
    ("declared", "more"), [(None, set()), (7, {7}), ([7, 8], {7, 8}), ("x", set())]
)
def test_where_generation_ends(declared: Any, more: set[int]) -> None:
    tokenizer = load(TokenizerSpec(byte_level_files()), {"eos_token_id": declared})
    by_text = {tokenizer.encode(text)[0] for text in ("<|endoftext|>", "<|im_end|>")}
    assert tokenizer.end_ids == by_text | more


def test_end_texts_that_are_no_control_tokens_end_nothing() -> None:
    added = {"5000": {"content": "</s>", "special": False}}
    assert 5000 not in made(added_tokens_decoder=added).end_ids


def test_a_channel_separator_is_no_end() -> None:
    """<|end|> separates channels where <|return|> and <|call|> exist."""
    texts = ["<|end|>", "<|return|>", "<|call|>"]
    added = {str(5000 + i): {"content": t, "special": True} for i, t in enumerate(texts)}
    assert {5001, 5002} <= made(added_tokens_decoder=added).end_ids
    assert 5000 not in made(added_tokens_decoder=added).end_ids
    only = {"5000": {"content": "<|end|>", "special": True}}
    assert 5000 in made(added_tokens_decoder=only).end_ids


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_a_chat_begins_with_one_bos_and_never_ends_with_eos(
    bos: bool, eos: bool, writes_bos: bool
) -> None:
    template = ("{{ bos_token }}" if writes_bos else "") + "{{ messages[0].content }}"
    tokenizer = made(
        add_bos_token=bos, add_eos_token=eos, chat_template=template, bos_token="<|endoftext|>"
    )
    ids = tokenizer.chat([{"role": "user", "content": "Hi"}])
    expected = tokenizer.encode("Hi", add_special=False)
    assert ids == ([tokenizer.bos_id] if bos or writes_bos else []) + expected


def test_chat_templates_by_name() -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = made(chat_template=named)
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=[{"type": "function"}]) == "tools"
    files = byte_level_files(config={"chat_template": "old"})
    files["chat_template.jinja"] = b"new"
    files["additional_chat_templates/tool_use.jinja"] = b"new tools"
    tokenizer = load(TokenizerSpec(files))
    assert tokenizer.render_chat([]) == "new"
    assert tokenizer.render_chat([], tools=[1]) == "new tools"


def test_without_a_chat_template() -> None:
    assert not BYTE_LEVEL.has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        BYTE_LEVEL.chat([])
    with pytest.raises(TemplateError, match='named "default", only rag'):
        made(chat_template=[{"name": "rag", "template": "x"}]).chat([])


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        BYTE_LEVEL.encode("a\ud800")


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"]])
def test_what_is_no_id(ids: Any) -> None:
    with pytest.raises(TokenizerError, match="not token ids"):
        BYTE_LEVEL.decode(ids)


def from_parts(kind: str | None, **more: bytes) -> TokenizerSpec:
    model = json.loads(byte_level_files()["tokenizer.json"])["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>"}
    added = {"<|endoftext|>": len(model["vocab"])}
    return TokenizerSpec(
        {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": merges.encode(),
            "added_tokens.json": json.dumps(added).encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
            **more,
        }
    )


@pytest.mark.parametrize("kind", [None, "GPT2Tokenizer"])
def test_vocab_and_merges_alone(kind: str | None) -> None:
    tokenizer = load(from_parts(kind))
    for text in HARD:
        if "<" not in text and "    " not in text:
            assert tokenizer.encode(text) == BYTE_LEVEL.encode(text)
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_id]


def test_qwen_cuts_in_its_own_way() -> None:
    qwen, gpt2 = load(from_parts("Qwen2Tokenizer")), load(from_parts(None))
    assert qwen.encode("3.14") != gpt2.encode("3.14") or qwen.encode("e\u0301") == qwen.encode("é")
    assert qwen.encode("e\u0301") == qwen.encode("é")
    assert gpt2.encode("e\u0301") != gpt2.encode("é")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (TokenizerSpec({}), "no tokenizer found"),
        (TokenizerSpec({"vocab.txt": b"a"}), "there is vocab.txt"),
        (TokenizerSpec({"tekken.json": b"{}"}), "tekken.json is not one of Mistral's"),
        (TokenizerSpec({"tokenizer.json": b"{"}), "not valid JSON"),
        (TokenizerSpec({"tokenizer.json": b"[" * 100_000}), "not valid JSON"),
        (TokenizerSpec({"tokenizer.json": b"[1]"}), "no JSON object"),
        (TokenizerSpec({"tokenizer.json": b"\xff\xfe"}), "not valid JSON"),
        (TokenizerSpec({"tokenizer.json": b'{"model": {}}'}), "no model with a vocabulary"),
        (TokenizerSpec({"tokenizer.json": b'{"model": {"vocab": {}, "type": "?"}}'}), "be built"),
        (TokenizerSpec({"tokenizer.json": b'{"model": {"vocab": 5}}'}), "vocabulary"),
        (TokenizerSpec({"tokenizer.json": b'{"model": {"vocab": {"a": "b"}}}'}), "vocabulary"),
        (
            TokenizerSpec({"tokenizer.json": b'{"model": {"vocab": {}}, "added_tokens": [3]}'}),
            "added_tokens",
        ),
        (from_parts("FunnyTokenizer"), "FunnyTokenizer without tokenizer.json"),
        (from_parts(None, **{"merges.txt": b"a b c\n"}), "merges.txt, line 1"),
        (from_parts(None, **{"chat_template.jinja": b"\xff"}), "not UTF-8"),
    ],
)
def test_bad_files_are_tokenizer_errors(spec: TokenizerSpec, problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        load(spec)
