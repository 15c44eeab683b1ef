"""Token ids against llama.cpp, on texts on which tokenizers tend to disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracles.hard_text import HARD
from oracles.llama_cpp import LlamaCpp
from oracles.vocabularies import (
    byte_level_files,
    byte_level_metadata,
    raw_bpe_metadata,
    sentencepiece_metadata,
    unigram_metadata,
    vocabulary_file,
)
from tokenizers import Regex, normalizers, pre_tokenizers

from mlxedge.gguf_values import Metadata
from mlxedge.sources.gguf import read_gguf
from mlxedge.tokenizer import TokenizerSpec, from_gguf, load, to_gguf
from mlxedge.tokenizer.pre import FAMILIES, PRE

WAYS = [(special, parse) for special in (True, False) for parse in (True, False)]


def differences(path: Path, spec: TokenizerSpec) -> list[tuple[str, bool, bool]]:
    """The texts and ways of encoding on which llama.cpp's ids are not ours."""
    tokenizer = load(spec)
    with LlamaCpp(path, vocab_only=True) as llama:
        return [
            (text, special, parse)
            for text in HARD
            for special, parse in WAYS
            if llama.tokenize(text, special, parse) != tokenizer.encode(text, special, parse)
        ]


def written(folder: Path, metadata: Metadata) -> Path:
    path = folder / "vocabulary.gguf"
    path.write_bytes(vocabulary_file(metadata))
    return path


def test_a_real_model(smollm2: Path) -> None:
    spec = from_gguf(read_gguf(smollm2).metadata)
    assert differences(smollm2, spec) == []


def test_a_real_model_by_its_files_alone(smollm2: Path, tmp_path: Path) -> None:
    files = from_gguf(read_gguf(smollm2).metadata).files
    metadata = to_gguf(TokenizerSpec(files), {"vocab_size": 49152})
    assert metadata["tokenizer.ggml.pre"].value == "smollm"
    assert differences(written(tmp_path, metadata), TokenizerSpec(files)) == []


def test_end_tokens_of_a_real_model(smollm2: Path) -> None:
    tokenizer = load(from_gguf(read_gguf(smollm2).metadata))
    with LlamaCpp(smollm2, vocab_only=True) as llama:
        ends = {token for token in range(llama.n_vocab) if llama.is_end(token)}
    assert tokenizer.end_ids == ends


def one_name_each() -> list[str]:
    names = {
        (pre.family, pre.ignore_merges, pre.always_bos): name
        for name, pre in PRE.items()
        if pre.family
    }
    assert {family for family, *_ in names} == set(FAMILIES)
    return list(names.values())


@pytest.mark.parametrize("name", one_name_each())
def test_every_pre_tokenizer(name: str, tmp_path: Path) -> None:
    metadata = raw_bpe_metadata(name) if PRE[name].raw else byte_level_metadata(name)
    assert differences(written(tmp_path, metadata), from_gguf(metadata)) == []


def test_byte_pairs_of_characters(tmp_path: Path) -> None:
    metadata = raw_bpe_metadata()
    spec = from_gguf(metadata)
    assert differences(written(tmp_path, metadata), spec) == []
    assert load(spec).encode("a")[0] == 2


def test_byte_pairs_of_characters_by_their_files_alone(tmp_path: Path) -> None:
    """Merges that are no SentencePiece model's keep their ranks."""
    files = from_gguf(raw_bpe_metadata("sarvam-moe")).files
    rebuilt = to_gguf(TokenizerSpec(files), {})
    assert rebuilt["tokenizer.ggml.pre"].value == "sarvam-moe"
    assert differences(written(tmp_path, rebuilt), TokenizerSpec(files)) == []


@pytest.mark.parametrize("space_prefix", [True, False])
@pytest.mark.parametrize("merge_spaces", [True, False])
def test_unigram(merge_spaces: bool, space_prefix: bool, tmp_path: Path) -> None:
    metadata = unigram_metadata(merge_spaces, space_prefix)
    found = differences(written(tmp_path, metadata), from_gguf(metadata))
    # Of spaces alone llama.cpp keeps as many as there are, and adds none.
    alone = {text for text in HARD if text and not text.strip(" ")} if space_prefix else set()
    assert [case for case in found if merge_spaces or case[0] not in alone] == []


def test_unigram_by_its_files_alone(tmp_path: Path) -> None:
    metadata = unigram_metadata()
    files = from_gguf(metadata).files
    rebuilt = to_gguf(
        TokenizerSpec(files), {"vocab_size": len(metadata["tokenizer.ggml.tokens"].value)}
    )
    assert rebuilt["tokenizer.ggml.model"].value == "t5"
    assert differences(written(tmp_path, rebuilt), TokenizerSpec(files)) == []


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece(space_prefix: bool, add_bos: bool, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(space_prefix, add_bos)
    assert differences(written(tmp_path, metadata), from_gguf(metadata)) == []


def test_sentencepiece_by_its_files_alone(tmp_path: Path) -> None:
    """Scores are rebuilt from the order of the merges."""
    files = from_gguf(sentencepiece_metadata()).files
    rebuilt = to_gguf(TokenizerSpec(files), {})
    assert rebuilt["tokenizer.ggml.model"].value == "llama"
    assert differences(written(tmp_path, rebuilt), TokenizerSpec(files)) == []


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(expression), "isolated")


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


@pytest.mark.parametrize(
    ("name", "pre", "options"),
    [
        ("gpt-2", [], {}),
        ("smollm", [pre_tokenizers.Digits(True)], {}),
        ("llama-bpe", [split(LLAMA3)], {"gpt2_expression": False, "ignore_merges": True}),
        ("dbrx", [split(LLAMA3)], {"gpt2_expression": False}),
        ("qwen2", [split(QWEN2)], {"gpt2_expression": False}),
    ],
)
def test_users_own_tokenizers(
    name: str, pre: list[pre_tokenizers.PreTokenizer], options: dict[str, Any], tmp_path: Path
) -> None:
    """No hash knows these vocabularies; their rules are a known family's."""
    files = byte_level_files(pre, **options)
    metadata = to_gguf(TokenizerSpec(files), {})
    assert metadata["tokenizer.ggml.pre"].value == name
    # (?i:'s) also matches the long s, which llama.cpp's own expression does not.
    skipped = {text for text in HARD if "ſ" in text}
    found = differences(written(tmp_path, metadata), TokenizerSpec(files))
    assert [case for case in found if case[0] not in skipped] == []


def test_normalised_text_is_the_one_difference(tmp_path: Path) -> None:
    """Qwen's tokenizers normalise to NFC and llama.cpp does not: equal on text that is in NFC."""
    files = byte_level_files([split(QWEN2)], normalizers.NFC(), gpt2_expression=False)
    metadata = to_gguf(TokenizerSpec(files), {})
    assert metadata["tokenizer.ggml.pre"].value == "qwen2"
    tokenizer, nfc = load(TokenizerSpec(files)), normalizers.NFC()
    with LlamaCpp(written(tmp_path, metadata), vocab_only=True) as llama:
        for text in HARD:
            if "ſ" not in text:
                assert llama.tokenize(nfc.normalize_str(text)) == tokenizer.encode(text)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_what_is_put_around_a_text(add_bos: bool, add_eos: bool, tmp_path: Path) -> None:
    files = byte_level_files(config={"add_bos_token": add_bos, "add_eos_token": add_eos})
    metadata = to_gguf(TokenizerSpec(files), {})
    ours = load(TokenizerSpec(files)).encode("Hello")
    with LlamaCpp(written(tmp_path, metadata), vocab_only=True) as llama:
        assert (llama.add_bos, llama.add_eos) == (add_bos, add_eos)
        assert llama.tokenize("Hello") == ours
        assert (ours[0] == llama.bos, ours[-1] == llama.eos) == (add_bos, add_eos)
