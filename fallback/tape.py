"""A forward pass as a tape: steps recorded once, walked for every pass.

An architecture records its steps in the order of the computation, so that Python runs once per
pass and not once per operation. :mod:`mlxedge.fallback.forward` walks the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from mlxedge.encodings import F32
from mlxedge.errors import UsageError
from mlxedge.fallback import attention, causal_conv
from mlxedge.fallback import frame as fr
from mlxedge.fallback.activations import ACTIVATIONS
from mlxedge.fallback.experts import (
    MOST_PARTS,
    SCORES,
    Choice,
    ExpertProduct,
    ExpertTap,
    HostedExperts,
    expert_kernel,
    route_scratch_bytes,
)
from mlxedge.fallback.forward_ops import PART_FIELDS, grain, scratch_bytes, step_kernel
from mlxedge.fallback.lanes import LANES
from mlxedge.fallback.latent import unfold_kernel
from mlxedge.fallback.linear import Matrix
from mlxedge.fallback.recurrent import RecurrentSteps, bits
from mlxedge.fallback.streams import stream_kernel

#: Matrices that fit the fields of one step, after the function's address and the five of a linear.
_MOST_PARTS = (fr.STEP_FIELDS - 6) // PART_FIELDS

#: How a router's logits become scores: see :meth:`Tape.route`.
Score = Literal["softmax", "sigmoid", "softmax_top"]
#: See :mod:`mlxedge.fallback.activations`.
Activation = Literal["none", "silu", "gelu_tanh", "gelu", "relu2", "xielu", "sigmoid"]
#: Called with a tap's name, what its buffer holds (f32 ``[n, width]``, to be read at once), and
#: which expert of how many that is for: 0 of 1, but for the taps of experts.
Watch = Callable[[Any, np.ndarray, int, int], None]
#: The memory of buffers and choices, by number.
Arrays = dict[int, np.ndarray]


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Zeroed memory that starts at a cache line, which full-width loads want."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Buffer:
    """Activations of a tape: f32 ``[positions · slots, width]``, with one row for each position or
    as many as experts serve it. ``offset`` is its place in a frame. One that has no memory of its
    own is the columns from ``start`` on of the buffer whose number is ``within``."""

    number: int
    width: int
    slots: int = 1
    within: int | None = None
    start: int = 0

    @property
    def offset(self) -> int:
        return fr.BUFFERS + 8 * fr.BUFFER_FIELDS * self.number

    @property
    def stored(self) -> int:
        """Columns in memory: the width up to whole vectors, the rest always zero."""
        return -(-self.width // LANES) * LANES


@dataclass(frozen=True)
class KeyValues:
    """What a layer of attention keeps of each position: keys and values of its own heads."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class State:
    """What a recurrent layer keeps of all positions so far: ``cells`` f32. It is meaningless at
    position 0, where a step has to begin with its own."""

    cells: int


@dataclass(frozen=True)
class Tap:
    """A place where the activations in a buffer can be looked at, under a name of their own."""

    name: Any
    buffer: Buffer

    def run(self, arrays: Arrays, tokens: np.ndarray, n: int, watch: Watch | None) -> None:
        if watch is not None:
            x = arrays[self.buffer.number][: n * self.buffer.slots, : self.buffer.width]
            watch(self.name, x, 0, 1)


@dataclass(frozen=True)
class Product:
    """``out = x @ matrix.T + bias``, and then ``add_to += out`` if given."""

    matrix: Matrix
    out: Buffer
    bias: np.ndarray | None = None
    add_to: Buffer | None = None


class Hosted(Protocol):
    """What Python does between compiled steps: a tap, or what a format without a kernel needs."""

    def run(self, arrays: Arrays, tokens: np.ndarray, n: int, watch: Watch | None) -> None:
        """Work on ``n`` positions."""


@dataclass(frozen=True)
class HostedEmbed:
    """Rows of a table whose format has no kernel, as the step "embed" takes them."""

    table: Matrix
    out: Buffer

    def run(self, arrays: Arrays, tokens: np.ndarray, n: int, watch: Watch | None) -> None:
        for row, token in zip(arrays[self.out.number], tokens.tolist(), strict=False):
            known = token if token < self.table.rows else 0
            row[: self.table.cols] = self.table.decode(known, known + 1)[0]


@dataclass(frozen=True)
class HostedProduct:
    """The product of a buffer with a matrix whose format has no kernel."""

    product: Product
    x: Buffer

    def run(self, arrays: Arrays, tokens: np.ndarray, n: int, watch: Watch | None) -> None:
        product, rows = self.product, self.product.matrix.rows
        out = arrays[product.out.number][:n, :rows]
        out[:] = product.matrix.product(arrays[self.x.number][:n, : product.matrix.cols])
        if product.bias is not None:
            out += product.bias
        if product.add_to is not None:
            arrays[product.add_to.number][:n, :rows] += out


