"""Files in tiktoken's format: told apart from others by their bytes, refused if unknown."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from oracles.tiny import write_tiny_llama
from oracles.vocabularies import byte_level_files

from mlxedge.conversion import convert
from mlxedge.errors import TokenizerError
from mlxedge.sources.folder import read_tokenizer
from mlxedge.tokenizer import TokenizerSpec, load
from mlxedge.tokenizer.tiktoken import find, is_tiktoken

TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab"]


def lines(tokens: list[bytes], end: bytes = b"\n") -> bytes:
    return b"".join(b"%s %d%s" % (base64.b64encode(t), i, end) for i, t in enumerate(tokens))


def test_files_are_told_apart_by_their_first_line() -> None:
    assert is_tiktoken(lines(TOKENS))
    assert is_tiktoken(lines(TOKENS, b"\r\n"))
    assert is_tiktoken(b"IQ== 0")
    for other in (b"", b"\n\x0e\n\x05<unk>\x15\x00", b"{}", b"IQ==", b"IQ== x\n", b"# a 1\n"):
        assert not is_tiktoken(other)
    assert find({"tokenizer.model": b"\n\x0e", "qwen.tiktoken": lines(TOKENS)}) == "qwen.tiktoken"


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken", "tiktoken.model"])
def test_an_unknown_vocabulary_is_a_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(lines(TOKENS))
    spec, _ = read_tokenizer(tmp_path)
    assert spec is not None
    with pytest.raises(TokenizerError) as caught:
        load(spec)
    message = str(caught.value)
    assert f"{name}: a tiktoken vocabulary of 257 tokens that mlxedge does not know" in message
    assert "special tokens" in message
    assert "put the model's tokenizer.json beside it" in message
    declared = {"added_tokens_decoder": {"257": {"content": "<|end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    spec, _ = read_tokenizer(tmp_path)
    assert spec is not None
    with pytest.raises(TokenizerError, match="neither mlxedge nor"):
        load(spec)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (lines(TOKENS) + b"IQ== 300\n", "line 258: rank 300"),
        (lines(TOKENS) + b"IQ==\n", "line 258"),
        (lines(TOKENS) + b"I*Q= 257\n", "line 258"),
        (lines(TOKENS) + b"\n", "line 258"),
        (lines([*TOKENS, b"ab"]), "twice"),
    ],
)
def test_a_damaged_file_is_an_error(raw: bytes, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        load(TokenizerSpec({"qwen.tiktoken": raw}))


def test_a_tokenizer_json_beside_it_counts() -> None:
    files = byte_level_files()
    alone = load(TokenizerSpec(files))
    both = load(TokenizerSpec(files | {"tokenizer.model": lines(TOKENS)}))
    assert both.encode("a text") == alone.encode("a text")


def test_a_folder_that_cannot_be_completed_is_copied_with_a_note(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source", layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    (source / "tokenizer.model").write_bytes(lines(TOKENS))
    report = convert(source, "mlx:4bit", tmp_path / "mlx", calibrate=False)
    (note,) = (n for n in report.plan.outputs[0].notes if "tokenizer" in n)
    assert "copied as they are: tokenizer.model: a tiktoken vocabulary" in note
    assert (tmp_path / "mlx" / "tokenizer.model").read_bytes() == lines(TOKENS)
    with pytest.raises(TokenizerError, match="does not know"):
        convert(source, "gguf:q8_0", tmp_path / "out.gguf", calibrate=False)
