"""The Hugging Face files of a tokenizer, read into one complete tokenizer.json document.

What a folder says in several files is gathered here once, so that the runtime and the GGUF writer
see the same tokenizer: tokens that only tokenizer_config.json declares, the special tokens by
role, whether BOS and EOS are added. The rules are those of transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlxedge.errors import TokenizerError
from mlxedge.tokenizer import pre, ranks, recognised, sentencepiece, tiktoken
from mlxedge.tokenizer.spec import TokenizerSpec

Json = dict[str, Any]

#: The roles that a special token can have.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

#: Names under which folders hold a SentencePiece model.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")

#: What an added token may say of itself.
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

#: Pre-tokenizer by tokenizer class, for folders that hold only vocab.json and merges.txt.
_CLASS_PRE = {
    None: "gpt-2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
}


def read_json(spec: TokenizerSpec, name: str) -> Json:
    """The object in a file, or an empty one if there is no such file.

    Raises TokenizerError if the file is not a JSON object.
    """
    raw = spec.files.get(name)
    if raw is None:
        return {}
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{name} holds no JSON object")
    return found


def settings(spec: TokenizerSpec) -> Json:
    """tokenizer_config.json, completed from special_tokens_map.json.

    Before them stand the roles that a tekken.json, a SentencePiece model or a tiktoken vocabulary
    gives to its tokens.
    """
    return {
        **_own_roles(spec),
        **read_json(spec, "special_tokens_map.json"),
        **read_json(spec, "tokenizer_config.json"),
    }


def _own_roles(spec: TokenizerSpec) -> Json:
    if "tokenizer.json" in spec.files:
        return {}
    if ranks.TEKKEN in spec.files:
        return dict(ranks.TEKKEN_ROLES)
    if (name := sentencepiece_file(spec)) is not None:
        return dict(sentencepiece.parse(spec.files[name]).roles())
    if (name := tiktoken.find(spec.files)) is not None:
        known = tiktoken.known(spec.files[name], name)
        return dict(known.roles) if known else {}
    return {}


def sentencepiece_file(spec: TokenizerSpec) -> str | None:
    """The name of the SentencePiece model, if there is one."""
    return next(
        (
            name
            for name in SENTENCEPIECE_FILES
            if name in spec.files and not tiktoken.is_tiktoken(spec.files[name])
        ),
        None,
    )


def content(token: Any) -> str | None:
    """The text of a special token, which is written as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``{"bos_token": text, …}``, the roles that the settings name."""
    named = {f"{role}_token": content(config.get(f"{role}_token")) for role in ROLES}
    return {role: text for role, text in named.items() if text}


def chat_templates(spec: TokenizerSpec) -> dict[str, str]:
    """Chat templates by name; the main one is "default".

    A chat_template.jinja stands above the settings, as in transformers.
    """
    given = read_json(spec, "tokenizer_config.json").get("chat_template")
    found: dict[str, str] = {}
    if isinstance(given, str):
        found["default"] = given
    for entry in given if isinstance(given, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
            found[str(entry.get("name"))] = entry["template"]
    if "default" not in found and (old := _json_template(spec)):
        found["default"] = old
    for name, raw in spec.files.items():
        folder, _, base = name.rpartition("/")
        if name == "chat_template.jinja":
            found["default"] = _text(raw, name)
        elif folder == "additional_chat_templates" and base.endswith(".jinja"):
            found[base.removesuffix(".jinja")] = _text(raw, name)
    return found


def _json_template(spec: TokenizerSpec) -> str | None:
    """The template of a chat_template.json, as processors write it."""
    template = read_json(spec, "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{name} is not UTF-8: {error}") from error


def document(spec: TokenizerSpec) -> Json:
    """The tokenizer as the content of a tokenizer.json, complete.

    From tokenizer.json itself, from Mistral's tekken.json, from a SentencePiece model, from a
    tiktoken vocabulary, or from vocab.json and merges.txt. Raises TokenizerError if there is none
    of them, or they contradict themselves.
    """
    config = settings(spec)
    adds: tuple[str, ...] = ()
    if "tokenizer.json" in spec.files:
        made = read_json(spec, "tokenizer.json")
    elif ranks.TEKKEN in spec.files:
        made = _from_tekken(spec)
        adds = ("bos_token",)
    elif (name := sentencepiece_file(spec)) is not None:
        model = sentencepiece.parse(spec.files[name])
        made = sentencepiece.document(model)
        # As the classes of such folders do: LlamaTokenizer for BPE, T5Tokenizer for unigram.
        adds = ("eos_token",) if model.kind == sentencepiece.UNIGRAM else ("bos_token",)
    elif (name := tiktoken.find(spec.files)) is not None:
        known, tokens = recognised.find(spec.files[name], name, config)
        made, adds = _from_tiktoken(known, tokens, config), known.adds
    elif "vocab.json" in spec.files and "merges.txt" in spec.files:
        made = _from_vocab_and_merges(spec, config)
    else:
        raise TokenizerError(
            "no tokenizer found: expected tokenizer.json, tokenizer.model, spiece.model, "
            "tekken.json, qwen.tiktoken, or vocab.json with merges.txt, and there is "
            f"{', '.join(sorted(spec.files)) or 'nothing'}"
        )
    _check(made)
    made["truncation"] = made["padding"] = None  # a prompt is never cut or filled
    _add_tokens(made, spec, config)
    _set_ends(made, config, adds)
    return made


def _check(made: Json) -> None:
    """Refuse a document that lacks what is read from it here; the library checks the rest."""
    model = made.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        right = all(type(number) is int and number >= 0 for number in vocab.values())
    else:
        right = isinstance(vocab, list) and all(
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            for entry in vocab
        )
    if not right:
        raise TokenizerError("tokenizer.json has no model with a vocabulary of tokens and ids")
    prefix = made["model"].get("continuing_subword_prefix")
    if isinstance(prefix, str) and not all(
        right.startswith(prefix) for _, right in merge_pairs(made["model"])
    ):
        # The library cuts the prefix off without looking, and may take the process down.
        raise TokenizerError("tokenizer.json: a merge lacks the continuing_subword_prefix")
    added = made.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        if not (
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and type(token.get("id")) is int
            and token["id"] >= 0
        ):
            raise TokenizerError(f"tokenizer.json: added_tokens holds {token!r}")


def vocabulary(made: Mapping[str, Any]) -> dict[str, int]:
    """Token text → id, added tokens included."""
    vocab = made["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [text, score] by id
        ids = {entry[0]: i for i, entry in enumerate(vocab)}
    else:
        ids = dict(vocab)
    for token in made.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
    return ids


def _from_tekken(spec: TokenizerSpec) -> Json:
    special, tokens, pattern = ranks.tekken(read_json(spec, ranks.TEKKEN))
    by_rank, merges = ranks.byte_level_vocabulary(tokens)
    vocab = {text: i for i, text in enumerate(special)}
    vocab |= {text: len(special) + rank for text, rank in by_rank.items()}
    if len(vocab) != len(special) + len(tokens):
        raise TokenizerError(f"{ranks.TEKKEN}: a special token is another token too")
    made = byte_level_document(vocab, merges, pre.splitting(pattern), ignore_merges=True)
    made["added_tokens"] = [added_token(text, i, special=True) for i, text in enumerate(special)]
    return made


def _from_tiktoken(known: tiktoken.Known, tokens: Sequence[bytes], config: Json) -> Json:
    """The settings may name special tokens otherwise, by their ids."""
    vocab, merges = ranks.byte_level_vocabulary(tokens)
    default = {len(vocab) + i: text for i, text in enumerate(known.special)}
    declared = config.get(recognised.DECLARED)
    own = {
        int(number): text
        for number, entry in (declared.items() if isinstance(declared, dict) else ())
        if number.isdecimal() and int(number) in default and (text := content(entry))
    }
    special = {i: text for i, text in default.items() if text not in own.values()} | own
    if len(set(special.values()) | vocab.keys()) != len(special) + len(vocab):
        raise TokenizerError("tokenizer_config.json: a special token is another token too")
    made = byte_level_document(
        vocab | {text: i for i, text in special.items()},
        merges,
        pre.splitting(*known.expressions),
        known.ignore_merges,
    )
    made["normalizer"] = known.normalizer
    made["added_tokens"] = [added_token(text, i, special=True) for i, text in special.items()]
    return made


def _from_vocab_and_merges(spec: TokenizerSpec, config: Json) -> Json:
    kind = config.get("tokenizer_class")
    if kind not in _CLASS_PRE:
        raise TokenizerError(
            f"a {kind} without tokenizer.json cannot be rebuilt from vocab.json and merges.txt; "
            "save it with save_pretrained of a fast tokenizer first"
        )
    lines = _text(spec.files["merges.txt"], "merges.txt").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or not line.strip():
            continue
        if len(pair) != 2:
            raise TokenizerError(f"merges.txt, line {number}: expected two tokens, found {line!r}")
        merges.append(pair)
    name = _CLASS_PRE[kind]
    made = byte_level_document(read_json(spec, "vocab.json"), merges, pre.gpt2_pre_tokenizer())
    if name == "qwen2":
        made["pre_tokenizer"] = pre.pre_tokenizer(name)[0]
        made["normalizer"] = {"type": "NFC"}
    return made


def byte_level_document(
    vocab: Mapping[str, int],
    merges: list[list[str]],
    pre_tokenizer: Json,
    ignore_merges: bool = False,
) -> Json:
    """A tokenizer.json of a GPT-2 style byte-level tokenizer, without added tokens."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocab),
            "merges": merges,
        },
    }


