"""Special tokens that are known by their text.

Models do not always say which of their tokens end a turn or are control tokens; the texts are
those that llama.cpp goes by (llama-vocab.cpp, conversion/base.py), as vendored by llama-cpp-python
0.3.36.
"""

from __future__ import annotations

#: Control tokens after which a model has nothing more to say.
END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
        # Fill-in-the-middle: padding, the next repository, the next file.
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    )
)

#: Where all tokens on the left exist, the one on the right separates and does not end.
_EXCEPTIONS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|return|>", "<|calls|>"}, "<|end|>"),
    ({"<|call|>", "<|flush|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)

_CONTROL_TEXTS = frozenset(("<pad>", "<mask>", "<2mass>", "[@BOS@]"))
_CONTROL_BRACKETS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def not_an_end(texts: set[str]) -> set[str]:
    """Which of the END_TEXTS that a vocabulary has do not end a turn in it."""
    return {text for signs, text in _EXCEPTIONS if signs <= texts}


def looks_special(text: str) -> bool:
    """Whether an added token is a control token even if its file does not say so."""
    return text in _CONTROL_TEXTS or any(
        text.startswith(start) and text.endswith(end) for start, end in _CONTROL_BRACKETS
    )
