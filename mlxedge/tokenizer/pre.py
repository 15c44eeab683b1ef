"""Pre-tokenizers: how llama.cpp names them, and what they are in ``tokenizers``.

A byte-level BPE tokenizer is cut into words before it merges. llama.cpp keeps no description of
that cut in a file, only a name (``tokenizer.ggml.pre``); the regular expressions of each name are
those of llama-vocab.cpp (llm_tokenizer_bpe, llama_vocab::impl::load) of llama.cpp as vendored by
llama-cpp-python 0.3.36. Every expression cuts the pieces that the one before it left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer.pre_hashes import NAMES_BY_HASH

# Parts that many expressions share.
_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_NOT_LOWER = r"((?=[\p{L}])([^a-z]))"
_NOT_UPPER = r"((?=[\p{L}])([^A-Z]))"
_NOT_LOWER_M = r"((?=[\p{L}\p{M}])([^a-z]))"
_NOT_UPPER_M = r"((?=[\p{L}\p{M}])([^A-Z]))"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCT_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
)
_EAST_ASIAN = "[一-龥぀-ゟ゠-ヿ]+"
# Kimi's words are of Han characters or of other letters, never of both; marks are no letters there.
_HAN = (
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002ceb0-\U0002ebef\U0002f800-\U0002fa1f]"
)
# llama.cpp knows the general categories only: it reads \p{Lu} and \p{Ll} as any letter.
_LETTERS = r"[\p{L}\p{M}]"
# Where an expression names ranges, llama.cpp has taken the wide spaces out of the text before.
_ASIAN = r"(?:(?!\s)[一-龥ࠀ-一가-퟿])+"
_WIDE_MARKS = r"\s?[!-/:-~！-／：-～‘-‟、-。]+"
# Digits in threes from the right. What stands before them stays with the first of them.
_THREES = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_SENTENCE = " ?[^(\\s|.,!?…。，、।۔،)]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_CAMEL = (
    rf"{_HEAD}{_NOT_LOWER}*{_NOT_UPPER}+{_CONTRACTION}?"
    rf"|{_HEAD}{_NOT_LOWER}+{_NOT_UPPER}*{_CONTRACTION}?"
)
_CASED = rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
_ANY_CASED = (
    rf"{_HEAD}{_LETTERS}*{_LETTERS}+{_CONTRACTION}?|{_HEAD}{_LETTERS}+{_LETTERS}*{_CONTRACTION}?"
)
_SLASH_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_DEEPSEEK_LETTERS = (
    r"\s?"
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴ"
    "ℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)

#: Regular expressions by family.
FAMILIES: dict[str, tuple[str, ...]] = {
    "default": (
        r"[\p{P}\$\+<=>\^~\|]+",
        _GPT2,
        r"\p{N}+",
        "[0-9][0-9][0-9]",
    ),
    "gpt2": (_GPT2,),
    "digits": (r"\p{N}", _GPT2),
    "llama3": (_LLAMA3,),
    "jais2": (
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|"
        + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
        + r"|\s{1,2}(?!\S)|\s{1}",
    ),
    "qwen2": (_QWEN2,),
    "qwen35": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "ufakzeka": (rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}",),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
    "minicpm5": (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"),
    "seed-coder": (rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",),
    "bailingmoe": (
        rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_MARKS}"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        rf"{_CONTRACTION}|{_HEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        _DEEPSEEK_LETTERS,
        _WIDE_MARKS,
        r"\s+$",
        _ASIAN,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"),
    "deepseek3": (
        r"\p{N}{1,3}",
        _EAST_ASIAN,
        rf"{_PUNCT_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "spark2.5": (
        r"\p{N}{1,3}",
        _EAST_ASIAN,
        rf"{_PUNCT_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    "kimi": (
        rf"{_HAN}+|{_HEAD}(?:(?!{_HAN})\p{{L}})+{_CONTRACTION}?|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}",
    ),
    "lines": (r"[^\n]+|[\n]+",),
    "youtu": (
        f"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_EAST_ASIAN}",
        rf"{_ANY_CASED}|\p{{N}}|{_SLASH_MARKS}|{_SPACES}",
    ),
    "tekken": (
        rf"{_HEAD}{_NOT_LOWER}*{_NOT_UPPER}+|{_HEAD}{_NOT_LOWER}+{_NOT_UPPER}*|\p{{N}}"
        rf"|{_SLASH_MARKS}|{_SPACES}",
    ),
    "gpt4o": (rf"{_CAMEL}|\p{{N}}{{1,3}}|{_SLASH_MARKS}|{_SPACES}",),
    "granite-multi": (
        rf"{_HEAD}{_NOT_LOWER_M}*{_NOT_UPPER_M}+{_CONTRACTION}?"
        rf"|{_HEAD}{_NOT_LOWER_M}+{_NOT_UPPER_M}*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}|{_SLASH_MARKS}|{_SPACES}",
    ),
    "tiny-aya": (
        _THREES,
        rf"{_ANY_CASED}|\p{{N}}{{1,3}}|{_SLASH_MARKS}|{_SPACES}",
    ),
    "afmoe": (
        _THREES,
        "[一-鿿㐀-䶿豈-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
        rf"{_PUNCT_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "bloom": (_SENTENCE,),
    "viking": (_SENTENCE, r"\p{N}"),
    "superbpe": (r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))"),
    "chameleon": (
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
    ),
}


@dataclass(frozen=True)
class Pre:
    """What a ``tokenizer.ggml.pre`` stands for.

    ``family`` is a key of ``FAMILIES``, or ``None`` where llama.cpp cuts with code of its own.
    ``ignore_merges``: a whole word that is a token is taken as it is. ``add_bos``: whether a BOS
    token is added when the file does not say. ``raw``: tokens are spelt as in SentencePiece (``▁``
    for a space, ``<0x0A>`` for a byte that no token holds), not byte by byte. ``always_bos``: BOS
    is added whatever the file says.
    """

    family: str | None
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False
    always_bos: bool = False


#: Every name that llama.cpp accepts for a byte-pair tokenizer.
PRE: dict[str, Pre] = {
    "default": Pre("default"),
    **dict.fromkeys(
        (
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ),
        Pre("llama3", ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Pre("llama3")),
    **dict.fromkeys(("glm4", "glm5"), Pre("llama3", ignore_merges=True)),
    **dict.fromkeys(
        (
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ),
        Pre("gpt2"),
    ),
    **dict.fromkeys(
        (
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ),
        Pre("digits"),
    ),
    **dict.fromkeys(
        (
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ),
        Pre("qwen2"),
    ),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), Pre("deepseek3")),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), Pre("gpt4o")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), Pre("bailingmoe")),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), Pre("tiny-aya")),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), Pre("bloom")),
    "viking": Pre("viking"),
    "afmoe": Pre("afmoe"),
    "qwen35": Pre("qwen35"),
    "jais-2": Pre("jais2"),
    "tekken": Pre("tekken", ignore_merges=True, add_bos=True),
    "youtu": Pre("youtu", ignore_merges=True),
    "minicpm5": Pre("minicpm5", ignore_merges=True),
    "granite-embed-multi-97m": Pre("granite-multi", ignore_merges=True),
    "falcon": Pre("falcon"),
    "deepseek-llm": Pre("deepseek-llm"),
    "deepseek-coder": Pre("deepseek-coder"),
    "spark2_5": Pre("spark2.5"),
    "seed-coder": Pre("seed-coder"),
    "exaone-moe": Pre("exaone-moe"),
    "ufakzeka": Pre("ufakzeka"),
    "laguna": Pre("laguna"),
    "superbpe": Pre("superbpe"),
    "chameleon": Pre("chameleon", add_bos=True),
    "kimi-k2": Pre("kimi"),
    **dict.fromkeys(
        ("gemma4", "granite-embed-multi-311m"),
        Pre("lines", add_bos=True, raw=True, always_bos=True),
    ),
    "sarvam-moe": Pre("lines", raw=True),
    "whitespace": Pre(None, raw=True),
}

#: The one name that stands for a family, by (family, ignore_merges), when a tokenizer is
#: recognised by its structure. Families that llama.cpp only approximates are not here.
_CANONICAL = {
    ("default", False): "default",
    ("gpt2", False): "gpt-2",
    ("digits", False): "smollm",
    ("llama3", True): "llama-bpe",
    ("llama3", False): "dbrx",
    ("qwen2", False): "qwen2",
    ("qwen35", False): "qwen35",
    ("deepseek3", False): "deepseek-v3",
    ("deepseek-llm", False): "deepseek-llm",
    ("deepseek-coder", False): "deepseek-coder",
    ("tekken", True): "tekken",
    ("gpt4o", False): "gpt-4o",
    ("bloom", False): "bloom",
    ("viking", False): "viking",
    ("seed-coder", False): "seed-coder",
    ("minicpm5", True): "minicpm5",
    ("ufakzeka", False): "ufakzeka",
}
#: Families whose models normalise to NFC in training; llama.cpp does not, and names them all the
#: same.
_NFC = ("qwen2", "qwen35")

#: Spellings in tokenizer.json files → the expression that llama.cpp has for them.
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLINGS: dict[str, str] = {
    _GPT2 + r"|\s+": _GPT2,
    "[一-龥ࠀ-一가-퟿]+": _ASIAN,
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+": _WIDE_MARKS,
    **{
        expression.replace(_CONTRACTION, _ANY_CASE): expression
        for family in FAMILIES.values()
        for expression in family
        if _CONTRACTION in expression
    },
    rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASH_MARKS}|{_SPACES}": (
        FAMILIES["tekken"][0]
    ),
    (_CASED + rf"|\p{{N}}{{1,3}}|{_SLASH_MARKS}|{_SPACES}").replace(_CONTRACTION, _ANY_CASE): (
        FAMILIES["gpt4o"][0]
    ),
}

_Json = Mapping[str, Any]


def pre_tokenizer(name: str) -> tuple[dict[str, Any], Pre]:
    """The ``pre_tokenizer`` of a tokenizer.json that cuts as llama.cpp does under ``name``.

    Raises TokenizerError for a name that llama.cpp does not know, or cuts by code of its own.
    """
    pre = PRE.get(name)
    if pre is None:
        raise TokenizerError(f"pre-tokenizer {name!r} is not one that llama.cpp knows")
    if pre.family is None:
        raise TokenizerError(
            f"pre-tokenizer {name!r} has no equivalent in the tokenizers library; take the "
            "tokenizer from the original model instead"
        )
    return splitting(*FAMILIES[pre.family], byte_level=not pre.raw), pre


def splitting(*expressions: str, byte_level: bool = True) -> dict[str, Any]:
    """A ``pre_tokenizer`` that cuts by one regular expression after the other."""
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in expressions
    ]
    if byte_level:
        steps.append(_byte_level(use_regex=False))
    return {"type": "Sequence", "pretokenizers": steps}


def gpt2_pre_tokenizer() -> dict[str, Any]:
    """The ``pre_tokenizer`` of GPT-2's own tokenizer.json."""
    return _byte_level(use_regex=True)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def identify(document: _Json, check_ids: Iterable[Sequence[int]], pre: str | None = None) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json.

    ``check_ids``: what the tokenizer makes of ``CHECK_TEXT``, once for every way of adding
    special tokens. ``pre`` names it by hand. A tokenizer whose ids are unknown is recognised if
    its cutting rules are exactly those of a known family, whatever its vocabulary; such rules also
    outweigh ids of another family, which one text cannot tell apart from all others. Raises
    TokenizerError otherwise: a wrong name would give other ids without a word.
    """
    if pre is not None:
        if pre not in PRE:
            raise TokenizerError(
                f"pre-tokenizer {pre!r} is not one that llama.cpp knows; one of: "
                + ", ".join(sorted(PRE))
            )
        return pre
    hashes = [hashlib.sha256(str(list(ids)).encode()).hexdigest() for ids in check_ids]
    known = next((NAMES_BY_HASH[digest] for digest in hashes if digest in NAMES_BY_HASH), None)
    name = by_structure(document)
    if known is not None and (name is None or known not in PRE or _same_family(known, name)):
        return known
    if name is None:
        raise TokenizerError(
            "llama.cpp has no name for this tokenizer's pre-tokenizer (sha256 of its check ids: "
            f"{hashes[0]}); if you know which one it behaves as, name it with --pre"
        )
    return name


def _same_family(one: str, other: str) -> bool:
    return PRE[one].family == PRE[other].family


def by_structure(document: _Json) -> str | None:
    """The name that a tokenizer.json's rules alone give it, or ``None``."""
    model = document["model"]
    plain = (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("dropout")
    )
    regexes = _expressions(document.get("pre_tokenizer"))
    if not plain or regexes is None:
        return None
    family = next((f for f, known in FAMILIES.items() if known == regexes), "")
    name = _CANONICAL.get((family, bool(model.get("ignore_merges"))))
    normalizer = flat(document.get("normalizer"), "normalizers")
    forms = [step.get("type") for step in normalizer]
    if forms and not (forms == ["NFC"] and family in _NFC):
        return None
    return name