class Tape(RecurrentSteps):
    """The steps of a forward pass, recorded in order.

    Everything recorded stays alive as long as the tape. Vectors (weights of norms, biases) are f32.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.choices: list[Choice] = []
        #: What is kept between passes, by layer.
        self.slots: list[KeyValues | State] = []
        self._steps: list[list[int]] = []
        self._hosted: dict[int, list[Hosted]] = {}
        self._kept: list[Any] = []
        self._scratch = 0
        self._head: tuple[int, dict[int, list[Hosted]]] | None = None

    @property
    def length(self) -> int:
        return len(self._steps)

    @property
    def recurrent(self) -> bool:
        """Whether something is kept that cannot be taken back to an earlier position."""
        return any(isinstance(slot, State) for slot in self.slots)

    @property
    def places(self) -> int:
        """Buffers and choices together, which are numbered below this."""
        return len(self.buffers) + len(self.choices)

    def buffer(self, width: int, choice: Choice | None = None) -> Buffer:
        """A buffer with a row per position, or with one per slot of ``choice``."""
        made = Buffer(self.places, width, 1 if choice is None else choice.top_k)
        self.buffers.append(made)
        return made

    def columns(self, whole: Buffer, start: int, width: int) -> Buffer:
        """Some columns of a buffer, as a buffer. Steps work on whole vectors, so nothing else may
        be in those up to the next multiple of sixteen.

        Raises UsageError if they do not begin with a vector, or are not there.
        """
        made = Buffer(self.places, width, within=whole.number, start=start)
        if whole.within is not None or whole.slots != 1:
            raise UsageError("columns of what is no plain buffer")
        if start % LANES or start < 0 or start + made.stored > whole.stored:
            raise UsageError(f"columns {start} to {start + width} of {whole.width}")
        self.buffers.append(made)
        return made

    def choice(self, experts: int, top_k: int) -> Choice:
        """Memory for the choice of ``top_k`` of ``experts``, which layers use in turn."""
        if not 0 < top_k <= experts:
            raise UsageError(f"{top_k} of {experts} experts cannot be chosen for a token")
        made = Choice(self.places, experts, top_k)
        self.choices.append(made)
        return made

    def _host(self, *hosted: Hosted) -> None:
        if hosted:
            self._hosted.setdefault(len(self._steps), []).extend(hosted)

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

    def embed(
        self, table: Matrix, out: Buffer, of: Literal["tokens", "positions"] = "tokens"
    ) -> None:
        """out = the rows of the tokens, or of their positions, which all have one; of tokens that
        the table does not have the first one."""
        if not table.compiled and of == "positions":
            # What Python does is told tokens alone.
            table = Matrix({"weight": table.decode()}, F32, table.rows, table.cols)
        self._kept.append(table)
        if not table.compiled:
            self._host(HostedEmbed(table, out))
            return
        fields = table.address, out.offset, int(of == "positions"), table.rows
        self._record(step_kernel("embed"), *fields)

    def norm(
        self,
        x: Buffer,
        weight: np.ndarray,
        epsilon: float,
        out: Buffer,
        *,
        centred: bool = False,
        bias: np.ndarray | None = None,
        pieces: int = 1,
    ) -> None:
        """out = RMSNorm(x) · weight + bias, or LayerNorm if ``centred``; x may be out. Rows are of
        so many ``pieces``, each with a norm of its own and the same weights.

        Raises UsageError for pieces that are not whole vectors.
        """
        width = x.width // pieces
        if pieces > 1 and (width * pieces != x.width or width % LANES):
            raise UsageError(f"{pieces} pieces of {x.width} columns are not whole vectors")
        fields = x.offset, out.offset, self._vector(weight), width, bits(epsilon)
        self._record(step_kernel("norm"), *fields, int(centred), self._vector(bias), pieces)

    def tap(self, name: Any, x: Buffer) -> None:
        """Let who walks the tape look at ``x`` as it is now."""
        self._host(Tap(name, x))

    def linear(self, x: Buffer, products: Sequence[Product]) -> None:
        """The products of ``x`` with several matrices."""
        self._kept.extend(p.matrix for p in products)
        self._host(*(HostedProduct(p, x) for p in products if not p.matrix.compiled))
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

    def gate(
        self,
        gate: Buffer,
        up: Buffer | None,
        activation: Activation = "silu",
        numbers: np.ndarray | None = None,
    ) -> None:
        """gate = activation(gate) · up, or without up, for every position or slot; ``numbers`` f32
        are those that the activation has of its own."""
        offset = 0 if up is None else up.offset
        fields = gate.offset, offset, gate.width, gate.slots, ACTIVATIONS[activation]
        self._record(step_kernel("gate"), *fields, self._vector(numbers))

    def clamped_gate(self, gate: Buffer, up: Buffer, alpha: float, limit: float) -> None:
        """gate = g · sigmoid(alpha · g) · (u + 1), where g is gate up to ``limit`` and u is up
        within ± ``limit``, for every position or slot: that of gpt-oss
        (openai/gpt-oss, ``gpt_oss/torch/model.py``)."""
        fields = gate.offset, up.offset, gate.width, gate.slots, bits(alpha), bits(limit)
        self._record(step_kernel("clamped_gate"), *fields)

    def add(self, x: Buffer, to: Buffer, factor: float = 1.0) -> None:
        """to += factor · x."""
        self._record(step_kernel("add"), x.offset, to.offset, x.width, bits(factor))

    def scale(self, x: Buffer, factor: float, cap: float = 0.0) -> None:
        """x = factor · x, and then cap · tanh(x / cap) if ``cap`` is not zero."""
        vectors = 0 if x.within is None else x.stored // LANES
        self._record(step_kernel("scale"), x.offset, bits(factor), bits(cap), vectors)

    def mix(self, base: Buffer, x: Buffer, factors: Buffer, out: Buffer, pieces: int) -> None:
        """out_i = base_i + Σ_j factors[i, j] · x_j, where ``out`` and ``base`` are so many pieces
        of whole vectors side by side, ``x`` one or several, and a row of ``factors`` is
        ``[pieces, pieces of x]``; base may be out.

        Raises UsageError if they do not fit.
        """
        width, inputs = out.stored // pieces, factors.width // pieces
        fits = width * pieces == out.stored == base.stored and width * inputs == x.stored
        if width % LANES or factors.width != pieces * inputs or not fits:
            raise UsageError(
                f"{pieces} pieces of {out.width} columns cannot be mixed of {x.width} columns by "
                f"{factors.width} factors"
            )
        offsets = out.offset, base.offset, x.offset, factors.offset
        self._record(stream_kernel("mix"), *offsets, width // LANES, pieces, inputs)

    def match(self, x: Buffer, like: Buffer) -> None:
        """x, scaled to the root mean square of ``like``."""
        self._record(stream_kernel("match"), x.offset, like.offset, x.width)

    def cut(self, x: Buffer, deviations: float) -> None:
        """x = max(0, x - the mean of its row - so many of its standard deviations)."""
        self._record(stream_kernel("cut"), x.offset, x.width, bits(deviations))

    def multiply(self, x: Buffer, weight: np.ndarray, out: Buffer) -> None:
        """out = x · weight, of each column its own; x may be out."""
        vectors = x.stored // LANES
        self._record(stream_kernel("multiply"), x.offset, out.offset, self._vector(weight), vectors)

    def clip(self, x: Buffer, limit: float) -> None:
        """x = x within ± ``limit``, for every position."""
        self._record(step_kernel("clip"), x.offset, bits(limit))

    def temper(self, x: Buffer, beta: float, span: int) -> None:
        """x = x · (1 + β·log(1 + ⌊position / span⌋)): the attention temperature of Llama 4, as in
        transformers' ``modeling_llama4.py``."""
        if span <= 0:
            raise UsageError(f"a temperature cannot change every {span} positions")
        self._record(step_kernel("temper"), x.offset, x.width, bits(beta), span)

    def route(
        self,
        logits: Buffer,
        choice: Choice,
        *,
        score: Score = "softmax",
        normalise: bool = False,
        scale: float = 1.0,
        bias: np.ndarray | None = None,
        groups: int = 1,
        top_groups: int = 1,
        group_best: int = 2,
        each: np.ndarray | None = None,
    ) -> None:
        """Choose experts by the router's ``logits`` ``[positions, experts]``.

        Scores are the softmax over all experts, the sigmoid of each, or ("softmax_top", as Mixtral
        and gpt-oss) the logits, whose softmax over the chosen ones alone becomes their weights. The
        ``top_k`` with the highest score + ``bias`` (f32 ``[experts]``) are chosen; the bias does
        nothing else, and of equal ones the lower index goes first. ``normalise`` divides the chosen
        scores by their sum + 1e-20, then ``scale`` multiplies them, and what an expert has in
        ``each`` (f32 ``[experts]``).

        With ``groups`` > 1, of equal numbers of neighbouring experts, the choice is among those of
        ``top_groups`` only: the best by the sum of their ``group_best`` highest score + bias: two
        (DeepSeek-V3, arXiv 2412.19437, as in its ``modeling_deepseek.py``) or one (DeepSeek-V2).

        Raises UsageError if the logits, the bias or the groups do not fit the choice.
        """
        experts, top_k = choice.experts, choice.top_k
        if logits.width != experts:
            raise UsageError(f"a router with {logits.width} outputs cannot choose of {experts}")
        if groups < 1 or experts % groups or not 0 < top_groups <= groups:
            raise UsageError(f"{experts} experts have no best {top_groups} of {groups} groups")
        if experts // groups * top_groups < top_k:
            raise UsageError(
                f"{top_groups} of {groups} groups of {experts} experts do not have {top_k}"
            )
        if group_best not in (1, 2) or (group_best == 2 and groups == experts > 1):
            raise UsageError(
                f"groups of {experts // groups} cannot be compared by their best {group_best}"
            )
        for given in (bias, each):
            if given is not None and given.size != experts:
                raise UsageError(f"a bias of {given.size} for {experts} experts")
        self._scratch = max(self._scratch, route_scratch_bytes(experts))
        fields = [SCORES[score], int(normalise), bits(scale), self._vector(bias)]
        fields += [groups, top_groups, group_best, self._vector(each)]
        self._expert_step("route", logits, choice, *fields)

    def gather(self, x: Buffer, choice: Choice, out: Buffer) -> None:
        """out = the row of ``x`` of each slot's position."""
        self._expert_step("gather", x, choice, out.offset)

    def expert_linear(self, x: Buffer, choice: Choice, products: Sequence[ExpertProduct]) -> None:
        """The products of each slot of ``x`` with its expert's matrices.

        Raises UsageError for a matrix or a bias that is not one of ``choice.experts`` experts.
        """
        for p in products:
            if p.matrix.rows != choice.experts * p.out.width or p.matrix.cols != x.width:
                raise UsageError(
                    f"a stack of [{p.matrix.rows}, {p.matrix.cols}] is not {choice.experts} "
                    f"matrices of [{p.out.width}, {x.width}]"
                )
            if p.bias is not None and p.bias.size != p.matrix.rows:
                raise UsageError(
                    f"a bias of {list(p.bias.shape)} is not {choice.experts} of [{p.out.width}]"
                )
        self._kept.extend(p.matrix for p in products)
        self._host(*(HostedExperts(p, x, choice) for p in products if not p.matrix.compiled))
        parts = [p for p in products if p.matrix.compiled]
        self._scratch = max(self._scratch, scratch_bytes(x.stored))
        for first in range(0, len(parts), MOST_PARTS):
            group = parts[first : first + MOST_PARTS]
            fields = [grain(x.stored), len(group)]
            for p in group:
                bias = None if p.bias is None else p.bias.reshape(-1)
                fields += [p.matrix.address, p.out.width, p.out.offset, self._vector(bias)]
            self._expert_step("products", x, choice, *fields)

    def combine(self, x: Buffer, choice: Choice, out: Buffer, *, add: bool = True) -> None:
        """out = Σ weight · x over the slots of each position, the first choice first; or out +=
        that, to ``add`` it."""
        self._expert_step("combine", x, choice, out.offset, int(add))

    def expert_tap(self, name: Any, x: Buffer, choice: Choice) -> None:
        """Let who walks the tape look at the rows of ``x`` of each expert that has some, in the
        order of experts."""
        self._host(ExpertTap(name, x, choice))

    def _expert_step(self, kernel: str, x: Buffer, choice: Choice, *fields: int) -> None:
        shared = choice.offset, len(self._steps), choice.experts, choice.top_k
        self._record(expert_kernel(kernel), x.offset, *shared, *fields)

    def scale_by_sigmoid(self, x: Buffer, s: Buffer) -> None:
        """x = x · sigmoid(s), with the one column of ``s``."""
        self._record(expert_kernel("scale"), x.offset, s.offset)

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
        cap: float = 0.0,
        rope: int = 0,
        neighbours: bool = False,
        centred: bool = False,
        norm_last: bool = False,
        value_dim: int | None = None,
        rotated_from: int = 0,
        sinks: np.ndarray | None = None,
        slopes: np.ndarray | None = None,
        slot: int | None = None,
        placed: bool = False,
    ) -> int:
        """out = attention of the rotated ``q`` to everything in the cache of a new layer, whose
        slot is returned; or to that of an earlier one, its ``slot``, where ``k`` and ``v`` are not
        looked at.

        ``rotated`` dimensions of each head are turned by the runner's rotary embedding number
        ``rope``, the first half of them against the second, or ``neighbours`` against each other;
        they begin at ``rotated_from``. Heads of ``v`` have ``value_dim``, by default ``head_dim``.
        ``q_norm`` and ``k_norm`` may be absent: the weights of an RMSNorm over a head, or of a
        LayerNorm if ``centred``, before the rotation, or after it if ``norm_last``; of one head
        for all, or of each. A ``window`` > 0 hides all but that many last positions, and a ``cap``
        > 0 makes scores cap · tanh(score / cap). ``sinks`` f32 ``[heads]`` are scores of nothing,
        which take their share of the softmax; from scores ``slopes`` f32 ``[heads]`` take so much
        for each position between (ALiBi, arXiv 2108.12409). Afterwards ``k`` holds what was kept;
        ``placed`` says that it does so before, and only ``q`` is normalised and rotated.
        """
        value_dim = head_dim if value_dim is None else value_dim
        kept = slot is None
        if slot is None:
            slot = self._slot(KeyValues(kv_heads, head_dim, value_dim))
        shared = [q.offset, k.offset, v.offset, out.offset, slot, heads, kv_heads, head_dim]
        shared += [rotated, self._vector(q_norm), self._vector(k_norm)]
        kind = attention.LAYER_NORM * centred + attention.NORM_LAST * norm_last
        apart = q_norm is not None and q_norm.size > head_dim
        shared += [bits(epsilon), bits(scale), window, bits(cap), rope, int(neighbours), kind]
        shared.append(4 * head_dim if apart else 0)
        shared += [value_dim, 4 * rotated_from, self._vector(sinks), kv_heads if kept else 0]
        if slopes is not None:
            slopes = np.concatenate([np.arange(LANES, dtype=np.float32), slopes])
        shared += [self._vector(slopes), int(placed)]
        self._record(attention.keep_kernel(), len(self._steps), *shared)
        self._record(attention.attend_kernel(), len(self._steps), *shared)
        return slot

    def unfold(self, kv: Buffer, rotary: Buffer, keys: Buffer, values: Buffer, heads: int) -> None:
        """Of each head h the key is the first part of its piece of ``kv`` and then ``rotary``,
        which all share, its value the rest of the piece.

        Raises UsageError where the widths do not add up.
        """
        turned, value = rotary.width, values.width // heads
        plain = keys.width // heads - turned
        sizes = (plain + value, plain + turned, value)
        widths = (kv.width, keys.width, values.width)
        if plain < 0 or widths != tuple(heads * size for size in sizes):
            raise UsageError(
                f"{heads} heads of keys {keys.width}, of which {turned} are shared, and values "
                f"{values.width} are not made of {kv.width}"
            )
        fields = kv.offset, rotary.offset, keys.offset, values.offset
        self._record(unfold_kernel(), *fields, heads, plain, turned, value)

    def state(self, cells: int) -> int:
        """The slot of a new recurrent layer, which keeps ``cells`` f32."""
        return self._slot(State(cells))

    def causal_conv(
        self,
        x: Buffer,
        out: Buffer,
        weight: np.ndarray,
        *,
        bias: np.ndarray | None = None,
        activation: Activation = "silu",
    ) -> int:
        """out = activation(the convolution of each channel of ``x`` with its row of ``weight``,
        f32 ``[channels, width]``, the last of which is for the position itself, + bias); x may be
        out. Returns the slot of its state.

        Raises UsageError for weights that are not of as many channels as x and out.
        """
        channels, width = weight.shape
        if not x.width == out.width == channels or (bias is not None and bias.size != channels):
            raise UsageError(f"a convolution of {channels} channels for {x.width} to {out.width}")
        slot = self.state(causal_conv.state_cells(channels, width))
        self._scratch = max(self._scratch, causal_conv.scratch_bytes(width))
        vectors = self._vector(causal_conv.packed(weight)), self._vector(bias)
        shared = x.offset, out.offset, slot, x.stored // LANES, width
        self._record(causal_conv.conv_kernel(), *shared, *vectors, ACTIVATIONS[activation])
        return slot

    def _slot(self, slot: KeyValues | State) -> int:
        self.slots.append(slot)
        return len(self.slots) - 1

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
        widest = max((s.value_dim for s in self.slots if isinstance(s, KeyValues)), default=0)
        return max(self._scratch, attention.scratch_bytes(capacity, widest))


@dataclass(frozen=True)
class Segment:
    """Compiled steps int64 ``[count, STEP_FIELDS]``, then what Python does."""

    steps: np.ndarray
    hosted: list[Hosted]