def added_token(text: str, number: int, special: bool, **flags: bool) -> Json:
    """An entry of ``added_tokens``."""
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
        **flags,
    }


def _add_tokens(made: Json, spec: TokenizerSpec, config: Json) -> None:
    """Add the tokens that are declared outside tokenizer.json; mark those with a role special."""
    ids = vocabulary(made)
    taken = set(ids.values())
    added = made["added_tokens"] = list(made.get("added_tokens") or ())
    by_text = {token["content"]: token for token in added}
    declared: dict[str, Json] = {
        text: added_token(text, number, special=False)
        for text, number in read_json(spec, "added_tokens.json").items()
        if isinstance(number, int)
    }
    entries = config.get("added_tokens_decoder")
    for number, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and (text := content(entry)) and number.isdecimal():
            flags = {name: entry[name] is True for name in _FLAGS if name in entry}
            declared[text] = added_token(text, int(number), **{"special": False, **flags})
    roles = set(special_tokens(config).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        if isinstance(more, (list, tuple)):
            roles |= {text for token in more if (text := content(token))}
    for text in roles:
        if text in ids:
            declared.setdefault(text, added_token(text, ids[text], special=True))
    vocab = made["model"]["vocab"]
    for text, token in sorted(declared.items(), key=lambda item: item[1]["id"]):
        if text in by_text or ids.get(text, token["id"]) != token["id"]:
            continue
        if text not in ids:
            if token["id"] in taken:
                continue
            if isinstance(vocab, dict):  # pins the id, which is otherwise the next free one
                vocab[text] = token["id"]
        by_text[text] = token
        added.append(token)
    for token in added:
        # transformers may list a tokenizer's runs of spaces among its special tokens.
        if token["content"] in roles and token["content"].strip(sentencepiece.SPACE + " \t\r\n"):
            token["special"] = True


def _set_ends(made: Json, config: Json, adds: Sequence[str]) -> None:
    """Let explicit ``add_bos_token`` and ``add_eos_token`` decide what an encoding begins with.

    ``adds``: the roles whose tokens are added where the settings are silent.
    """
    flags = [config.get("add_bos_token"), config.get("add_eos_token")]
    for i, role in enumerate(("bos_token", "eos_token")):
        if role in adds and flags[i] is None:
            flags[i] = True
    if not any(isinstance(flag, bool) for flag in flags):
        return
    texts = special_tokens(config)
    ids = vocabulary(made)
    ends: list[str | None] = []
    for flag, role in zip(flags, ("bos_token", "eos_token")):
        text = texts.get(role) if flag is True else None
        ends.append(text if text in ids else None)
    if ends == list(template_ends(made.get("post_processor"))):
        return
    made["post_processor"] = template_processing(ends[0], ends[1], ids)


def template_processing(first: str | None, last: str | None, ids: Mapping[str, int]) -> Json:
    """A post-processor that puts a token before and one after every text."""

    def special(text: str | None, part: int) -> list[Json]:
        return [] if text is None else [{"SpecialToken": {"id": text, "type_id": part}}]

    def around(sequence: str, part: int) -> list[Json]:
        body = [{"Sequence": {"id": sequence, "type_id": part}}]
        return [*special(first, part), *body, *special(last, part)]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            text: {"id": text, "ids": [ids[text]], "tokens": [text]}
            for text in (first, last)
            if text is not None
        },
    }


