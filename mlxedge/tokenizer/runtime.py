"""A tokenizer that runs: text to ids, ids to text, chats to prompts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from mlxedge.errors import TemplateError, TokenizerError
from mlxedge.tokenizer import chat, files, sentencepiece
from mlxedge.tokenizer.spec import TokenizerSpec
from mlxedge.tokenizer.special import END_TEXTS, looks_special, not_an_end
from mlxedge.tokenizer.stream import ByteStream, TextStream, bytes_of_token, strips_first_space


def build(document: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The ``tokenizers`` object of a tokenizer.json document. Raises TokenizerError."""
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(document))
        made.encode("")  # what surrounds a text is only looked up when it is used
    except BaseException as error:
        # The library's own errors are bare Exceptions, or a Rust panic, which is not even one.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"the tokenizer cannot be built: {error}") from error
        raise
    return made


def load(spec: TokenizerSpec, generation_config: Mapping[str, Any] | None = None) -> Tokenizer:
    """Make the tokenizer of a model ready to use.

    ``generation_config`` is the content of generation_config.json, whose ``eos_token_id`` (one or
    several) end a generation too. Raises TokenizerError if the files make no tokenizer.
    """
    return Tokenizer(spec, generation_config)


class Tokenizer:
    """Text ↔ ids of one model. Safe to use from several threads at once."""

    def __init__(
        self, spec: TokenizerSpec, generation_config: Mapping[str, Any] | None = None
    ) -> None:
        self._document = files.document(spec)
        self._tokenizer = build(self._document)
        self._special = files.special_tokens(files.settings(spec))
        self._templates = files.chat_templates(spec)
        self._ids = files.vocabulary(self._document)
        # A GGUF file says of every token whether it is one that controls the model; Hugging Face's
        # files do not always.
        self._controls = frozenset(
            token["content"]
            for token in self._document["added_tokens"]
            if token.get("special") or (not spec.gguf and looks_special(token["content"]))
        )
        self.vocab_size: int = max(self._ids.values(), default=-1) + 1
        self.bos_id: int | None = self._ids.get(self._special.get("bos_token", ""))
        self.eos_id: int | None = self._ids.get(self._special.get("eos_token", ""))
        #: The ids after which generation stops.
        self.end_ids: frozenset[int] = self._ends(generation_config or {})

    def _ends(self, generation_config: Mapping[str, Any]) -> frozenset[int]:
        texts = {text for text in END_TEXTS if text in self._controls}
        found = {self._ids[text] for text in texts - not_an_end(texts)}
        declared = generation_config.get("eos_token_id")
        declared = declared if isinstance(declared, (list, tuple)) else [declared]
        found |= {number for number in declared if isinstance(number, int) and number >= 0}
        return frozenset(found if self.eos_id is None else found | {self.eos_id})

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second tokenizer to which the text of a control token is only text."""
        # A unigram model takes every piece that it finds, the special ones too: they are renamed.
        hidden = self._controls if isinstance(self._document["model"]["vocab"], list) else ()
        added = [
            {**token, "special": token["content"] in self._controls}
            for token in self._document["added_tokens"]
            if token["content"] not in hidden
        ]
        document = sentencepiece.rename_pieces(self._document, hidden)
        made = build({**document, "added_tokens": added})
        made.encode_special_tokens = True
        return made

    @functools.cached_property
    def _token_bytes(self) -> Callable[[str], bytes] | None:
        return bytes_of_token(self._document.get("decoder"))

    @functools.cached_property
    def _adds_bos(self) -> bool:
        first, _ = files.template_ends(self._document.get("post_processor"))
        return first is not None and self._ids.get(first) == self.bos_id

    @functools.cached_property
    def leading_bos(self) -> int | None:
        """The id of BOS if it is put before a text, else ``None``."""
        return self.bos_id if self.encode("")[:1] == [self.bos_id] else None

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        ``add_special`` puts the model's BOS (and EOS) tokens around it, if it uses any.
        ``parse_special=False`` reads the text of a control token (``<|im_end|>``) as plain text,
        so that what a user types cannot end a turn. Raises TokenizerError for a text that is not
        Unicode (a lone surrogate).
        """
        tokenizer = self._tokenizer if parse_special else self._plain
        try:
            encoded = tokenizer.encode(text, add_special_tokens=add_special)
        except (TypeError, UnicodeError) as error:
            raise TokenizerError(f"the text cannot be encoded: {error}") from error
        return list(encoded.ids)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 come out as U+FFFD."""
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        except (OverflowError, TypeError) as error:
            raise TokenizerError(f"not token ids: {error}") from error
        return text

    def token(self, number: int) -> str:
        """A token as the vocabulary spells it; ``[PADi]`` for an id without one."""
        text = self._tokenizer.id_to_token(number) if number >= 0 else None
        return f"[PAD{number}]" if text is None else text

    def stream(self, skip_special: bool = False) -> ByteStream | TextStream:
        """A decoder for tokens as they come: ``add(id)`` returns the text that is complete."""
        spelled = self._token_bytes
        if spelled is None:
            return TextStream(functools.partial(self.decode, skip_special=skip_special))
        spell, hidden = spelled, self._controls if skip_special else frozenset()

        def token(number: int) -> bytes:
            text = self._tokenizer.id_to_token(number) if number >= 0 else None
            return b"" if text is None or text in hidden else spell(text)

        return ByteStream(token, strips_first_space(self._document.get("decoder")))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt that the model's chat template makes of messages.

        ``variables`` are passed on to the template (``tools``, ``documents``, switches of the
        model's own). With tools, a template named "tool_use" is preferred. Raises TemplateError
        if there is no template, it refuses the messages, or it exceeds its limits (see ``chat``).
        """
        name = "tool_use" if variables.get("tools") and "tool_use" in self._templates else "default"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise TemplateError(
                "this tokenizer has no chat template"
                + (f' named "default", only {known}' * bool(known))
            )
        given = {
            **self._special,
            "tools": None,
            "documents": None,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        return chat.render(self._templates[name], given)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The ids of ``render_chat``, with one BOS token if the model uses any, and no EOS."""
        text = self.render_chat(messages, add_generation_prompt, **variables)
        ids = self.encode(text, add_special=False)
        if self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids
