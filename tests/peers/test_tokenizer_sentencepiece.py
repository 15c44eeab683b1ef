"""Models that SentencePiece itself trained: its ids, llama.cpp's and ours."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from oracles.hard_text import HARD
from oracles.llama_cpp import LlamaCpp
from oracles.vocabularies import vocabulary_file
from tokenizers import normalizers

from mlxedge.tokenizer import TokenizerSpec, load, to_gguf

ROLES = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
T5_ROLES = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
MODELS: dict[str, dict[str, Any]] = {
    # As Llama's and Gemma's models were trained.
    "llama": {
        **ROLES,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "gemma": {
        **T5_ROLES,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<mask>", "\n\n", "▁▁"],
    },
    # As T5's and XLM-R's.
    "t5": {**T5_ROLES, "model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
    "identity": {**T5_ROLES, "model_type": "unigram", "normalization_rule_name": "identity"},
    "bare": {
        **T5_ROLES,
        "model_type": "unigram",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
}


@functools.cache
def trained(name: str) -> bytes:
    """A tokenizer.model of 1,000 pieces."""
    texts = [text for text in HARD if "\0" not in text and len(text) < 400]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3),
        model_writer=out,
        vocab_size=1000,
        hard_vocab_limit=False,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
        **MODELS[name],
    )
    return out.getvalue()


#: ``tokenizers`` applies SentencePiece's map of characters to what it takes for one character, and
#: not to the longest sequence that the map has.
COMBINING = {text for text in HARD if normalizers.NFC().normalize_str(text) != text}


@pytest.mark.parametrize("name", MODELS)
def test_ids(name: str, tmp_path: Path) -> None:
    raw = trained(name)
    spec = TokenizerSpec({"tokenizer.model": raw})
    ours, own = load(spec), sentencepiece.SentencePieceProcessor(model_proto=raw)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(vocabulary_file(to_gguf(spec, {})))

    def score(ids: list[int]) -> float:
        return sum(own.GetScore(i) for i in ids)

    with LlamaCpp(path, vocab_only=True) as llama:
        for text in HARD:
            expected = own.encode(text)
            ids = llama.tokenize(text, False, False)
            if "▁" not in text and ids != expected:  # SentencePiece takes it for a space
                # It adds scores in single precision, and may find another of the best splits.
                assert MODELS[name]["model_type"] == "unigram"
                assert len(ids) == len(expected)
                assert score(ids) == pytest.approx(score(expected), rel=1e-6)
            if name != "t5" or text not in COMBINING:
                assert ours.encode(text, False, False) == ids


@pytest.mark.parametrize("name", MODELS)
def test_what_is_put_around_a_text(name: str, tmp_path: Path) -> None:
    """BOS for the classes of BPE models, EOS for those of unigram ones, where no file says it."""
    spec = TokenizerSpec({"spiece.model": trained(name)})
    ids = load(spec).encode("a")
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(vocabulary_file(to_gguf(spec, {})))
    with LlamaCpp(path, vocab_only=True) as llama:
        assert llama.tokenize("a") == ids
        unigram = MODELS[name]["model_type"] == "unigram"
        assert (llama.add_bos, llama.add_eos) == (name == "llama", unigram)
