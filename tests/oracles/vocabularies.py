"""Vocabularies made on the spot, so that every kind of tokenizer can be tried without a download.

    metadata = byte_level_metadata("qwen2")
    path.write_bytes(vocabulary_file(metadata))

They are trained on the hard texts **without** cutting them into words: merges then run across
every boundary that a pre-tokenizer could draw, so that a boundary in the wrong place shows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mlxedge.gguf_values import Metadata, array, boolean, string, u32
from mlxedge.outputs.gguf_file import header_bytes
from oracles.hard_text import HARD

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_TOKENS = ("<tool_call>", "    ")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def vocabulary_file(metadata: Metadata) -> bytes:
    """A GGUF file without tensors, which llama.cpp loads as a vocabulary."""
    return header_bytes({"general.architecture": string("llama"), **metadata}, [])


def train_byte_level(
    texts: Sequence[str], size: int, pre: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    """A byte-level BPE tokenizer over all 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def _training_texts() -> list[str]:
    """The hard texts without those of one letter, and without special tokens to be learnt."""
    return [text for text in HARD if len(set(text)) > 2 and "<" not in text and "super" not in text]


def _without_nul() -> list[str]:
    """For vocabularies of characters: llama.cpp reads a token only up to U+0000."""
    return [text for text in _training_texts() if "\0" not in text]


@functools.cache
def _boundless_bpe() -> tuple[list[str], list[str]]:
    """Tokens by id and merges of a byte-level BPE that knows no words."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model = json.loads(train_byte_level(_training_texts(), 1500, whole).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def byte_level_metadata(pre: str, add_bos: bool = False) -> Metadata:
    """``tokenizer.*`` of a "gpt2" vocabulary that llama.cpp cuts under the name ``pre``."""
    tokens, merges = _boundless_bpe()
    every = [*tokens, *CONTROL_TOKENS, *USER_TOKENS]
    types = (
        [NORMAL] * len(tokens) + [CONTROL] * len(CONTROL_TOKENS) + [USER_DEFINED] * len(USER_TOKENS)
    )
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": array("str", every),
        "tokenizer.ggml.token_type": array("i32", types),
        "tokenizer.ggml.merges": array("str", merges),
        "tokenizer.ggml.bos_token_id": u32(every.index("<|im_start|>")),
        "tokenizer.ggml.eos_token_id": u32(every.index("<|im_end|>")),
        "tokenizer.ggml.add_bos_token": boolean(add_bos),
        "tokenizer.ggml.add_eos_token": boolean(False),
    }


@functools.cache
def _raw_bpe() -> tuple[list[str], list[str]]:
    """Tokens by id and merges of a BPE over characters, with SentencePiece's spaces.

    No merge crosses the end of a line, as in the vocabularies of this kind.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False)
    tokenizer.train_from_iterator(_without_nul(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def raw_bpe_metadata(pre: str | None = None) -> Metadata:
    """``tokenizer.*`` of a "gpt2" vocabulary that is not byte-level; "gemma4" without ``pre``."""
    pieces, merges = _raw_bpe()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *USER_TOKENS]
    types = [CONTROL] * 4 + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED] * 2
    return {
        "tokenizer.ggml.model": string("gpt2" if pre else "gemma4"),
        **({"tokenizer.ggml.pre": string(pre)} if pre else {}),
        "tokenizer.ggml.tokens": array("str", tokens),
        "tokenizer.ggml.scores": array("f32", [-1000.0] * len(tokens)),
        "tokenizer.ggml.token_type": array("i32", types),
        "tokenizer.ggml.merges": array("str", merges),
        "tokenizer.ggml.bos_token_id": u32(2),
        "tokenizer.ggml.eos_token_id": u32(1),
        "tokenizer.ggml.add_bos_token": boolean(False),  # which "gemma4" is said to ignore
    }


@functools.cache
def unigram_metadata(merge_spaces: bool = True, space_prefix: bool = True) -> Metadata:
    """``tokenizer.*`` of a "t5" vocabulary, with three rows more than pieces.

    Scores are multiples of 1/64: ``tokenizers`` reads long decimal fractions with an error of
    their last bit, which would decide between splits of equal sums.
    """
    pieces, _ = _raw_bpe()
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    user = ["<tool_call>", "<extra_id_0>"]
    padding = [f"[PAD{len(special) + len(pieces) + len(user) + i}]" for i in range(3)]
    scores = [-4.0 - i / 64 for i in range(len(pieces))]
    types = [CONTROL, CONTROL, UNKNOWN, CONTROL] + [NORMAL] * len(pieces)
    return {
        "tokenizer.ggml.model": string("t5"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.tokens": array("str", [*special, *pieces, *user, *padding]),
        "tokenizer.ggml.scores": array("f32", [0.0] * 4 + scores + [-1e3] * 2 + [-1e4] * 3),
        "tokenizer.ggml.token_type": array("i32", types + [USER_DEFINED] * 2 + [UNUSED] * 3),
        "tokenizer.ggml.add_space_prefix": boolean(space_prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(merge_spaces),
        "tokenizer.ggml.eos_token_id": u32(1),
        "tokenizer.ggml.unknown_token_id": u32(2),
        "tokenizer.ggml.padding_token_id": u32(0),
        "tokenizer.ggml.add_bos_token": boolean(False),
        "tokenizer.ggml.add_eos_token": boolean(True),
    }


@functools.cache
def sentencepiece_metadata(space_prefix: bool = True, add_bos: bool = True) -> Metadata:
    """``tokenizer.*`` of a "llama" vocabulary, with a byte piece for every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(
        _training_texts(), trainers.BpeTrainer(vocab_size=1200, show_progress=False)
    )
    vocab = tokenizer.get_vocab()
    pieces = [p for p in sorted(vocab, key=vocab.__getitem__) if p.isprintable()]
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    user = ["<tool_call>", "\n\n"]
    tokens = [*special, *bytes_, *pieces, *user]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces) + [USER_DEFINED] * 2
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0] * 2
    return {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.pre": string("default"),
        "tokenizer.ggml.tokens": array("str", tokens),
        "tokenizer.ggml.scores": array("f32", scores),
        "tokenizer.ggml.token_type": array("i32", types),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
        "tokenizer.ggml.unknown_token_id": u32(0),
        "tokenizer.ggml.add_bos_token": boolean(add_bos),
        "tokenizer.ggml.add_eos_token": boolean(False),
        "tokenizer.ggml.add_space_prefix": boolean(space_prefix),
    }


def byte_level_files(
    pre: Sequence[pre_tokenizers.PreTokenizer] = (),
    normalizer: normalizers.Normalizer | None = None,
    ignore_merges: bool = False,
    gpt2_expression: bool = True,
    config: dict[str, object] | None = None,
) -> dict[str, bytes]:
    """A Hugging Face tokenizer: byte-level BPE over ``pre`` and, by default, GPT-2's expression.

    CONTROL_TOKENS are special, USER_TOKENS are not.
    """
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_expression)
    whole = pre_tokenizers.Sequence([*pre, last])
    tokenizer = train_byte_level(_training_texts(), 900, whole)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens(list(USER_TOKENS))
    document = json.loads(tokenizer.to_str())
    document["model"]["ignore_merges"] = ignore_merges
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **(config or {})}
    return {
        "tokenizer.json": json.dumps(document).encode(),
        "tokenizer_config.json": json.dumps(named).encode(),
    }
