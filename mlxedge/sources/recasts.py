"""Carries out what ``mlxedge.models.recasts`` declares: tensors made of other tensors, read as rows
of them are asked for.

Rows keep their encoding when they only move. What is transposed or computed is decoded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.encodings import F32, Encoding
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.recasts import (
    Config,
    Each,
    Extend,
    Join,
    Recast,
    Reshape,
    Scale,
    ScaleRows,
    Split,
    Stack,
    Step,
    Transpose,
    Values,
    World,
)
from mlxedge.ops import load_reference
from mlxedge.sources.checkpoint import SourceTensor

if TYPE_CHECKING:
    from mlxedge.models.spec import ModelSpec
    from mlxedge.ops import Parts

#: Rows that lie so far apart are not read with what is between them.
_SPARSE = 4
#: Transposed blocks that are kept until others are asked for.
_BLOCKS = 4

Shape = tuple[int, ...]


def to_world(
    spec: ModelSpec, config: Config, tensors: Mapping[str, SourceTensor], world: World
) -> dict[str, SourceTensor]:
    """Prepared ``tensors`` as ``world`` has them. Those that are made of others stand where the
    first of these stood, under a key that begins with the world and a colon; their ``name`` is that
    of the world."""
    chosen: dict[str, tuple[Recast, str]] = {}
    for name in tensors:
        for recast in spec.recasts:
            if recast.world != world or name in chosen:
                continue
            if not recast.written or not recast.when(config):
                continue
            layer = recast.layer_of(name, recast.canonical)
            if layer is None:
                continue
            names = recast.at(layer, recast.canonical)
            if all(n in tensors and n not in chosen for n in names):
                chosen |= dict.fromkeys(names, (recast, layer))
    found: dict[str, SourceTensor] = {}
    done: set[tuple[int, str]] = set()
    for name, tensor in tensors.items():
        if name not in chosen:
            found[name] = tensor
            continue
        recast, layer = chosen[name]
        if (id(recast), layer) in done:
            continue
        done.add((id(recast), layer))
        names = recast.at(layer, recast.canonical)
        made = [tensors[n] for n in names]
        for step in recast.steps:
            made = _THERE[type(step)](config, step, made)
        others = recast.at(layer, recast.other)
        for number, (own, one) in enumerate(zip(others, made, strict=True)):
            like = names[0] if recast.keeps(number) else None
            columns = recast.columns(config, one.cols) if len(one.shape) > 1 else None
            found[f"{world}:{own}"] = replace(one, name=own, like=like, columns=columns)
    for own, (shape, input_of) in spec.placeholders(config, world).items():
        found[f"{world}:{own}"] = _zeros(own, shape, input_of)
    return found


def from_world(
    spec: ModelSpec, config: Config, tensors: Mapping[str, SourceTensor], world: World
) -> dict[str, SourceTensor]:
    """The canonical tensors where ``tensors`` of ``world`` are made of them; others as they are."""
    found = dict(tensors)
    expected = spec.expected(config) if spec.recasts else {}
    for recast in spec.recasts:
        if recast.world != world or not recast.when(config):
            continue
        layers = {recast.layer_of(name, recast.other) for name in tensors}
        for layer in sorted(layer for layer in layers if layer is not None):
            others = recast.at(layer, recast.other)
            names = recast.at(layer, recast.canonical)
            if any(n not in found for n in others) or any(n not in expected for n in names):
                continue
            made = [found[name] for name in others]
            shapes = [expected[name] for name in names]
            for step in reversed(recast.steps):
                made = _BACK[type(step)](config, step, made, shapes)
            for name in others:
                del found[name]
            found |= {n: replace(one, name=n) for n, one in zip(names, made, strict=True)}
    return found


def recast_only(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Of what ``to_world`` gave the tensors that were made of others."""
    return {key: tensor for key, tensor in tensors.items() if tensor.name != key}


