"""Tokenizers without a tokenizer.json: mlx-lm loads what is written, and gives the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import mlx_lm
import pytest
from oracles.hard_text import HARD
from oracles.real_tokenizers import REAL
from oracles.tiny import write_tiny_llama

from mlxedge.conversion import convert
from mlxedge.sources import open_source
from mlxedge.tokenizer import TokenizerSpec, load, to_gguf
from mlxedge.tokenizer.saved import saved_files

#: Tokenizer → architecture of the model that it is put into, and its other settings.
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "tekken": ("tekken", "mistral", {}),
    "tekken-with-settings": (
        "tekken",
        "mistral",
        {"tokenizer_class": "LlamaTokenizer", "eos_token": "[/INST]", "model_max_length": 77},
    ),
    "llama3-tiktoken": ("llama3-tiktoken", "llama", {}),
    "qwen-tiktoken": (
        "qwen-tiktoken",
        "qwen2",
        {"tokenizer_class": "QWenTokenizer",
         "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}},
    ),
    "sentencepiece": ("mistral-v3", "llama", {}),
    "sentencepiece-with-a-class": ("mistral-v1", "llama", {"tokenizer_class": "LlamaTokenizer"}),
    "sentencepiece-in-mistral": ("mistral-v1", "mistral", {}),
    "sentencepiece-in-qwen3": ("mistral-v1", "qwen3", {"add_bos_token": False}),
    "sentencepiece-of-its-own-code": (
        "mistral-v1",
        "llama",
        {"tokenizer_class": "XverseTokenizer",
         "auto_map": {"AutoTokenizer": ["tokenization_xverse.XverseTokenizer", None]}},
    ),
    "unigram": ("seqio-t5", "llama", {}),
}  # fmt: skip


def write_source(folder: Path, name: str) -> TokenizerSpec:
    """A tiny model with the tokenizer of a case; its embedding is too small, which is no matter."""
    tokenizer, model_type, settings = CASES[name]
    write_tiny_llama(folder, model_type=model_type, layers=1)
    files = dict(REAL[tokenizer]())
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (folder / old).unlink()
    if settings:
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    for file, raw in files.items():
        (folder / file).write_bytes(raw)
    return TokenizerSpec(files)


@pytest.mark.parametrize("name", CASES)
def test_mlx_lm_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    """With what it installs; transformers, which it uses, gets the same files."""
    ours = load(write_source(tmp_path / "source", name))
    targets = ["mlx:4bit", "hf:f16"]
    convert(tmp_path / "source", targets, tmp_path / "out", calibrate=False)
    folder, for_transformers = (
        tmp_path / "out" / f"source-{end}" for end in ("mlx-4bit", "hf-f16")
    )
    theirs = mlx_lm.load(str(folder))[1]._tokenizer
    for text in HARD:
        assert theirs.encode(text) == ours.encode(text), text
        ids = ours.encode(text, add_special=False)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (for_transformers / name).read_bytes()
    assert not {path.name for path in folder.iterdir()} & {"tekken.json", "qwen.tiktoken"}


@pytest.mark.parametrize("name", ["tekken", "qwen-tiktoken", "sentencepiece"])
def test_what_is_written_is_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    """A GGUF file made from the MLX folder has the vocabulary that one from the source has."""
    spec = write_source(tmp_path / "source", name)
    convert(tmp_path / "source", "mlx:4bit", tmp_path / "mlx", calibrate=False)
    with open_source(tmp_path / "mlx") as found:
        assert found.tokenizer is not None
        assert to_gguf(found.tokenizer, {}) == to_gguf(spec, {})


def test_files_that_load_are_left_alone() -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    files = {**REAL["mistral-v1"](), "tokenizer_config.json": json.dumps(config).encode()}
    assert saved_files(TokenizerSpec(files)) == files
    assert saved_files(TokenizerSpec(REAL["gpt-2"]())) == REAL["gpt-2"]()
