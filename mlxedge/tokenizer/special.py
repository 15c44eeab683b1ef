"""Special tokens that are known by their text.

Models do not always say which of their tokens end a turn or are control tokens; the texts are
those that llama.cpp goes by (llama-vocab.cpp, conversion/base.py), as vendored by llama-cpp-python
0.3.36.
"""

from __future__ import annotations

from collections.abc import Set

#: Kinds of tokens that the texts below decide, numbered as in GGUF.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

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

#: Tokens of a response's structure, which are shown and which a text may hold.
_VISIBLE_TEXTS = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))

#: What the converter makes visible in Gemma 4, which has its own spelling of these.
GEMMA4_VISIBLE_TEXTS = frozenset(
    (
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    )
)
#: A token that no vocabulary but Gemma 4's has.
GEMMA4_SIGN = "<|tool_response>"

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


def kinds_of_texts(texts: Set[str]) -> dict[str, int]:
    """The kinds that llama.cpp gives to tokens by their text, whatever the file says.

    Ends and tokens like them are control tokens (3); where an end is none (see ``not_an_end``) it
    is visible (4), and ``</s>`` is plain text (1).
    """
    kinds = dict.fromkeys(END_TEXTS & texts, CONTROL)
    kinds |= dict.fromkeys(_VISIBLE_TEXTS & texts, USER_DEFINED)
    for text in not_an_end(texts):
        kinds[text] = NORMAL if text == "</s>" else USER_DEFINED
    return kinds


def not_an_end(texts: Set[str]) -> set[str]:
    """Which of the END_TEXTS that a vocabulary has do not end a turn in it."""
    return {text for signs, text in _EXCEPTIONS if signs <= texts and text in texts}


def looks_special(text: str) -> bool:
    """Whether an added token is a control token even if its file does not say so."""
    return text in _CONTROL_TEXTS or any(
        text.startswith(start) and text.endswith(end) for start, end in _CONTROL_BRACKETS
    )