def template_ends(post_processor: Any) -> tuple[str | None, str | None]:
    """The special tokens that a post-processor puts before and after a single text."""
    first = last = None
    for step in pre.flat(post_processor, "processors"):
        if step.get("type") == "TemplateProcessing" and isinstance(step.get("single"), list):
            parts = [part for part in step["single"] if isinstance(part, dict)]
            specials = [_special_id(part) for part in parts]
            at = next((i for i, part in enumerate(parts) if "Sequence" in part), len(parts))
            first = next((text for text in specials[:at] if text), None)
            last = next((text for text in reversed(specials[at:]) if text), None)
        elif step.get("type") in ("RobertaProcessing", "BertProcessing"):
            first, last = (
                pair[0] if isinstance(pair, list) and pair and isinstance(pair[0], str) else None
                for pair in (step.get("cls"), step.get("sep"))
            )
    return first, last


def _special_id(part: Json) -> str | None:
    special = part.get("SpecialToken")
    found = special.get("id") if isinstance(special, dict) else None
    return found if isinstance(found, str) else None


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, in order, whichever of the two spellings the file has."""
    merges = model.get("merges") or []
    pairs = []
    for merge in merges if isinstance(merges, list) else [merges]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
            raise TokenizerError(f"tokenizer.json: merge {merge!r} is not a pair")
        pairs.append((parts[0], parts[1]))
    return pairs


def merge_scores(model: Mapping[str, Any]) -> dict[str, float]:
    """Scores that put the products of merges in the order in which they are merged.

    SentencePiece merges by score, tokenizer.json by rank: the first product gets 0, the next -1.
    """
    scores: dict[str, float] = {}
    for left, right in merge_pairs(model):
        scores.setdefault(left + right, -float(len(scores)))
    return scores
