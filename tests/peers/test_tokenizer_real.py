"""Tokenizers of real models: their own libraries, llama.cpp and ours give the same ids."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import sentencepiece
from oracles.hard_text import HARD
from oracles.llama_cpp import LlamaCpp
from oracles.real_tokenizers import REAL
from oracles.vocabularies import vocabulary_file
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import normalizers

from mlxedge.gguf_values import Metadata
from mlxedge.tokenizer import Tokenizer, TokenizerSpec, from_gguf, load, to_gguf

WAYS = [(special, parse) for special in (True, False) for parse in (True, False)]
KINDS = {
    "smollm2": ("gpt2", "smollm"),
    "mistral-v1": ("llama", "default"),
    "mistral-v3": ("llama", "default"),
    "tekken": ("gpt2", "tekken"),
    "deepseek-v4": ("gpt2", "joyai-llm"),
    "moonshine": ("llama", "default"),
    "llama3": ("gpt2", "llama-bpe"),
    "qwen": ("gpt2", "qwen2"),
    "gpt-2": ("gpt2", "gpt-2"),
    "seqio-t5": ("t5", "default"),
}
_NOT_NFC = {text for text in HARD if normalizers.NFC().normalize_str(text) != text}
#: Texts on which llama.cpp is known to give other ids than the model's own library.
KNOWN = {
    # Qwen normalises to NFC, llama.cpp does not; and it takes "</s>", here an ordinary token, for
    # one that ends a text.
    "qwen": _NOT_NFC | {text for text in HARD if "</s>" in text},
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


@pytest.mark.parametrize("name", [n for n in REAL if n != "smollm2"])
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