def flat(step: Any, inner: str) -> list[_Json]:
    """The steps of a normalizer, pre-tokenizer, decoder or post-processor of a tokenizer.json.

    Sequences, whose steps are under ``inner``, are written out. What is no step is left out: the
    tokenizers library refuses it when the tokenizer is built.
    """
    if not isinstance(step, Mapping):
        return []
    if step.get("type") != "Sequence":
        return [step]
    children = step.get(inner)
    if not isinstance(children, list):
        return []
    return [leaf for child in children for leaf in flat(child, inner)]


def _expressions(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer in llama.cpp's spelling.

    ``None`` if it holds anything that is more than a list of isolating splits.
    """
    steps = flat(pre_tokenizer, "pretokenizers")
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    found = []
    for step in steps[:-1]:
        expression = _split(step)
        if expression is None:
            return None
        found.append(expression)
    if steps[-1].get("use_regex", True):
        found.append(_GPT2)
    return tuple(_spelling(expression) for expression in found)


def _spelling(expression: str) -> str:
    """Line ends are written out in some files and escaped in others."""
    escaped = expression.replace("\r", r"\r").replace("\n", r"\n")
    return _SPELLINGS.get(escaped, escaped)


def _split(step: _Json) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if step.get("type") != "Split" or not isinstance(regex, str):
        return None
    if step.get("behavior") == "Isolated":
        return regex
    # "Keep what matches" is the same cut where the expression leaves nothing out.
    covers = regex.endswith(r"|\s+")
    return regex if step.get("behavior") == "Removed" and step.get("invert") and covers else None
