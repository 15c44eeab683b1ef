"""Tokenizers of real models: their own libraries, llama.cpp and ours give the same ids."""

from __future__ import annotations

import base64
import functools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from oracles.hard_text import HARD
from oracles.llama_cpp import LlamaCpp
from oracles.rank_merging import encode
from oracles.real_tokenizers import LLAMA3, REAL
from oracles.vocabularies import vocabulary_file
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import normalizers

from mlxedge.gguf_values import Metadata
from mlxedge.tokenizer import Tokenizer, TokenizerSpec, from_gguf, load, tiktoken, to_gguf

WAYS = [(special, parse) for special in (True, False) for parse in (True, False)]
KINDS = {
    "smollm2": ("gpt2", "smollm"),
    "mistral-v1": ("llama", "default"),
    "mistral-v3": ("llama", "default"),
    "tekken": ("gpt2", "tekken"),
    "deepseek-v4": ("gpt2", "joyai-llm"),
    "moonshine": ("llama", "default"),
    "llama3": ("gpt2", "llama-bpe"),
    "llama3-tiktoken": ("gpt2", "llama-bpe"),
    "qwen": ("gpt2", "qwen2"),
    "qwen-tiktoken": ("gpt2", "qwen2"),
    "gpt-2": ("gpt2", "gpt-2"),
    "seqio-t5": ("t5", "default"),
}
_NOT_NFC = {text for text in HARD if normalizers.NFC().normalize_str(text) != text}
#: Texts on which llama.cpp is known to give other ids than the model's own library.
KNOWN = {
    # Qwen normalises to NFC, llama.cpp does not; and it takes "</s>", here an ordinary token, for
    # one that ends a text.
    **dict.fromkeys(
        ("qwen", "qwen-tiktoken"), _NOT_NFC | {text for text in HARD if "</s>" in text}
    ),
    # llama.cpp's expression for Tekken leaves out the marks that are part of a word.
    "tekken": {text for text in HARD if any("\u0900" <= c < "\u0f00" for c in text)},
}


@functools.cache
def spec(name: str) -> TokenizerSpec:
    return TokenizerSpec(REAL[name]())


@functools.cache
def ours(name: str) -> Tokenizer:
    return load(spec(name))


@functools.cache
def metadata(name: str) -> Metadata:
    return to_gguf(spec(name), {})


def differences(tokenizer: Tokenizer, made: Metadata, folder: Path) -> set[str]:
    """The hard texts on which llama.cpp differs, in any way of encoding."""
    path = folder / "vocabulary.gguf"
    path.write_bytes(vocabulary_file(made))
    with LlamaCpp(path, vocab_only=True) as llama:
        return {
            text
            for text in HARD
            for special, parse in WAYS
            if llama.tokenize(text, special, parse) != tokenizer.encode(text, special, parse)
        }


@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    made = metadata(name)
    assert (made["tokenizer.ggml.model"].value, made["tokenizer.ggml.pre"].value) == KINDS[name]
    assert differences(ours(name), made, tmp_path) <= KNOWN.get(name, set())


@pytest.mark.parametrize("name", ["mistral-v3", "tekken", "deepseek-v4", "seqio-t5"])
def test_the_way_back_from_gguf_is_llama_cpps(name: str, tmp_path: Path) -> None:
    assert differences(load(from_gguf(metadata(name))), metadata(name), tmp_path) == set()


#: Vocabularies by rank: what comes before a text is merged, and the special tokens before them.
RANKED: dict[str, tuple[str, str, Callable[[str], str], int]] = {
    "tekken": ("tekken.json", "", str, 1000),
    "llama3-tiktoken": ("tokenizer.model", LLAMA3, str, 0),
    "qwen-tiktoken": (
        "qwen.tiktoken",
        LLAMA3.replace("{1,3}", ""),
        lambda text: unicodedata.normalize("NFC", text),
        0,
    ),
}


