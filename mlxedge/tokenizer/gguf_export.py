"""From Hugging Face's tokenizer files to a GGUF file's metadata.

What is written is what llama.cpp's converter writes (conversion/base.py and SpecialVocab of gguf-py
as vendored by llama-cpp-python 0.3.36), with three differences: whether BOS and EOS are added is
always said; a SentencePiece vocabulary without its tokenizer.model gets scores in the order of its
merges, not one score for all; and a tokenizer that no hash knows may be recognised by its rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from mlxedge.errors import TokenizerError
from mlxedge.gguf_values import Metadata, array, boolean, string, u32
from mlxedge.tokenizer import files, pre, sentencepiece
from mlxedge.tokenizer.gguf_import import (
    ADD_BOS,
    ADD_EOS,
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
from mlxedge.tokenizer.special import looks_special

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
    kind = _model_kind(document)
    tokenizer = build(document)  # refuses what does not make sense
    pieces = _pieces(spec, document, config, kind)
    made: Metadata = {MODEL: string(kind)}
    if kind == "gpt2":
        made[PRE] = string(_pre(tokenizer, document, settings, pre))
    else:
        made[PRE] = string("default")
    made[TOKENS] = array("str", [piece.text for piece in pieces])
    if kind == "llama":
        made[SCORES] = array("f32", [piece.score for piece in pieces])
    made[TOKEN_TYPES] = array("i32", [piece.kind for piece in pieces])
    if kind == "gpt2":
        made[MERGES] = array(
            "str", [" ".join(map(_no_space, pair)) for pair in files.merge_pairs(document["model"])]
        )
    made |= _roles(document, settings, config, len(pieces))
    made |= _additions(document, settings, kind)
    made |= _templates(files.chat_templates(spec))
    return made


def _known(name: str) -> str:
    return pre.identify({}, [], name)


def _no_space(token: str) -> str:
    return token.replace(" ", "Ġ")  # a merge is written as two words


def _model_kind(document: Mapping[str, Any]) -> str:
    """llama.cpp's name for the kind of tokenizer."""
    model = document["model"]
    if model.get("type", "BPE") == "BPE" and isinstance(model["vocab"], dict):
        if model.get("byte_fallback"):
            return "llama"
        steps = [
            *pre.flat(document.get("pre_tokenizer"), "pretokenizers"),
            *pre.flat(document.get("decoder"), "decoders"),
        ]
        if any(step.get("type") == "ByteLevel" for step in steps):
            return "gpt2"
    raise TokenizerError(
        "only byte-level BPE and SentencePiece BPE tokenizers are written to GGUF; this one is "
        f"{model.get('type')} {'with' if model.get('byte_fallback') else 'without'} byte fallback"
    )


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
    vocab = document["model"]["vocab"]
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
    scores, kinds = _scores(spec, document, vocab) if kind == "llama" else ({}, {})
    unknown = document["model"].get("unk_token")
    pieces: list[Piece | None] = [None] * size
    for text, number in ids.items():
        if not 0 <= number < size:  # an added token without an embedding is of no use
            continue
        if pieces[number] is not None:
            raise TokenizerError(f"token {number} is {pieces[number].text!r} and {text!r}")  # type: ignore[union-attr]
        token = added.get(text)
        score = _ADDED_SCORE if token else scores.get(text, 0.0)
        if text == unknown and kind == "llama":
            pieces[number] = Piece(text, score, UNKNOWN)
        elif token is None:
            pieces[number] = Piece(text, score, kinds.get(text, NORMAL))
        elif token.get("special") or looks_special(text):
            pieces[number] = Piece(text, score, CONTROL)
        else:
            # llama.cpp looks for these in the text as it is, before spaces are replaced.
            pieces[number] = Piece(text.replace(SPACE, " "), score, USER_DEFINED)
    return [
        piece or Piece(sentencepiece.padding_piece(i), _PADDING_SCORE, UNUSED)
        for i, piece in enumerate(pieces)
    ]


def _scores(
    spec: TokenizerSpec, document: Mapping[str, Any], vocab: Mapping[str, int]
) -> tuple[dict[str, float], dict[str, int]]:
    """Score and kind of the pieces: those of tokenizer.model, or the order of the merges."""
    kinds = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    raw = spec.files.get("tokenizer.model")
    if raw is not None:
        try:
            model = sentencepiece.parse(raw)
        except TokenizerError:
            if "tokenizer.json" not in spec.files:
                raise
            model = sentencepiece.Model()  # another format under the same name
        own = [(i, p) for i, p in enumerate(model.pieces) if p.kind in (NORMAL, UNUSED, BYTE)]
        if own and all(vocab.get(piece.text) == i for i, piece in own):
            return (
                {piece.text: piece.score for _, piece in own},
                {piece.text: piece.kind for _, piece in own},
            )
    ranked = files.merge_scores(document["model"])
    lowest = -float(len(ranked))
    scores = {text: ranked.get(text, lowest) for text in vocab}
    return {**scores, **dict.fromkeys(kinds, 0.0)}, kinds


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
    unknown = document["model"].get("unk_token")
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
        made[SPACE_PREFIX] = boolean(_prepends_space(document))
    elif isinstance(given, bool):
        made[SPACE_PREFIX] = boolean(given)
    return made


def _prepends_space(document: Mapping[str, Any]) -> bool:
    for step in pre.flat(document.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    for step in pre.flat(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            return scheme != "never" if scheme else bool(step.get("add_prefix_space", True))
    return False


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
