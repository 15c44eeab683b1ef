"""Tokenizers between Hugging Face's files and GGUF's metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.vocabularies import (
    CONTROL,
    CONTROL_TOKENS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    USER_TOKENS,
    byte_level_files,
    byte_level_metadata,
    raw_bpe_metadata,
    sentencepiece_metadata,
    unigram_metadata,
)

from mlxedge.errors import TokenizerError
from mlxedge.gguf_values import GgufValue, Metadata, array, boolean, string, u32
from mlxedge.sources.gguf import read_gguf
from mlxedge.tokenizer import TokenizerSpec, from_gguf, load, to_gguf

KEY = "tokenizer.ggml."


def values(metadata: Metadata) -> dict[str, tuple[str, str | None, Any]]:
    """Metadata in a form that can be compared."""
    return {
        key: (
            value.kind,
            value.item,
            np.asarray(value.value, object).tolist() if value.kind == "array" else value.value,
        )
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }


def rebuilt(metadata: Metadata, **config: Any) -> Metadata:
    """The metadata as it is made from the Hugging Face files alone."""
    return to_gguf(TokenizerSpec(from_gguf(metadata).files), config)


def test_a_real_model_comes_back_as_it_was(smollm2: Path) -> None:
    metadata = read_gguf(smollm2).metadata
    assert values(to_gguf(from_gguf(metadata), {})) == values(metadata)


def test_a_real_model_comes_back_from_its_files_alone(smollm2: Path) -> None:
    metadata = read_gguf(smollm2).metadata
    said = {KEY + "add_eos_token": ("bool", None, False)}  # what was left open is said
    assert values(rebuilt(metadata, vocab_size=49152)) == values(metadata) | said


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "dbrx", "tekken"])
def test_byte_level_metadata_comes_back_from_files_alone(pre: str) -> None:
    metadata = byte_level_metadata(pre, add_bos=True)
    assert values(rebuilt(metadata)) == values(metadata)


def test_sentencepiece_metadata_comes_back_from_files_alone() -> None:
    """All but the scores, which keep their order."""
    metadata = sentencepiece_metadata()
    made = rebuilt(metadata)
    before, after = values(metadata), values(made)
    old, new = before.pop(KEY + "scores"), after.pop(KEY + "scores")
    assert after == before
    merged = [
        i
        for i, (text, kind) in enumerate(
            zip(before[KEY + "tokens"][2], before[KEY + "token_type"][2])
        )
        if kind == NORMAL and len(text) > 1
    ]
    order = [sorted(merged, key=scores[2].__getitem__) for scores in (old, new)]
    assert order[0] == order[1]


@pytest.mark.parametrize("space_prefix", [True, False])
@pytest.mark.parametrize("merge_spaces", [True, False])
def test_unigram_metadata_comes_back_from_files_alone(
    merge_spaces: bool, space_prefix: bool
) -> None:
    metadata = unigram_metadata(merge_spaces, space_prefix)
    expected = values(metadata)
    tokens, scores = expected[KEY + "tokens"][2], expected[KEY + "scores"][2]
    for number in [i for i, text in enumerate(tokens) if text in ("<tool_call>", "<extra_id_0>")]:
        scores[number] = 0.0  # their score is never looked at
    # Merging spaces puts one before the first word in any case.
    expected[KEY + "add_space_prefix"] = ("bool", None, space_prefix or merge_spaces)
    assert values(rebuilt(metadata, vocab_size=len(tokens))) == expected


def test_gemma4_metadata_comes_back_from_files_alone() -> None:
    metadata = raw_bpe_metadata()
    texts = list(metadata[KEY + "tokens"].value)
    kinds = list(metadata[KEY + "token_type"].value)
    texts += ["<|tool_response>", "<|tool_call>", "</s>", "<|turn>"]
    kinds += [CONTROL, USER_DEFINED, NORMAL, CONTROL]
    metadata |= {
        KEY + "tokens": array("str", texts),
        KEY + "token_type": array("i32", kinds),
        KEY + "scores": array("f32", [-1000.0] * len(texts)),
    }
    expected = values(metadata)
    kinds[texts.index("<|tool_response>")] = USER_DEFINED  # as the converter writes it
    expected[KEY + "token_type"] = ("array", "i32", kinds)
    for key, value in (("add_bos_token", True), ("add_eos_token", False)):
        expected[KEY + key] = ("bool", None, value)
    expected[KEY + "add_space_prefix"] = ("bool", None, False)
    assert values(rebuilt(metadata)) == expected
    ends = load(from_gguf(metadata)).end_ids
    assert texts.index("<|tool_response>") in ends
    assert texts.index("</s>") not in ends


def test_merges_that_llama_cpp_cannot_run_are_refused() -> None:
    files = dict(from_gguf(sentencepiece_metadata()).files)
    document = json.loads(files["tokenizer.json"])
    del document["model"]["merges"][5]
    files["tokenizer.json"] = json.dumps(document).encode()
    with pytest.raises(TokenizerError, match="merges only some of the pairs"):
        to_gguf(TokenizerSpec(files), {})


def test_a_name_by_hand_replaces_the_files() -> None:
    spec = from_gguf(byte_level_metadata("gpt-2"))
    assert to_gguf(spec, {}, pre="falcon")[KEY + "pre"].value == "falcon"
    with pytest.raises(TokenizerError, match="'x' is not one that"):
        to_gguf(spec, {}, pre="x")


def test_kinds_of_tokens_and_gaps() -> None:
    files = byte_level_files(
        config={"added_tokens_decoder": {"1000": {"content": "<|odd|>", "special": False}}}
    )
    made = to_gguf(TokenizerSpec(files), {"vocab_size": 1003})
    tokens, kinds = made[KEY + "tokens"].value, made[KEY + "token_type"].value
    by_text = dict(zip(tokens, kinds))
    assert len(tokens) == len(kinds) == 1003
    assert [by_text[text] for text in CONTROL_TOKENS] == [CONTROL] * 3
    assert [by_text[text] for text in USER_TOKENS] == [USER_DEFINED] * 2
    assert by_text["<|odd|>"] == CONTROL
    assert by_text["!"] == NORMAL
    assert tokens[1000:] == ["<|odd|>", "[PAD1001]", "[PAD1002]"]
    assert kinds[1001:] == [UNUSED, UNUSED]


def test_runs_of_spaces_are_no_control_tokens() -> None:
    """transformers may save them among the special tokens."""
    config = {"extra_special_tokens": ["    ", "<tool_call>"]}
    made = to_gguf(TokenizerSpec(byte_level_files(config=config)), {})
    by_text = dict(zip(made[KEY + "tokens"].value, made[KEY + "token_type"].value))
    assert (by_text["    "], by_text["<tool_call>"]) == (USER_DEFINED, CONTROL)


def test_user_tokens_are_written_with_spaces() -> None:
    files = dict(from_gguf(sentencepiece_metadata()).files)
    document = json.loads(files["tokenizer.json"])
    next(t for t in document["added_tokens"] if t["content"] == "<tool_call>")["content"] = "▁▁"
    number = document["model"]["vocab"].pop("<tool_call>")
    document["model"]["vocab"]["▁▁"] = number
    files["tokenizer.json"] = json.dumps(document).encode()
    assert to_gguf(TokenizerSpec(files), {})[KEY + "tokens"].value[number] == "  "


def test_an_added_token_without_an_embedding_is_left_out() -> None:
    files = byte_level_files(
        config={"added_tokens_decoder": {"2000": {"content": "<pad>", "special": True}}}
    )
    made = to_gguf(TokenizerSpec(files), {"vocab_size": 1000})
    assert "<pad>" not in made[KEY + "tokens"].value
    with pytest.raises(TokenizerError, match="500 embeddings"):
        to_gguf(TokenizerSpec(files), {"vocab_size": 500})


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        ({}, {}, {"bos": "<|im_start|>", "eos": "<|im_end|>"}),
        ({"bos_token": None}, {}, {"eos": "<|im_end|>"}),
        ({"bos_token": None}, {"bos_token_id": 7}, {"bos": 7, "eos": "<|im_end|>"}),
        ({"bos_token": None}, {"bos_token_id": [7]}, {"eos": "<|im_end|>"}),
        ({"bos_token": None}, {"bos_token_id": 10**6}, {"eos": "<|im_end|>"}),
        (
            {"pad_token": {"content": "<|endoftext|>"}, "unk_token": "<|endoftext|>"},
            {},
            {
                "bos": "<|im_start|>",
                "eos": "<|im_end|>",
                "padding": "<|endoftext|>",
                "unknown": "<|endoftext|>",
            },
        ),
        (
            {"sep_token": "!", "eot_token": "<|im_end|>", "suffix_token": "<tool_call>"},
            {},
            {
                "bos": "<|im_start|>",
                "eos": "<|im_end|>",
                "seperator": "!",
                "eot": "<|im_end|>",
                "fim_suf": "<tool_call>",
            },
        ),
    ],
)
def test_roles(config: dict[str, Any], model: dict[str, Any], expected: dict[str, Any]) -> None:
    made = to_gguf(TokenizerSpec(byte_level_files(config=config)), model)
    tokens = made[KEY + "tokens"].value
    roles = {
        key.removeprefix(KEY).removesuffix("_token_id"): value.value
        for key, value in made.items()
        if key.endswith("_token_id")
    }
    assert roles == {
        role: token if isinstance(token, int) else tokens.index(token)
        for role, token in expected.items()
    }


def with_post_processor(step: dict[str, Any] | None, **config: Any) -> Metadata:
    files = byte_level_files(config=config)
    document = {**json.loads(files["tokenizer.json"]), "post_processor": step}
    files["tokenizer.json"] = json.dumps(document).encode()
    return to_gguf(TokenizerSpec(files), {})


def template(*around: str) -> dict[str, Any]:
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if text == "A"
        else {"SpecialToken": {"id": text, "type_id": 0}}
        for text in around
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [0], "tokens": [t]} for t in around if t != "A"},
    }


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}


@pytest.mark.parametrize(
    ("step", "config", "bos", "eos"),
    [
        (None, {}, False, False),
        (None, {"add_bos_token": True}, True, False),
        (BYTE_LEVEL, {}, False, False),
        (template("<|im_start|>", "A"), {}, True, False),
        (template("A", "<|im_end|>"), {}, False, True),
        (template("<|im_start|>", "A", "<|im_end|>"), {}, True, True),
        (template("<|im_start|>", "A"), {"add_bos_token": False}, False, False),
        (template("<|im_start|>", "A"), {"add_eos_token": True}, False, True),
        (
            {"type": "Sequence", "processors": [BYTE_LEVEL, template("<|im_start|>", "A")]},
            {},
            True,
            False,
        ),
    ],
)
def test_what_is_added(step: Any, config: dict[str, Any], bos: bool, eos: bool) -> None:
    made = with_post_processor(step, **config)
    assert made[KEY + "add_bos_token"].value is bos
    assert made[KEY + "add_eos_token"].value is eos


def test_another_token_than_bos_cannot_be_added() -> None:
    with pytest.raises(TokenizerError, match=r"adds '<\|endoftext\|>' where .* '<\|im_start\|>'"):
        with_post_processor(template("<|endoftext|>", "A"))
    made = with_post_processor(template("<|endoftext|>", "A"), bos_token=None)
    assert made[KEY + "add_bos_token"].value is True
    assert KEY + "bos_token_id" in made


def test_chat_templates_by_name() -> None:
    named = [
        {"name": "default", "template": "d"},
        {"name": "tool use!", "template": "t"},
        {"name": "rag", "template": "r"},
    ]
    made = to_gguf(TokenizerSpec(byte_level_files(config={"chat_template": named})), {})
    assert made["tokenizer.chat_template"].value == "d"
    assert made["tokenizer.chat_template.tool_use_"].value == "t"
    assert made["tokenizer.chat_templates"] == array("str", ["tool_use_", "rag"])
    back = load(TokenizerSpec(from_gguf(made).files))
    assert back.render_chat([]) == "d"


@pytest.mark.parametrize("there", [True, False])
def test_a_prefix_space_is_only_mentioned_where_the_settings_do(there: bool) -> None:
    config = {"add_prefix_space": False} if there else {}
    made = to_gguf(TokenizerSpec(byte_level_files(config=config)), {})
    assert (KEY + "add_space_prefix" in made) is there


def broken(change: dict[str, GgufValue | None], spm: bool = False) -> Metadata:
    metadata = dict(sentencepiece_metadata() if spm else byte_level_metadata("gpt-2"))
    for key, value in change.items():
        if value is None:
            del metadata[key]
        else:
            metadata[key] = value
    return metadata


TOKENS = len(byte_level_metadata("gpt-2")[KEY + "tokens"].value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({KEY + "model": None}, "model is missing"),
        ({KEY + "model": u32(1)}, "is of type u32, expected str"),
        ({KEY + "model": string("bert")}, "WordPiece, which BERT and other encoders have"),
        ({KEY + "model": string("rwkv")}, "'rwkv'; only gpt2, gemma4, llama, t5"),
        ({KEY + "pre": string("nonesuch")}, "'nonesuch' is not one that"),
        ({KEY + "pre": string("whitespace")}, "'whitespace' has no equivalent"),
        ({KEY + "tokens": None}, "tokens is missing"),
        ({KEY + "tokens": array("str", [])}, "tokens is missing, empty"),
        ({KEY + "tokens": string("a b")}, "is of type str, expected an array of str"),
        ({KEY + "tokens": array("u8", [1, 2])}, "is of type u8"),
        ({KEY + "tokens": array("str", ["a"] * TOKENS)}, "'a' is token 0 and 1"),
        ({KEY + "token_type": array("i32", [1, 1])}, "has 2 items for"),
        ({KEY + "token_type": array("f32", [1.0] * TOKENS)}, "expected an array of i32"),
        ({KEY + "scores": array("f32", [1.0])}, "has 1 items for"),
        ({KEY + "scores": array("f32", [math.nan] * TOKENS)}, "token 0 has the score nan"),
        ({KEY + "merges": None}, "merges is missing"),
        ({KEY + "merges": array("str", ["ab"])}, "merge 0, 'ab'"),
        ({KEY + "merges": array("str", ["a ~nonesuch"])}, "joins no two tokens"),
        ({KEY + "bos_token_id": u32(TOKENS)}, f"is {TOKENS}, and the vocabulary has"),
        ({KEY + "bos_token_id": GgufValue("i32", -1)}, "is -1, and"),
        ({KEY + "eos_token_id": string("2")}, "is of type str"),
        ({KEY + "add_bos_token": u32(1)}, "is of type u32, expected bool"),
        ({KEY + "add_bos_token": boolean(True), KEY + "bos_token_id": None}, "is missing"),
        ({"tokenizer.chat_template": u32(1)}, "expected str"),
    ],
)
def test_malformed_metadata_is_a_tokenizer_error(
    change: dict[str, GgufValue | None], problem: str
) -> None:
    with pytest.raises(TokenizerError, match=problem):
        from_gguf(broken(change))


def test_a_piece_of_absurd_length_is_refused() -> None:
    texts = list(sentencepiece_metadata()[KEY + "tokens"].value)
    texts[300] = "x" * 5000
    with pytest.raises(TokenizerError, match="5000 characters"):
        from_gguf(broken({KEY + "tokens": array("str", texts)}, spm=True))


def test_arrays_of_numpy_are_read() -> None:
    metadata = byte_level_metadata("gpt-2")
    kinds = metadata[KEY + "token_type"]
    metadata[KEY + "token_type"] = array("i32", np.asarray(kinds.value, np.int32))
    assert from_gguf(metadata).files == from_gguf(byte_level_metadata("gpt-2")).files


def test_silence_has_the_meaning_that_llama_cpp_gives_it() -> None:
    """A missing name cuts as "default" does; "llama-bpe" adds BOS unless told not to."""
    silent = {KEY + "pre": None, KEY + "add_bos_token": None}
    assert load(from_gguf(broken(silent))).encode("a 1234")[0] != 0
    for pre, adds in (("llama-bpe", True), ("qwen2", False)):
        change = {KEY + "pre": string(pre), KEY + "add_bos_token": None}
        tokenizer = load(from_gguf(broken(change)))
        assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is adds
    assert load(from_gguf(broken({KEY + "add_bos_token": None}, spm=True))).encode("")[:1] == [1]


def test_wordpiece_is_refused_for_what_it_is() -> None:
    made = {
        "added_tokens": [],
        "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]",
                  "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    }  # fmt: skip
    with pytest.raises(TokenizerError, match="WordPiece, which BERT and other encoders have"):
        to_gguf(TokenizerSpec({"tokenizer.json": json.dumps(made).encode()}), {})
