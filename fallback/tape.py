"""A forward pass as a tape: steps recorded once, walked for every pass.

An architecture records its steps in the order of the computation, so that Python runs once per
pass and not once per operation. :mod:`mlxedge.fallback.forward` walks the tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxedge.fallback import attention
from mlxedge.fallback import frame as fr
from mlxedge.fallback.forward_ops import PART_FIELDS, grain, scratch_bytes, step_kernel
from mlxedge.fallback.lanes import LANES
from mlxedge.fallback.linear import Matrix

#: Matrices that fit the fields of one step, after the function's address and the five of a linear.
_MOST_PARTS = (fr.STEP_FIELDS - 6) // PART_FIELDS


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Zeroed memory that starts at a cache line, which full-width loads want."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@dataclass(frozen=True)
class Buffer:
    """Activations of a tape: f32 ``[positions, width]``. ``offset`` is its place in a frame."""

    number: int
    width: int

    @property
    def offset(self) -> int:
        return fr.BUFFERS + 8 * fr.BUFFER_FIELDS * self.number

    @property
    def stored(self) -> int:
        """Columns in memory: the width up to whole vectors, the rest always zero."""
        return -(-self.width // LANES) * LANES


@dataclass(frozen=True)
class Tap:
    """A place where the activations in a buffer can be looked at, under a name of their own."""

    name: Any
    buffer: Buffer


@dataclass(frozen=True)
class Product:
    """``out = x @ matrix.T + bias``, and then ``add_to += out`` if given."""

    matrix: Matrix
    out: Buffer
    bias: np.ndarray | None = None
    add_to: Buffer | None = None


#: What Python does between compiled steps: a tap, or the product of a buffer with a matrix whose
#: format has no kernel.
Hosted = tuple[Product, Buffer] | Tap


class Tape:
    """The steps of a forward pass, recorded in order.

    Everything recorded stays alive as long as the tape. Vectors (weights of norms, biases) are f32.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.layers = 0
        self.head_dim = 0
        self._steps: list[list[int]] = []
        self._hosted: dict[int, list[Hosted]] = {}
        self._kept: list[Any] = []
        self._scratch = 0
        self._head: tuple[int, dict[int, list[Hosted]]] | None = None

    @property
    def length(self) -> int:
        return len(self._steps)

    def buffer(self, width: int) -> Buffer:
        made = Buffer(len(self.buffers), width)
        self.buffers.append(made)
        return made

    def _record(self, kernel: Any, *fields: int) -> None:
        self._steps.append([kernel.address, *fields])

    def _vector(self, values: np.ndarray | None) -> int:
        """The address of a copy, padded with zeros to whole vectors; 0 for ``None``."""
        if values is None:
            return 0
        copy = aligned((-(-values.size // LANES) * LANES,))
        copy[: values.size] = values
        self._kept.append(copy)
        return int(copy.ctypes.data)

    def embed(self, table: Matrix, out: Buffer) -> None:
        """out = the rows of the tokens."""
        self._kept.append(table)
        if not table.compiled:
            self._hosted.setdefault(len(self._steps), []).append((Product(table, out), out))
            return
        self._record(step_kernel("embed"), table.address, out.offset)

    def norm(self, x: Buffer, weight: np.ndarray, epsilon: float, out: Buffer) -> None:
        """out = RMSNorm(x) · weight."""
        fields = x.offset, out.offset, self._vector(weight), x.width, _bits(epsilon)
        self._record(step_kernel("norm"), *fields)

    def tap(self, name: Any, x: Buffer) -> None:
        """Let who walks the tape look at ``x`` as it is now."""
        self._hosted.setdefault(len(self._steps), []).append(Tap(name, x))

    def linear(self, x: Buffer, products: Sequence[Product]) -> None:
        """The products of ``x`` with several matrices."""
        self._kept.extend(p.matrix for p in products)
        hosted = [(p, x) for p in products if not p.matrix.compiled]
        if hosted:
            self._hosted.setdefault(len(self._steps), []).extend(hosted)
        parts = [p for p in products if p.matrix.compiled]
        for first in range(0, len(parts), _MOST_PARTS):
            self._linear(x, parts[first : first + _MOST_PARTS])

    def _linear(self, x: Buffer, products: Sequence[Product]) -> None:
        self._scratch = max(self._scratch, scratch_bytes(x.stored))
        fields = [x.offset, grain(x.stored), len(self._steps), len(products)]
        for p in products:
            onto = p.add_to.offset if p.add_to is not None else 0
            fields += [p.matrix.address, p.matrix.rows, p.out.offset, self._vector(p.bias), onto]
        self._record(step_kernel("linear"), *fields)

    def gate(self, gate: Buffer, up: Buffer) -> None:
        """gate = silu(gate) · up."""
        self._record(step_kernel("gate"), gate.offset, up.offset, gate.width)

    def attention(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        out: Buffer,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotated: int,
        scale: float,
        q_norm: np.ndarray | None = None,
        k_norm: np.ndarray | None = None,
        epsilon: float = 0.0,
        window: int = 0,
    ) -> None:
        """out = attention of the rotated ``q`` to everything in the cache of a new layer.

        ``rotated`` dimensions of each head are turned; ``q_norm`` and ``k_norm`` (RMSNorm over a
        head, first) may be absent; a ``window`` > 0 hides all but that many last positions.
        """
        shared = [q.offset, k.offset, v.offset, out.offset, self.layers, heads, kv_heads, head_dim]
        shared += [rotated, self._vector(q_norm), self._vector(k_norm)]
        shared += [_bits(epsilon), _bits(scale), window]
        self._record(attention.keep_kernel(), len(self._steps), *shared)
        self._record(attention.attend_kernel(), len(self._steps), *shared)
        self.layers += 1
        self.head_dim = max(self.head_dim, head_dim)

    def head(self) -> None:
        """What follows is for the positions whose result is asked for only."""
        self._head, self._hosted = (len(self._steps), self._hosted), {}

    def segments(self) -> tuple[list[Segment], list[Segment]]:
        """The steps before :meth:`head`, all without one, and those after it."""
        table = np.zeros((len(self._steps), fr.STEP_FIELDS), np.int64)
        for row, fields in zip(table, self._steps, strict=True):
            row[: len(fields)] = fields

        def cut(start: int, end: int, hosted: dict[int, list[Hosted]]) -> list[Segment]:
            found = []
            for stop in sorted(hosted):
                found.append(Segment(table[start:stop], hosted[stop]))
                start = stop
            return [*found, Segment(table[start:end], [])]

        end = len(self._steps)
        if self._head is None:
            return cut(0, end, self._hosted), []
        head, before = self._head
        return cut(0, head, before), cut(head, end, self._hosted)

    def scratch_bytes(self, capacity: int) -> int:
        """What one thread needs, for a cache of ``capacity`` positions."""
        return max(self._scratch, attention.scratch_bytes(capacity, self.head_dim))


@dataclass(frozen=True)
class Segment:
    """Compiled steps int64 ``[count, STEP_FIELDS]``, then what Python does."""

    steps: np.ndarray
    hosted: list[Hosted]