@dataclass(frozen=True)
class _Pieces:
    """Rows ``index`` of several tensors one after another, for each of ``blocks`` that the axes
    before the rows make. ``sizes`` are the rows of a block that each has."""

    sources: Sequence[SourceTensor]
    sizes: Sequence[int]
    index: np.ndarray

    def tensor(self, name: str, shape: Shape) -> SourceTensor:
        starts = np.cumsum([0, *self.sizes])
        which = np.searchsorted(starts, self.index, side="right") - 1
        within = self.index - starts[which]
        encodings = {s.encoding for s in self.sources}
        sources = [*self.sources] if len(encodings) == 1 else [_decoded(s) for s in self.sources]

        def reader(
            readers: Sequence[Callable[[int, int], Parts]],
        ) -> Callable[[int, int], Parts]:
            def read(start: int, stop: int) -> Parts:
                row = np.arange(start, stop)
                block, place = row // len(self.index), row % len(self.index)
                made: Parts = {}
                for number, reads in enumerate(readers):
                    mine = np.flatnonzero(which[place] == number)
                    if not mine.size:
                        continue
                    wanted = block[mine] * self.sizes[number] + within[place[mine]]
                    for part, values in _rows(reads, wanted).items():
                        if part not in made:
                            made[part] = np.empty((len(row), *values.shape[1:]), values.dtype)
                        made[part][mine] = values
                return made

            return read

        first = sources[0]
        scales = [s.read_scales for s in sources if s.read_scales is not None]
        return SourceTensor(
            name,
            shape,
            first.encoding,
            reader([s.read_rows for s in sources]),
            reader(scales) if len(scales) == len(sources) else None,
            any(s.decoded for s in sources),
        )


def _rows(read: Callable[[int, int], Parts], wanted: np.ndarray) -> Parts:
    """The rows ``wanted``, read in as few pieces as is sensible."""
    order = np.argsort(wanted, kind="stable")
    ranked = wanted[order]
    cuts = [0, *(np.flatnonzero(np.diff(ranked) > _SPARSE) + 1).tolist(), len(ranked)]
    found: Parts = {}
    for first, last in pairwise(cuts):
        low, high = int(ranked[first]), int(ranked[last - 1]) + 1
        for part, values in read(low, high).items():
            if part not in found:
                found[part] = np.empty((len(wanted), *values.shape[1:]), values.dtype)
            found[part][order[first:last]] = values[ranked[first:last] - low]
    return found


def _decoded(source: SourceTensor) -> SourceTensor:
    """As f32."""

    def read(start: int, stop: int) -> Parts:
        values = load_reference().decode(source.read_rows(start, stop), source.encoding)
        return {"weight": values.reshape(stop - start, -1)}

    was = source.decoded or source.encoding.family != "plain"
    return replace(source, encoding=F32, read_rows=read, read_scales=None, decoded=was)


def _plain(source: SourceTensor) -> SourceTensor:
    """Floats of any width."""
    return source if source.encoding.family == "plain" else _decoded(source)


def _size(tensor: SourceTensor, columns: bool) -> int:
    """Along the axis of a join."""
    return tensor.shape[-1] if columns or len(tensor.shape) == 1 else tensor.shape[-2]


def _join(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Join)
    sizes = [_size(tensor, step.columns) for tensor in tensors]
    total, first = sum(sizes), tensors[0]
    index = np.arange(total) if step.order is None else step.order(config, sizes)
    if len(index) != total:
        raise UnsupportedModelError(
            f"{first.name} is {list(first.shape)}: the config makes that {len(index)} rows"
        )
    if step.columns or len(first.shape) == 1:
        sources = [_plain(tensor) for tensor in tensors]
        if len({s.encoding for s in sources}) > 1:
            sources = [_decoded(s) for s in sources]

        def read(start: int, stop: int) -> Parts:
            parts = [_matrix(s, start, stop) for s in sources]
            return {"weight": np.concatenate(parts, axis=1)[:, index]}

        return [_computed(sources[0], (*first.shape[:-1], total), read, sources[0].encoding)]
    pieces = _Pieces(tensors, sizes, index)
    return [pieces.tensor(first.name, (*first.shape[:-2], total, first.shape[-1]))]


def _part(
    config: Config, order: Any, sizes: Sequence[int], columns: bool, joined: SourceTensor
) -> list[SourceTensor]:
    """The parts of ``sizes`` of what was joined."""
    total = sum(sizes)
    if _size(joined, columns) != total:
        raise UnsupportedModelError(
            f"{joined.name} is {list(joined.shape)}: the config makes that {total} rows"
        )
    index = np.arange(total) if order is None else order(config, sizes)
    if len(index) != total:
        raise UnsupportedModelError(
            f"{joined.name} is {list(joined.shape)}: the config makes that {len(index)} rows"
        )
    place = np.empty(total, np.int64)
    place[index] = np.arange(total)
    found = []
    for mine in np.split(place, np.cumsum(sizes)[:-1]):
        if columns or len(joined.shape) == 1:
            source = _plain(joined)

            def read(
                start: int, stop: int, source: SourceTensor = source, mine: np.ndarray = mine
            ) -> Parts:
                return {"weight": _matrix(source, start, stop)[:, mine]}

            shape: Shape = (*joined.shape[:-1], len(mine))
            found.append(_computed(source, shape, read, source.encoding))
        else:
            shape = (*joined.shape[:-2], len(mine), joined.shape[-1])
            found.append(_Pieces([joined], [total], mine).tensor(joined.name, shape))
    return found


def _unjoin(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Join)
    if len(shapes) == 1:  # of another shape by now, it may be
        return _part(
            config, step.order, [_size(tensors[0], step.columns)], step.columns, tensors[0]
        )
    # Of matrices the rows, which transposed ones have as their last axis but one by now.
    sizes = [shape[-1] if step.columns or len(shape) == 1 else shape[-2] for shape in shapes]
    return _part(config, step.order, sizes, step.columns, tensors[0])


def _split(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Split)
    return _part(config, step.order, step.sizes(config), False, tensors[0])


def _unsplit(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Split)
    return _join(config, Join(step.order), tensors)


def _transpose(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    return [_transposed(tensor) for tensor in tensors]


def _transposed(tensor: SourceTensor) -> SourceTensor:
    source = _plain(tensor)
    if len(source.shape) < 2:
        raise UnsupportedModelError(f"{source.name} is {list(source.shape)}, not a matrix")
    *lead, rows, cols = source.shape
    key = object()

    def block(number: int) -> np.ndarray:
        values = _matrix(source, number * rows, (number + 1) * rows)
        return np.ascontiguousarray(values.T)

    def read(start: int, stop: int) -> Parts:
        found = []
        for number in range(start // cols, -(-stop // cols)):
            whole = _LATEST.get((key, number), block)
            base = number * cols
            found.append(whole[max(start - base, 0) : min(stop - base, cols)])
        return {"weight": np.concatenate(found) if len(found) > 1 else found[0].copy()}

    return _computed(source, (*lead, cols, rows), read, source.encoding)


def _values(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Values)
    return [_mapped(step.there, tensor) for tensor in tensors]


def _values_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Values)
    return [_mapped(step.back, tensor) for tensor in tensors]


def _scale(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Scale)
    factor = np.float32(step.factor(config))
    return [_mapped(lambda x: x * factor, tensor) for tensor in tensors]


def _scale_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Scale)
    factor = np.float32(step.factor(config))
    return [_mapped(lambda x: x / factor, tensor) for tensor in tensors]


def _mapped(change: Callable[[np.ndarray], np.ndarray], tensor: SourceTensor) -> SourceTensor:
    source = _decoded(tensor)

    def read(start: int, stop: int) -> Parts:
        # What is out of a function's range is for the check of finite weights to tell.
        with np.errstate(all="ignore"):
            values = change(source.read_rows(start, stop)["weight"])
        return {"weight": values.astype(np.float32)}

    return replace(source, read_rows=read)


