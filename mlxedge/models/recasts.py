"""What a world stores otherwise than by name: several tensors in one, transposed, of other values.

A ``Recast`` is declared by an architecture and carried out by ``mlxedge.sources.recasts``, in both
directions: readers turn what a world has into the canonical tensors, writers the other way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.errors import UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

Config = dict[str, Any]
#: Hugging Face folders, GGUF files, MLX folders.
World = Literal["stored", "gguf", "mlx"]
#: Whose names and forms the tensors of a checkpoint have, by what its files are.
WORLDS: Mapping[str, World] = {"hf": "stored", "mlx": "mlx", "gguf": "gguf"}
#: From a config and the rows of each part the order in which a world has them:
#: ``joined = concatenated[order]``.
Order = Callable[[Config, Sequence[int]], "np.ndarray"]


@dataclass(frozen=True)
class Join:
    """Several tensors become one: their rows one after another, then in ``order``, if there is one.

    Rows are the last but one axis, for each index of those before it; the elements of a vector. In
    ``columns`` they are the last axis, as in the stacked biases ``[experts, rows]`` of matrices
    that are joined.
    """

    order: Order | None = None
    columns: bool = False


@dataclass(frozen=True)
class Split:
    """One tensor becomes several of ``sizes(config)`` rows each: the other way of ``Join``."""

    sizes: Callable[[Config], Sequence[int]]
    order: Order | None = None


@dataclass(frozen=True)
class Transpose:
    """The last two axes change places. Codes cannot follow: they are decoded to floats.

    ``floats``: what is quantized there is not transposed, as of the Conv1D layers of transformers,
    which quantizers replace by linear ones.
    """

    floats: bool = False


@dataclass(frozen=True)
class Values:
    """Other values, computed in f32 and kept as f32: ``there`` makes those of the world, ``back``
    ours."""

    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scale:
    """Values times ``factor(config)``, which is never 0, computed in f32 and kept as f32."""

    factor: Callable[[Config], float]


@dataclass(frozen=True)
class Reshape:
    """The same elements in another shape, which ``there`` makes of ours; of small tensors, which
    are read whole. The way back leads to the shape that the architecture expects; where it goes on
    from there, to that which ``back`` makes. ``rows``: a vector becomes a matrix of so many
    rows."""

    there: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape
    back: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
    rows: Callable[[Config], int] | None = None


@dataclass(frozen=True)
class ScaleRows:
    """The world's rows are ours divided by ``factors(config, rows)``, f32 ``[rows]``. Codes cannot
    follow, but where all factors are one."""

    factors: Callable[[Config, int], np.ndarray]


@dataclass(frozen=True)
class Stack:
    """Rows become a stack of ``count(config)`` matrices of as many rows each; codes stay."""

    count: Callable[[Config], int]


@dataclass(frozen=True)
class Extend:
    """Up to ``rows(config)`` rows, those that are missing copies of the first."""

    rows: Callable[[Config], int]


@dataclass(frozen=True)
class Each:
    """Steps of its own for each of several tensors."""

    steps: tuple[tuple[Step, ...], ...]


Step = Join | Split | Transpose | Values | Scale | Reshape | ScaleRows | Stack | Extend | Each


@dataclass(frozen=True)
class Recast:
    """In ``world`` the tensors ``canonical`` are ``other``, which ``steps`` make of them in turn.

    Both are names with ``{i}`` for the layer, ``other`` those of the world. It serves wherever all
    the tensors of one side are there, ``when`` the config says so. ``exact``: what is made stays
    f32 whatever becomes of others.
    One that is not ``written`` is how a world has been before, and read alone.
    """

    world: World
    canonical: tuple[str, ...]
    other: tuple[str, ...]
    steps: tuple[Step, ...]
    exact: bool = False
    when: Callable[[Config], bool] = lambda config: True
    written: bool = True

    @cached_property
    def _patterns(self) -> Mapping[str, re.Pattern[str]]:
        names = (*self.canonical, *self.other)
        return {n: re.compile(re.escape(n).replace(r"\{i\}", r"(?P<i>\d+)")) for n in names}

    def layer_of(self, name: str, side: Sequence[str]) -> str | None:
        """The layer, or the empty string, if ``name`` is one of a side; else ``None``."""
        for template in side:
            if match := self._patterns[template].fullmatch(name):
                return match.groupdict().get("i", "")
        return None

    @property
    def keeps_columns(self) -> bool:
        """Whether what is made multiplies the same input, its columns in another order maybe."""
        joins = [step for step in self.steps if isinstance(step, (Join, Split, Extend))]
        moved = any(isinstance(step, Join) and step.columns for step in joins)
        return len(joins) == len(self.steps) and (not moved or len(self.canonical) == 1)

    def columns(self, config: Config, count: int) -> np.ndarray | None:
        """Which of ``count`` columns stands in each place, or ``None`` if they stay."""
        index = None
        for step in self.steps if self.keeps_columns else ():
            if isinstance(step, Join) and step.columns and step.order is not None:
                order = step.order(config, [count])
                index = order if index is None else index[order]
        return index

    def keeps(self, number: int) -> bool:
        """Whether the ``number``-th that is made multiplies the input of the first canonical one,
        as rows that have only moved do."""
        if self.keeps_columns:
            return True
        steps: list[Step] = []
        for step in self.steps:
            steps += step.steps[number] if isinstance(step, Each) else [step]
        rows = (not isinstance(step, Join) or not step.columns for step in steps)
        return all(rows) and all(isinstance(step, (Join, Split, Stack)) for step in steps)

    def matrices(self, number: int, config: Config) -> int:
        """How many matrices the ``number``-th that is made stacks, which were one."""
        own = (s for step in self.steps if isinstance(step, Each) for s in step.steps[number])
        steps = (*(step for step in self.steps if isinstance(step, Stack)), *own)
        return next((step.count(config) for step in steps if isinstance(step, Stack)), 1)

    def at(self, layer: str, side: Sequence[str]) -> list[str]:
        return [name.replace("{i}", layer) for name in side]


def joined_qkv(
    world: World, other: str, order: Order | None = None, *, transposed: bool = False
) -> tuple[Recast, ...]:
    """Of q, k and v that are one module ``other``: their weights, which may be ``transposed``
    there, and their biases."""
    return tuple(
        Recast(
            world,
            tuple(f"model.layers.{{i}}.self_attn.{part}_proj.{leaf}" for part in "qkv"),
            (f"{other}.{leaf}",),
            (Join(order), Transpose(floats=True))
            if transposed and leaf == "weight"
            else (Join(order),),
        )
        for leaf in ("weight", "bias")
    )


def heads_apart(config: Config, sizes: Sequence[int]) -> np.ndarray:
    """An ``Order`` for rows that go head by head: of each in turn its query, its key, its value."""
    return interleaved(config["num_attention_heads"], sizes)


def groups_apart(config: Config, sizes: Sequence[int]) -> np.ndarray:
    """An ``Order`` for rows that go by head of keys: its queries, then its key, then its value."""
    return interleaved(config["num_key_value_heads"], sizes)


def row_by_row(config: Config, sizes: Sequence[int]) -> np.ndarray:
    """An ``Order`` for parts of equal size that take turns row by row."""
    return interleaved(sizes[0], sizes)


def interleaved(count: int, sizes: Sequence[int]) -> np.ndarray:
    """Index ``[sum(sizes)]``: every part cut into ``count`` pieces, the first of all parts first.

    Raises UnsupportedModelError where they do not divide.
    """
    import numpy as np

    if any(size % count for size in sizes):
        raise UnsupportedModelError(f"{list(sizes)} rows do not divide into {count} equal pieces")
    starts = np.cumsum([0, *sizes[:-1]])
    pieces = [
        np.arange(size).reshape(count, -1) + start
        for size, start in zip(sizes, starts, strict=True)
    ]
    return np.concatenate(pieces, axis=1).ravel()
