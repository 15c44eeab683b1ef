"""Naming pre-tokenizers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from oracles.vocabularies import byte_level_files
from tokenizers import Regex, normalizers, pre_tokenizers

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer import TokenizerSpec, load, to_gguf
from mlxedge.tokenizer.pre import FAMILIES, PRE, by_structure, pre_tokenizer
from mlxedge.tokenizer.pre_hashes import CHECK_TEXT, NAMES_BY_HASH

#: Names whose tokenizers are not byte-pair ones; llama.cpp's hashes know them all the same.
OTHER_KINDS = {"bert-bge-large", "jina-v2-en"}


def document(**options: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(byte_level_files(**options)["tokenizer.json"])
    return made


def splits(*expressions: str, behavior: str = "isolated", invert: bool = False) -> list[Any]:
    return [pre_tokenizers.Split(Regex(e), behavior, invert) for e in expressions]


def test_every_hash_names_a_pre_tokenizer() -> None:
    assert len(NAMES_BY_HASH) == 95
    assert set(NAMES_BY_HASH.values()) <= set(PRE) | OTHER_KINDS
    assert all(len(bytes.fromhex(digest)) == 32 for digest in NAMES_BY_HASH)


def test_the_check_text_is_whole() -> None:
    assert len(CHECK_TEXT) == 350
    assert CHECK_TEXT.startswith("\n \n\n")
    assert CHECK_TEXT.endswith("We'Ve a'lL")


@pytest.mark.parametrize("add_bos", [True, False])
def test_known_ids_are_named_by_their_hash(add_bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a family the hash has the last word, whether or not BOS is added."""
    files = byte_level_files()
    ids = load(TokenizerSpec(files)).encode(CHECK_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setitem(NAMES_BY_HASH, digest, "olmo")
    spec = TokenizerSpec(byte_level_files(config={"add_bos_token": add_bos}))
    assert to_gguf(spec, {})["tokenizer.ggml.pre"].value == "olmo"


def test_rules_outweigh_a_hash_of_another_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """One text cannot tell all tokenizers apart: qwen2 and qwen35 differ in combining marks."""
    ids = load(TokenizerSpec(byte_level_files())).encode(CHECK_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setitem(NAMES_BY_HASH, digest, "falcon")
    assert to_gguf(TokenizerSpec(byte_level_files()), {})["tokenizer.ggml.pre"].value == "gpt-2"
    unknown = splits(r"\w+|\W")
    ids = load(TokenizerSpec(byte_level_files(pre=unknown))).encode(CHECK_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setitem(NAMES_BY_HASH, digest, "falcon")
    spec = TokenizerSpec(byte_level_files(pre=unknown))
    assert to_gguf(spec, {})["tokenizer.ggml.pre"].value == "falcon"


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_rules_are_recognised(family: str) -> None:
    """What is made for a name is recognised as that family, if it is recognised at all."""
    for name, pre in PRE.items():
        if pre.family == family:
            made, rules = pre_tokenizer(name)
            model = {"type": "BPE", "vocab": {}, "ignore_merges": rules.ignore_merges}
            found = by_structure({"model": model, "pre_tokenizer": made})
            assert found is None or PRE[found].family == family
            assert found is None or PRE[found].ignore_merges == rules.ignore_merges


@pytest.mark.parametrize(
    "name", ["default", "gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken"]
)
def test_a_canonical_name_survives(name: str) -> None:
    made, rules = pre_tokenizer(name)
    model = {"type": "BPE", "vocab": {}, "ignore_merges": rules.ignore_merges}
    assert by_structure({"model": model, "pre_tokenizer": made}) == name


DEEPSEEK3 = (
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("deepseek-v3", splits(*DEEPSEEK3)),
        ("gpt-4o", splits(GPT4O)),
        ("gpt-4o", splits(GPT4O, behavior="removed", invert=True)),
        ("gpt-2", splits(FAMILIES["gpt2"][0] + r"|\s+")),
        ("gpt-2", [pre_tokenizers.Sequence([])]),
    ],
)
def test_spellings_of_tokenizer_json(name: str, pre: list[Any]) -> None:
    options = {"gpt2_expression": isinstance(pre[0], pre_tokenizers.Sequence)}
    assert by_structure(document(pre=pre, **options)) == name


@pytest.mark.parametrize(
    "change",
    [
        {"pre": splits(r"\w+")},
        {"pre": [pre_tokenizers.Digits(False)]},
        {"pre": [pre_tokenizers.Punctuation()]},
        {"pre": splits(r"\p{N}", behavior="removed", invert=True)},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.NFC()},
        {"ignore_merges": True},
    ],
)
def test_what_is_a_little_different_is_not_recognised(change: dict[str, Any]) -> None:
    assert by_structure(document()) == "gpt-2"
    assert by_structure(document(**change)) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("byte_fallback", True),
        ("end_of_word_suffix", "</w>"),
        ("dropout", 0.1),
        ("type", "Unigram"),
    ],
)
def test_other_models_are_not_recognised(key: str, value: Any) -> None:
    made = document()
    made["model"][key] = value
    assert by_structure(made) is None


def test_an_unknown_pre_tokenizer_is_an_error_and_may_be_named() -> None:
    spec = TokenizerSpec(byte_level_files(pre=splits(r"\w+")))
    with pytest.raises(TokenizerError, match=r"sha256 .* [0-9a-f]{64}.*--pre"):
        to_gguf(spec, {})
    assert to_gguf(spec, {}, pre="falcon")["tokenizer.ggml.pre"].value == "falcon"
    with pytest.raises(TokenizerError, match=r"'nonesuch' is not one that llama\.cpp knows"):
        to_gguf(spec, {}, pre="nonesuch")
