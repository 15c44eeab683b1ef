"""What the user wants otherwise than the recipe: types for single tensors, for the output head and
the embedding, or one type for all.

The options are those of llama.cpp's llama-quantize (tools/quantize/quantize.cpp as vendored by
llama-cpp-python 0.3.36): ``--tensor-type``, ``--output-tensor-type``, ``--token-embedding-type``
and ``--pure``. A type says which targets it is for: q6_k is one of GGUF, 6bit one of MLX, bf16 of
both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mlxedge.encodings import GGML, MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.errors import UsageError

if TYPE_CHECKING:
    from mlxedge.targets import Target

Format = Literal["gguf", "mlx"]
Role = Literal["output", "embedding"]

_AFFINE = re.compile(r"(\d+)bit(?:-g(\d+))?")
_GGUF_TYPES: dict[str, Encoding] = {
    **PLAIN,
    **{name: encoding for name, encoding in GGML.items() if encoding.writable},
}


@dataclass(frozen=True)
class Type:
    """A type as the user wrote it, and what it is in each format that has it."""

    text: str
    gguf: Encoding | None
    mlx: Encoding | None

    def of(self, form: Format) -> Encoding | None:
        return self.gguf if form == "gguf" else self.mlx

    @property
    def formats(self) -> list[Format]:
        both: tuple[Format, Format] = ("gguf", "mlx")
        return [form for form in both if self.of(form) is not None]


@dataclass(frozen=True)
class TensorRule:
    """``type`` for every tensor in whose name ``pattern`` is found."""

    pattern: re.Pattern[str]
    type: Type

    def __str__(self) -> str:
        return f"{self.pattern.pattern}={self.type.text}"


@dataclass(frozen=True)
class Overrides:
    """``rules`` in order, of which the first that matches counts; ``pure``: no mix."""

    rules: tuple[TensorRule, ...] = ()
    output: Type | None = None
    embedding: Type | None = None
    pure: bool = False

    def __bool__(self) -> bool:
        return self != NONE

    def named(self, name: str, form: Format) -> Encoding | None:
        """What the first rule for this format says that matches ``name``."""
        for rule in self.rules:
            encoding = rule.type.of(form)
            if encoding is not None and rule.pattern.search(name):
                return encoding
        return None

    def find(
        self, name: str, form: Format, role: Role | None = None, tied: bool = False
    ) -> Encoding | None:
        """What is wanted for the tensor ``name``, or ``None`` to leave it to the recipe.

        ``tied``: the embedding is the output head too. The types of head and embedding come before
        rules, but the head's does not for an embedding that is one.
        """
        output = self.output.of(form) if self.output else None
        embedding = self.embedding.of(form) if self.embedding else None
        if role == "embedding":
            return embedding or self.named(name, form) or (output if tied else None)
        return (output if role == "output" else None) or self.named(name, form)

    @property
    def _roles(self) -> list[tuple[str, Type]]:
        """The options for head and embedding."""
        both = (("--output-type", self.output), ("--embedding-type", self.embedding))
        return [(option, kind) for option, kind in both if kind is not None]

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Raise UsageError for a type that none of ``targets`` has, and for ``pure`` where none has
        a mix."""
        known = {target.format for target in targets}
        given = [(f"--tensor {rule}", rule.type) for rule in self.rules]
        for option, kind in [*given, *self._roles]:
            if known.isdisjoint(kind.formats):
                raise UsageError(
                    f"{option}: {kind.text} is a type of {' and '.join(kind.formats)} targets, and "
                    "there is none"
                )
        if self.pure and not any(_has_mix(target) for target in targets):
            raise UsageError(
                "--pure: only quantized gguf targets mix types, and there is none: leave it out"
            )

    def unused(self, target: Target) -> list[str]:
        """Notes on what is meant for all matrices, the head or the embedding, and changes nothing
        in ``target``."""
        notes = [
            f"{option} {kind.text} changes nothing here: it is a type of "
            f"{' and '.join(kind.formats)} targets"
            for option, kind in self._roles
            if target.format not in kind.formats
        ]
        if self.pure and not _has_mix(target):
            notes.append("--pure changes nothing here: this target mixes no types")
        return notes

    def unmatched(self, form: Format, names: Sequence[str]) -> list[str]:
        """Notes on rules that match none of ``names``, the matrices of an output of this format.

        Raises UsageError for a rule that could not match in another format either.
        """
        notes = []
        for rule in self.rules:
            if rule.type.of(form) is None or any(rule.pattern.search(name) for name in names):
                continue
            what = f"--tensor {rule}: {form} has no matrix with such a name"
            if len(rule.type.formats) == 1:
                raise UsageError(f"{what}; its names are like {names[-1]}" if names else what)
            notes.append(what)
        return notes


def _has_mix(target: Target) -> bool:
    return target.format == "gguf" and target.recipe not in PLAIN


NONE = Overrides()


def parse_overrides(
    tensors: Sequence[str] = (),
    *,
    output: str | None = None,
    embedding: str | None = None,
    pure: bool = False,
) -> Overrides:
    """Parse ``--tensor REGEX=TYPE`` values, ``--output-type`` and ``--embedding-type``.

    A regular expression is searched for in the name, without regard to case: the GGUF name for
    GGUF targets, Hugging Face's for MLX. Raises UsageError that names what is possible.
    """
    rules = []
    for text in tensors:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern or not kind:
            raise UsageError(
                f"--tensor {text!r}: write REGEX=TYPE, for example ffn_down=q6_k or down_proj=6bit"
            )
        try:
            compiled = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise UsageError(f"--tensor {text!r}: not a regular expression: {error}") from None
        rules.append(TensorRule(compiled, _type(kind, f"--tensor {text!r}")))
    return Overrides(
        tuple(rules),
        _type(output, "--output-type") if output else None,
        _type(embedding, "--embedding-type") if embedding else None,
        pure,
    )


def with_scales(encoding: Encoding, dtype: str) -> Encoding:
    """``encoding`` with scales of ``dtype``, if it has any that can be of another."""
    return replace(encoding, scale_dtype=dtype) if isinstance(encoding, Affine) else encoding


def _type(text: str, option: str) -> Type:
    name = text.strip().lower()
    mlx: Encoding | None = MLX_FLOAT.get(name) or PLAIN.get(name)
    if match := _AFFINE.fullmatch(name):
        bits, group = int(match[1]), int(match[2] or 64)
        if bits in AFFINE_BITS and group in AFFINE_GROUPS:
            mlx = Affine(bits, group)
    gguf = _GGUF_TYPES.get(name)
    if mlx is None and gguf is None:
        raise UsageError(
            f"{option}: unknown type {text!r}: GGUF has {', '.join(_GGUF_TYPES)}; MLX has "
            f"BITSbit[-gGROUP] of {', '.join(map(str, AFFINE_BITS))} bits and groups of "
            f"{', '.join(map(str, AFFINE_GROUPS))}, {', '.join((*MLX_FLOAT, *PLAIN))}"
        )
    return Type(name, gguf, mlx)
