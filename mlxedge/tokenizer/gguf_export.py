"""From Hugging Face's tokenizer files to a GGUF file's metadata.

What is written is what llama.cpp's converter writes (conversion/base.py and SpecialVocab of gguf-py
as vendored by llama-cpp-python 0.3.36), with these differences:

- whether BOS and EOS are added is always said;
- a chat_template.jinja stands above the settings, as in transformers;
- a SentencePiece vocabulary without its tokenizer.model gets scores in the order of its merges, not
  one score for all; a BPE over characters that is no SentencePiece model, the ranks of its merges;
- a SentencePiece unigram tokenizer is written as one ("t5") whatever the architecture;
- a tokenizer that no hash knows may be recognised by its rules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer

from mlxedge.errors import TokenizerError
from mlxedge.gguf_values import Metadata, array, boolean, string, u32
from mlxedge.tokenizer import files, pre, sentencepiece
from mlxedge.tokenizer.gguf_import import (
    ADD_BOS,
    ADD_EOS,
    CHARSMAP,
    ENCODERS_ONLY,
    MERGE_SPACES,
    MERGES,
    MODEL,
    PRE,
    ROLE_KEYS,
    SCORES,
    SPACE_PREFIX,
    TEMPLATE,
    TOKEN_TYPES,
    TOKENS,
)
from mlxedge.tokenizer.pre_hashes import CHECK_TEXT
from mlxedge.tokenizer.runtime import build
from mlxedge.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)
from mlxedge.tokenizer.spec import TokenizerSpec
from mlxedge.tokenizer.special import GEMMA4_SIGN, GEMMA4_VISIBLE_TEXTS, looks_special

#: Settings that name a token of another role, and GGUF's key for it.
_MORE_ROLES = {
    "eot_token": "tokenizer.ggml.eot_token_id",
    "eom_token": "tokenizer.ggml.eom_token_id",
    "prefix_token": "tokenizer.ggml.fim_pre_token_id",
    "suffix_token": "tokenizer.ggml.fim_suf_token_id",
    "middle_token": "tokenizer.ggml.fim_mid_token_id",
    **{
        f"fim_{part}_token": f"tokenizer.ggml.fim_{part}_token_id"
        for part in ("pre", "suf", "mid", "pad", "rep", "sep")
    },
}
_PADDING_SCORE, _ADDED_SCORE = -10_000.0, -1_000.0
#: The pre-tokenizer under which llama.cpp merges characters by rank, and not by score.
_RAW = "sarvam-moe"
_BYTES = {f"<0x{byte:02X}>": BYTE for byte in range(256)}


def to_gguf(spec: TokenizerSpec, config: Mapping[str, Any], pre: str | None = None) -> Metadata:
    """The ``tokenizer.*`` metadata of a GGUF file.

    ``config`` is the model's config.json: ``vocab_size`` (rows of the embedding; gaps become
    ``[PADi]``) and ids of special tokens. ``pre`` names the pre-tokenizer by hand. A tokenizer that
    came from a GGUF file keeps its metadata. Raises TokenizerError if llama.cpp has no equivalent
    for the tokenizer, or it does not fit the vocabulary.
    """
    if spec.gguf:
        kept = dict(spec.gguf)
        return kept if pre is None else {**kept, PRE: string(_known(pre))}
    document = files.document(spec)
    settings = files.settings(spec)
    kind = _model_kind(spec, document)
    tokenizer = build(document)  # refuses what does not make sense
    pieces = _pieces(spec, document, config, kind)
    made: Metadata = {MODEL: string("gpt2" if kind == _RAW else kind)}
    if kind == "gpt2":
        made[PRE] = string(_pre(tokenizer, document, settings, pre))
    elif kind == _RAW:
        made[PRE] = string(_RAW)
    elif kind != "gemma4":
        made[PRE] = string("default")
    made[TOKENS] = array("str", [piece.text for piece in pieces])
    if kind not in ("gpt2", _RAW):
        made[SCORES] = array("f32", [piece.score for piece in pieces])
    made[TOKEN_TYPES] = array("i32", [piece.kind for piece in pieces])
    if kind in ("gpt2", "gemma4", _RAW):
        made[MERGES] = array(
            "str", [" ".join(map(_no_space, pair)) for pair in files.merge_pairs(document["model"])]
        )
    made |= _roles(document, settings, config, len(pieces))
    made |= _additions(document, settings, kind)
    if kind == "t5":
        made |= _unigram(document)
    made |= _templates(files.chat_templates(spec))
    return made


def _known(name: str) -> str:
    return pre.identify({}, [], name)


def _no_space(token: str) -> str:
    return token.replace(" ", "Ġ")  # a merge is written as two words


def _model_kind(spec: TokenizerSpec, document: Mapping[str, Any]) -> str:
    """llama.cpp's name for the kind of tokenizer, or ``_RAW``."""
    model = document["model"]
    fallback = bool(model.get("byte_fallback"))
    if isinstance(model["vocab"], list):
        if model.get("type", "Unigram") == "Unigram" and not fallback:
            return "t5"
    elif model.get("type", "BPE") == "BPE":
        if fallback:
            if GEMMA4_SIGN in files.vocabulary(document):
                return "gemma4"
            pairs = set(files.merge_pairs(model))
            if _own_pieces(spec, document) or sentencepiece.merges_everything(document, pairs):
                return "llama"
            _check_raw(document, pairs)
            return _RAW
        steps = [
            *pre.flat(document.get("pre_tokenizer"), "pretokenizers"),
            *pre.flat(document.get("decoder"), "decoders"),
        ]
        if any(step.get("type") == "ByteLevel" for step in steps):
            return "gpt2"
    if model.get("type") == "WordPiece":
        raise TokenizerError(ENCODERS_ONLY)
    raise TokenizerError(
        "byte-level BPE, SentencePiece BPE with byte fallback and SentencePiece unigram without it "
        "are the tokenizers that are written to GGUF; this one is "
        f"{model.get('type')} {'with' if fallback else 'without'} byte fallback"
    )


def _check_raw(document: Mapping[str, Any], pairs: Collection[tuple[str, str]]) -> None:
    """Refuse a BPE over characters, with merges of its own, that llama.cpp cannot run."""
    products = (left + right for left, right in pairs)
    mixed = any("\n" in text and text.strip("\n") for text in products)
    if mixed or sentencepiece.prepends_space(document):
        raise TokenizerError(
            "the tokenizer merges only some of the pairs whose product is a token, which "
            "SentencePiece has no way to say; llama.cpp has one only for tokenizers that put no "
            "space before a text and merge nothing across the end of a line"
        )


def _unigram(document: Mapping[str, Any]) -> Metadata:
    """What a unigram tokenizer does to a text before it looks for pieces."""
    rules = sentencepiece.unigram_rules(document)
    made = {
        SPACE_PREFIX: boolean(rules.space_prefix),
        MERGE_SPACES: boolean(rules.remove_extra_spaces),
    }
    if rules.charsmap:
        made[CHARSMAP] = array("u8", list(rules.charsmap))
    return made


def _pre(
    tokenizer: Tokenizer,
    document: Mapping[str, Any],
    settings: Mapping[str, Any],
    name: str | None,
) -> str:
    if name is not None:
        return _known(name)
    plain = tokenizer.encode(CHECK_TEXT, add_special_tokens=False).ids
    full = tokenizer.encode(CHECK_TEXT).ids
    bos = files.vocabulary(document).get(files.special_tokens(settings).get("bos_token", ""))
    # The hashes were taken with whatever the tokenizer adds; some configurations add BOS, and
    # some copies of the same tokenizer do not.
    ways = [full, plain] + ([[bos, *plain]] if bos is not None else [])
    return pre.identify(document, ways)


def _pieces(
    spec: TokenizerSpec, document: Mapping[str, Any], config: Mapping[str, Any], kind: str
) -> list[Piece]:
    """Every row of the embedding as a token."""
    added = {token["content"]: token for token in document["added_tokens"]}
    ids = files.vocabulary(document)
    size = config.get("vocab_size")
    size = size if isinstance(size, int) else max(ids.values()) + 1
    beyond = [text for text, number in ids.items() if number >= size and text not in added]
    if beyond:
        raise TokenizerError(
            f"the model has {size} embeddings and the tokenizer {len(beyond)} tokens beyond them, "
            f"such as {beyond[0]!r}: they are not of one model"
        )
    scores = _scores(spec, document, kind)
    kinds = _kinds(spec, document, kind)
    visible = GEMMA4_VISIBLE_TEXTS if kind == "gemma4" else frozenset()
    unknown = _unknown_text(document)
    pieces: list[Piece | None] = [None] * size
    for text, number in ids.items():
        if not 0 <= number < size:  # an added token without an embedding is of no use
            continue
        if pieces[number] is not None:
            raise TokenizerError(f"token {number} is {pieces[number].text!r} and {text!r}")  # type: ignore[union-attr]
        token = added.get(text)
        score = scores.get(text, _ADDED_SCORE if token else 0.0)
        if text == unknown and kind in ("llama", "t5"):
            pieces[number] = Piece(text, score, UNKNOWN)
        elif token is None:
            pieces[number] = Piece(text, score, kinds.get(text, NORMAL))
        elif text not in visible and (token.get("special") or looks_special(text)):
            pieces[number] = Piece(text, score, CONTROL)
        else:
            # llama.cpp looks for these in the text as it is, before spaces are replaced.
            pieces[number] = Piece(text.replace(SPACE, " "), score, USER_DEFINED)
    return [
        piece or Piece(sentencepiece.padding_piece(i), _PADDING_SCORE, UNUSED)
        for i, piece in enumerate(pieces)
    ]


