"""The steps of a tape that keep a state: what :class:`mlxedge.fallback.tape.Tape` has of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxedge.errors import UsageError
from mlxedge.fallback import delta
from mlxedge.fallback.activations import ACTIVATIONS
from mlxedge.fallback.state_space import packed, space_kernel, state_cells

if TYPE_CHECKING:
    from mlxedge.fallback.tape import Activation, Buffer

    #: Some columns of a buffer: the buffer, the first of them, and how many.
    Part = tuple[Buffer, int, int]


def bits(value: float) -> int:
    """Those of an f32, as a step's fields hold it."""
    return int(np.float32(value).view(np.uint32))


class RecurrentSteps:
    """Part of a tape."""

    _steps: list[list[int]]

    @abstractmethod
    def _record(self, kernel: Any, *fields: int) -> None: ...

    @abstractmethod
    def _vector(self, values: np.ndarray | None) -> int: ...

    @abstractmethod
    def state(self, cells: int) -> int: ...

    def time_steps(
        self,
        dt: Buffer,
        bias: np.ndarray,
        *,
        a: np.ndarray | None = None,
        decay: Buffer | None = None,
        limits: tuple[float, float] = (0.0, np.inf),
    ) -> None:
        """dt = softplus(dt + bias), kept within ``limits``; decay = exp(a · dt) if ``a`` is given.
        ``bias`` and ``a`` are f32, one number for each column of dt.

        Raises UsageError for sizes that do not fit.
        """
        given = [bias] if a is None else [bias, a]
        if any(v.size != dt.width for v in given) or (decay is None) != (a is None):
            raise UsageError(f"{dt.width} time steps with {[v.size for v in given]} settings")
        out = dt if decay is None else decay
        fields = dt.offset, out.offset, dt.width, self._vector(bias), self._vector(a)
        self._record(space_kernel("time steps"), *fields, *map(bits, limits))

    def scan(
        self,
        x: Buffer,
        dt: Buffer,
        decay: Buffer,
        out: Buffer,
        *,
        head_dim: int,
        groups: int,
        size: int,
        d: np.ndarray,
    ) -> int:
        """out = Mamba-2's scan of ``x``, which holds side by side the channels of the heads and of
        each group B and then C; returns the slot of its state. ``dt`` and ``decay`` have a number
        for each head, ``d`` f32 as well. See :mod:`mlxedge.fallback.state_space`.

        Raises UsageError for sizes that do not fit.
        """
        heads, inner = dt.width, dt.width * head_dim
        fits = x.width == inner + 2 * groups * size and out.width == inner
        if not fits or decay.width != heads or d.size != heads or heads % groups:
            raise UsageError(f"a scan of {heads} heads of {head_dim} for {x.width} columns")
        slot = self.state(state_cells(heads, head_dim, size))
        fields = x.offset, x.offset, x.offset, dt.offset, decay.offset, out.offset, slot
        sizes = heads, head_dim, groups, size, 0, self._vector(d)
        self._record(space_kernel("scan"), *fields, *sizes, 4 * inner, 4 * (inner + groups * size))
        return slot

    def scan_channels(
        self,
        x: Buffer,
        b: Buffer,
        c: Buffer,
        dt: Buffer,
        out: Buffer,
        *,
        a: np.ndarray,
        d: np.ndarray,
    ) -> int:
        """out = Mamba's scan of the channels of ``x``; returns the slot of its state. ``a`` is f32
        ``[channels, size]``, ``b`` and ``c`` have ``size`` columns, ``dt`` a number for each
        channel, ``d`` f32 as well. ``x`` may be out.

        Raises UsageError for sizes that do not fit.
        """
        channels, size = a.shape
        widths = [x.width, dt.width, out.width, d.size]
        if widths != [channels] * 4 or [b.width, c.width] != [size] * 2:
            raise UsageError(f"a scan of {channels} channels for {widths} columns")
        slot = self.state(state_cells(1, channels, size))
        buffers = (v.offset for v in (x, b, c, dt, dt, out))
        fields = slot, channels, 1, 1, size, self._vector(packed(a)), self._vector(d)
        self._record(space_kernel("scan channels"), *buffers, *fields)
        return slot

    def group_norm(self, x: Buffer, weight: np.ndarray, epsilon: float, groups: int) -> None:
        """x = RMSNorm of each of ``groups`` equal parts of its columns, · ``weight`` f32
        ``[width]``.

        Raises UsageError for sizes that do not fit.
        """
        if x.width % groups or weight.size != x.width:
            raise UsageError(f"{groups} groups of {x.width} columns, and {weight.size} weights")
        fields = x.offset, self._vector(weight), groups, x.width // groups, bits(epsilon)
        self._record(space_kernel("group norm"), *fields)

    def delta_rule(
        self,
        q: Part,
        k: Part,
        v: Part,
        a: Buffer,
        b: Buffer,
        gate: Buffer,
        out: Buffer,
        *,
        key_heads: int,
        value_heads: int,
        rate: np.ndarray,
        bias: np.ndarray,
        norm: np.ndarray,
        epsilon: float,
        activation: Activation = "silu",
        beta: float = 1.0,
    ) -> int:
        """out = RMSNorm(the gated delta rule of q, k and v) · activation(gate), head by head;
        returns the slot of its state. See :mod:`mlxedge.fallback.delta`.

        Heads of keys, each for as many neighbouring heads of values, become unit vectors in place,
        and q is divided by the root of their size. The decay is exp(``rate`` · softplus(a +
        ``bias``)), with a rate f32 ``[value_heads]`` and an ``a`` for each head of values, or for
        each dimension of its keys; what is wrong is corrected by ``beta`` · sigmoid(b). ``norm``
        f32 ``[value_dim]`` and ``epsilon`` are the norm's.

        Raises UsageError for sizes that do not fit.
        """
        width, size = norm.size, q[2] // key_heads
        fits = q[2] == k[2] == key_heads * size and v[2] == value_heads * width
        fits &= gate.width == out.width == v[2] and b.width == rate.size == value_heads
        fits &= a.width == bias.size and a.width in (value_heads, value_heads * size)
        if not fits or value_heads % key_heads:
            raise UsageError(f"a delta rule of {value_heads} heads and {key_heads} of keys")
        for (buffer, first, _), scale in ((q, size**-0.5), (k, 1.0)):
            sizes = key_heads, size, bits(scale), bits(delta.EPSILON)
            self._record(delta.delta_kernel("unit"), buffer.offset, 4 * first, *sizes)
        vectors = self._vector(rate), self._vector(bias)
        fields = a.offset, b.offset, *vectors, a.width, value_heads, bits(beta)
        self._record(delta.delta_kernel("decay"), *fields)
        slot = self.state(delta.state_cells(value_heads, size, width))
        self._record(
            delta.delta_kernel("recur"), len(self._steps),
            *(part[0].offset for part in (q, k, v)), *(x.offset for x in (a, b, gate, out)),
            slot, key_heads, value_heads, size, width, 4 * (a.width > value_heads),
            *(4 * part[1] for part in (q, k, v)),
            self._vector(norm), bits(epsilon), ACTIVATIONS[activation],
        )  # fmt: skip
        return slot