@functools.cache
def ranked(name: str) -> tuple[dict[bytes, int], str]:
    """Ranks and cutting expression, read from the file."""
    file, pattern, _, special = RANKED[name]
    raw = spec(name).files[file]
    if file == "tekken.json":
        found = json.loads(raw)
        size = found["config"]["default_vocab_size"] - special
        tokens = [base64.b64decode(token["token_bytes"]) for token in found["vocab"][:size]]
        return {token: i for i, token in enumerate(tokens)}, found["config"]["pattern"]
    pairs = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}, pattern


@pytest.mark.parametrize("name", RANKED)
def test_ids_are_those_of_merging_by_rank(name: str) -> None:
    ranks, pattern = ranked(name)
    _, _, before, special = RANKED[name]
    for text in HARD:
        expected = [special + rank for rank in encode(before(text), ranks, pattern)]
        assert ours(name).encode(text, add_special=False, parse_special=False) == expected, text


def test_tiktoken_vocabularies_have_their_special_tokens() -> None:
    llama = ours("llama3-tiktoken")
    assert llama.vocab_size == 128256
    named = {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128009: "<|eot_id|>",
             128006: "<|start_header_id|>", 128255: "<|reserved_special_token_247|>"}  # fmt: skip
    assert {i: llama.token(i) for i in named} == named
    assert llama.encode("Hi<|eot_id|>") == [128000, 13347, 128009]
    assert (llama.bos_id, llama.eos_id) == (128000, 128001)
    assert 128009 in llama.end_ids
    # Llama 3 itself has no such token: its settings may say so.
    own = {"128008": {"content": "<|reserved_special_token_4|>", "special": True}}
    config = json.dumps({"added_tokens_decoder": own, "eos_token": "<|eot_id|>"}).encode()
    files = {**spec("llama3-tiktoken").files, "tokenizer_config.json": config}
    named_otherwise = load(TokenizerSpec(files))
    assert named_otherwise.token(128008) == "<|reserved_special_token_4|>"
    assert (named_otherwise.eos_id, named_otherwise.vocab_size) == (128009, 128256)
    qwen = ours("qwen-tiktoken")
    assert qwen.vocab_size == 151851
    assert qwen.encode("<|im_start|>a<|extra_204|>") == [151644, 64, 151850]
    assert qwen.end_ids >= {151643, 151645}


@pytest.mark.parametrize("name", ["llama3-tiktoken", "qwen-tiktoken"])
def test_vocabularies_are_recognised_by_their_ids(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if nothing were written down of them: llama.cpp's list tells how text is cut."""
    listed, files = ours(name), spec(name).files
    size = len(ranked(name)[0])
    declared = {
        str(i): {"content": listed.token(i), "special": True}
        for i in range(size, listed.vocab_size)
    }
    config: dict[str, object] = {"added_tokens_decoder": declared}
    if listed.bos_id is not None:
        config["bos_token"] = listed.token(listed.bos_id)
    monkeypatch.setattr(tiktoken, "_KNOWN", {})
    found = TokenizerSpec({**files, "tokenizer_config.json": json.dumps(config).encode()})
    tokenizer = load(found)
    assert tokenizer.vocab_size == listed.vocab_size
    for text in (text for text in HARD if text not in _NOT_NFC):
        assert tokenizer.encode(text) == listed.encode(text)
        assert tokenizer.encode(text, parse_special=False) == listed.encode(
            text, parse_special=False
        )
    assert to_gguf(found, {})["tokenizer.ggml.pre"].value == KINDS[name][1]


@pytest.mark.parametrize("name", [n for n in REAL if n != "smollm2" and "tiktoken" not in n])
def test_the_models_own_library_gives_the_same_ids(name: str) -> None:
    files = spec(name).files
    raw = files.get("tokenizer.model", files.get("spiece.model"))
    if raw is not None:
        own = sentencepiece.SentencePieceProcessor(model_proto=raw)
        for text in HARD:
            assert ours(name).encode(text, add_special=False, parse_special=False) == own.encode(
                text
            )
    elif "tokenizer.json" in files:
        own = HfTokenizer.from_str(files["tokenizer.json"].decode())
        for text in HARD:
            assert (
                ours(name).encode(text, add_special=False)
                == own.encode(text, add_special_tokens=False).ids
            )