def _unknown_text(document: Mapping[str, Any]) -> str | None:
    model = document["model"]
    number = model.get("unk_id")
    if isinstance(model["vocab"], list) and isinstance(number, int):
        return str(model["vocab"][number][0])
    return model.get("unk_token")


def _scores(spec: TokenizerSpec, document: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Scores of pieces: their own, those of tokenizer.model, or the order of the merges."""
    vocab = document["model"]["vocab"]
    if kind == "t5":
        return dict(vocab)
    if kind == "gemma4":
        return dict.fromkeys(vocab, _ADDED_SCORE)
    if kind != "llama":
        return {}
    scores = {piece.text: piece.score for piece in _own_pieces(spec, document)}
    if not scores:
        ranked = files.merge_scores(document["model"])
        lowest = -float(len(ranked))
        scores = {text: ranked.get(text, lowest) for text in vocab}
        scores |= dict.fromkeys(_BYTES, 0.0)
    for token in document["added_tokens"]:
        scores.pop(token["content"], None)
    return scores


def _kinds(spec: TokenizerSpec, document: Mapping[str, Any], kind: str) -> Mapping[str, int]:
    """Kinds of the pieces that are no added tokens, where they are not normal ones."""
    if kind == "gpt2":
        return {}
    if kind == "llama" and (own := _own_pieces(spec, document)):
        return {piece.text: piece.kind for piece in own}
    return _BYTES


def _own_pieces(spec: TokenizerSpec, document: Mapping[str, Any]) -> list[Piece]:
    """The pieces of the folder's tokenizer.model, if they are those of the document."""
    raw = spec.files.get("tokenizer.model")
    if raw is None:
        return []
    try:
        model = sentencepiece.parse(raw)
    except TokenizerError:
        if "tokenizer.json" not in spec.files:
            raise
        return []  # another format under the same name
    vocab = document["model"]["vocab"]
    own = [(i, p) for i, p in enumerate(model.pieces) if p.kind in (NORMAL, UNUSED, BYTE)]
    return [piece for _, piece in own] if all(vocab.get(p.text) == i for i, p in own) else []


def _roles(
    document: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    size: int,
) -> Metadata:
    """Ids of special tokens: by their text in the settings, else by id in config.json."""
    ids = files.vocabulary(document)
    texts = files.special_tokens(settings)
    made: Metadata = {}
    for role, key in ROLE_KEYS.items():
        for number in (ids.get(texts.get(f"{role}_token", "")), config.get(f"{role}_token_id")):
            if isinstance(number, int) and 0 <= number < size:
                made[key] = u32(number)
                break
    unknown = _unknown_text(document)
    if ROLE_KEYS["unk"] not in made and unknown in ids and ids[unknown] < size:
        made[ROLE_KEYS["unk"]] = u32(ids[unknown])
    for name, key in _MORE_ROLES.items():
        number = ids.get(files.content(settings.get(name)) or "")
        if number is not None and number < size:
            made[key] = u32(number)
    return made


def _additions(document: Mapping[str, Any], settings: Mapping[str, Any], kind: str) -> Metadata:
    """What llama.cpp puts around a text."""
    first, last = files.template_ends(document.get("post_processor"))
    texts = files.special_tokens(settings)
    ids = files.vocabulary(document)
    made: Metadata = {}
    for text, role, key in ((first, "bos", ADD_BOS), (last, "eos", ADD_EOS)):
        named = texts.get(f"{role}_token")
        if text is not None and named not in (None, text):
            raise TokenizerError(
                f"the tokenizer adds {text!r} where its settings name {named!r} as {role}_token; "
                "llama.cpp can only add the latter"
            )
        made[key] = boolean(text is not None)
        if text is not None and named is None:
            made[ROLE_KEYS[role]] = u32(ids[text])
    given = settings.get("add_prefix_space")
    if kind == "llama":
        made[SPACE_PREFIX] = boolean(sentencepiece.prepends_space(document))
    elif kind == "gemma4":
        made[SPACE_PREFIX] = boolean(False)
    elif isinstance(given, bool):
        made[SPACE_PREFIX] = boolean(given)
    return made


def _templates(templates: Mapping[str, str]) -> Metadata:
    """The chat templates; those with a name of their own under keys of their own."""
    made: Metadata = {}
    named = []
    for name, template in templates.items():
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        if name != "default" and plain:
            made[f"{TEMPLATE}.{plain}"] = string(template)
            named.append(plain)
    if named:
        made[TEMPLATE + "s"] = array("str", named)
    if "default" in templates:
        made[TEMPLATE] = string(templates["default"])
    return made