def _reshape(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Reshape)
    if step.rows is None:
        return [_shaped(tensor, step.there(tensor.shape)) for tensor in tensors]
    rows = step.rows(config)
    return [_shaped(tensor, (rows, tensor.size // rows)) for tensor in tensors]


def _shape_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Reshape)
    if step.back is not None:
        return [_shaped(tensor, step.back(tensor.shape)) for tensor in tensors]
    return [_shaped(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]


def _shaped(tensor: SourceTensor, shape: Shape) -> SourceTensor:
    source = _plain(tensor)
    if int(np.prod(shape)) != source.size:
        raise UnsupportedModelError(f"{source.name} is {list(source.shape)}, not {list(shape)}")
    made = replace(source, shape=shape)

    def read(start: int, stop: int) -> Parts:
        whole = _matrix(source, 0, source.rows)
        return {"weight": whole.reshape(made.rows, made.cols)[start:stop].copy()}

    return replace(made, read_rows=read, read_scales=None)


def _scale_rows(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, ScaleRows)
    return [_scaled(tensor, 1 / step.factors(config, tensor.rows)) for tensor in tensors]


def _scale_rows_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, ScaleRows)
    return [_scaled(tensor, step.factors(config, tensor.rows)) for tensor in tensors]


def _scaled(tensor: SourceTensor, factors: np.ndarray) -> SourceTensor:
    """Each row times a number of its own."""
    if (factors == 1).all():
        return tensor
    source = _decoded(tensor)

    def read(start: int, stop: int) -> Parts:
        values = source.read_rows(start, stop)["weight"]
        return {"weight": values * factors[start:stop, None].astype(np.float32)}

    return replace(source, read_rows=read)


def _stack(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Stack)
    count = step.count(config)
    found = []
    for tensor in tensors:
        rows, cols = tensor.shape
        if rows % count:
            raise UnsupportedModelError(
                f"{tensor.name} is {list(tensor.shape)}: its rows do not divide into {count}"
            )
        found.append(replace(tensor, shape=(count, rows // count, cols)))
    return found


def _unstack(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    for tensor in tensors:
        if len(tensor.shape) != 3:
            raise UnsupportedModelError(f"{tensor.name} is {list(tensor.shape)}, not a stack")
    return [replace(t, shape=(t.shape[0] * t.shape[1], t.shape[2])) for t in tensors]


def _extend(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Extend)
    return [_with_rows(tensor, step.rows(config)) for tensor in tensors]


def _extend_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    return [_with_rows(tensor, shape[0]) for tensor, shape in zip(tensors, shapes, strict=True)]


def _with_rows(tensor: SourceTensor, rows: int) -> SourceTensor:
    """A matrix of so many rows, those that it does not have copies of the first."""
    own = tensor.shape[0]
    if own == rows:
        return tensor
    index = np.concatenate([np.arange(min(own, rows)), np.zeros(max(0, rows - own), np.int64)])
    return _Pieces([tensor], [own], index).tensor(tensor.name, (rows, tensor.shape[1]))


def _zeros(name: str, shape: Shape, like: str | None) -> SourceTensor:
    def read(start: int, stop: int) -> Parts:
        return {"weight": np.zeros((stop - start, shape[-1]), np.float32)}

    return SourceTensor(name, shape, F32, read, like=like)


def _each(config: Config, step: Step, tensors: list[SourceTensor]) -> list[SourceTensor]:
    assert isinstance(step, Each)
    made = []
    for steps, tensor in zip(step.steps, tensors, strict=True):
        one = [tensor]
        for inner in steps:
            one = _THERE[type(inner)](config, inner, one)
        made += one
    return made


def _each_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Each)
    made = []
    for number, (steps, tensor) in enumerate(zip(step.steps, tensors, strict=True)):
        # After a split there are more tensors than canonical ones; a shape is then nobody's.
        own = [shapes[number]] if len(shapes) == len(tensors) else []
        one = [tensor]
        for inner in reversed(steps):
            one = _BACK[type(inner)](config, inner, one, own)
        made += one
    return made


def _transpose_back(
    config: Config, step: Step, tensors: list[SourceTensor], shapes: list[Shape]
) -> list[SourceTensor]:
    assert isinstance(step, Transpose)
    return [
        tensor
        if step.floats and (tensor.decoded or tensor.encoding.family != "plain")
        else _transposed(tensor)
        for tensor in tensors
    ]


_THERE: dict[type, Callable[[Config, Step, list[SourceTensor]], list[SourceTensor]]] = {
    Join: _join,
    Split: _split,
    Transpose: _transpose,
    Values: _values,
    Scale: _scale,
    Reshape: _reshape,
    ScaleRows: _scale_rows,
    Stack: _stack,
    Extend: _extend,
    Each: _each,
}
_BACK: dict[type, Callable[[Config, Step, list[SourceTensor], list[Shape]], list[SourceTensor]]] = {
    Join: _unjoin,
    Split: _unsplit,
    Transpose: _transpose_back,
    Values: _values_back,
    Scale: _scale_back,
    Reshape: _shape_back,
    ScaleRows: _scale_rows_back,
    Stack: _unstack,
    Extend: _extend_back,
    Each: _each_back,
}


def _matrix(source: SourceTensor, start: int, stop: int) -> np.ndarray:
    """Plain rows ``[rows, cols]``."""
    return source.read_rows(start, stop)["weight"].reshape(stop - start, -1)


def _computed(
    source: SourceTensor, shape: Shape, read: Callable[[int, int], Parts], encoding: Encoding
) -> SourceTensor:
    return replace(source, shape=shape, encoding=encoding, read_rows=read, read_scales=None)


class _Latest:
    """A few arrays that were asked for last. Threads that want the same one wait for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._guard = threading.Lock()
        self._making: dict[Any, threading.Lock] = {}

    def get(self, key: tuple[object, int], make: Callable[[int], np.ndarray]) -> np.ndarray:
        with self._guard:
            own = self._making.setdefault(key, threading.Lock())
        with own:
            with self._guard:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            made = make(key[1])
            with self._guard:
                self._kept[key] = made
                while len(self._kept) > self._most:
                    old, _ = self._kept.popitem(last=False)
                    self._making.pop(old, None)
            return made


_LATEST = _Latest(_BLOCKS)

__all__ = ["from_world", "recast_only", "to_world"]
