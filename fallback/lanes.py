"""Sixteen blocks at a time: SIMD lanes as numba types.

A quantizer that must give ggml's bytes has to add in ggml's order, so one block cannot be spread
over a vector register. Sixteen blocks can: lane ``k`` of every value below belongs to block ``k``,
each lane runs the sequential algorithm of the C source, and a C branch becomes :func:`where`.

``F32`` (float32), ``I32`` (int32) and ``MASK`` (booleans) are LLVM vectors of 16; LLVM splits them
where registers are narrower. Operators work lane by lane, and a float32 (integer) scalar is spread
over all lanes; a Python float is refused because float64 would round differently. Nothing here is
contracted or reordered: an expression rounds exactly as written.

Shapes: arrays are 1-D and contiguous, offsets count elements. Offsets are not checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from mlxedge.fallback.bits import half, to_half

LANES = 16

_INNER: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
_I8, _I32, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()


class Lanes(types.Type):
    """A vector of 16 scalars, all in one register where the machine has such registers."""

    def __init__(self, name: str, scalar: types.Type, element: ir.Type) -> None:
        super().__init__(name=f"Lanes({name})")
        self.scalar = scalar
        self.vector = ir.VectorType(element, LANES)


F32 = Lanes("float32", types.float32, _FLOAT)
I32 = Lanes("int32", types.int32, _I32)
MASK = Lanes("bool", types.boolean, ir.IntType(1))


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, kind.vector)


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call. It may take lanes, which Python has not.

    numba's cache of a kernel watches the kernel's own file: after editing an inner function,
    remove ``__pycache__/*.nbi``.
    """
    return njit(**_INNER)(function)


def inline(function: Callable[..., Any]) -> Any:
    """As :func:`inner`, always expanded where it is called, so that lanes stay in registers."""
    return njit(forceinline=True, **_INNER)(function)


def _spread(builder: ir.IRBuilder, value: ir.Value, kind: Lanes) -> ir.Value:
    """``value`` in every lane."""
    vector = builder.insert_element(
        ir.Constant(kind.vector, ir.Undefined), value, ir.Constant(_I32, 0)
    )
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(vector, ir.Constant(kind.vector, ir.Undefined), zeros)


def _is_scalar(value: types.Type, kind: Lanes) -> bool:
    """Whether ``value`` may be spread over ``kind`` without rounding."""
    return value == types.float32 if kind is F32 else isinstance(value, types.Integer)


def _operator(
    op: Callable[..., Any], kind: Lanes, result: Lanes, emit: Callable[..., ir.Value]
) -> None:
    """Teach numba ``op`` on two operands of ``kind``, either of which may be a scalar."""

    @type_callable(op)
    def typer(context: Any) -> Callable[[types.Type, types.Type], types.Type | None]:
        def resolve(a: types.Type, b: types.Type) -> types.Type | None:
            if a == kind and (b == kind or _is_scalar(b, kind)):
                return result
            if b == kind and _is_scalar(a, kind):
                return result
            return None

        return resolve

    def lower(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        operands = []
        for value, given in zip(args, signature.args, strict=True):
            if given != kind:
                value = _spread(builder, context.cast(builder, value, given, kind.scalar), kind)
            operands.append(value)
        return emit(builder, *operands)

    scalar = types.Float if kind is F32 else types.Integer
    for a, b in ((kind, kind), (kind, scalar), (scalar, kind)):
        lower_builtin(op, a, b)(lower)


_OPERATORS: list[tuple[Callable[..., Any], Lanes, Lanes, Callable[..., ir.Value]]] = [
    (operator.add, F32, F32, ir.IRBuilder.fadd),
    (operator.sub, F32, F32, ir.IRBuilder.fsub),
    (operator.mul, F32, F32, ir.IRBuilder.fmul),
    (operator.truediv, F32, F32, ir.IRBuilder.fdiv),
    (operator.lt, F32, MASK, lambda b, x, y: b.fcmp_ordered("<", x, y)),
    (operator.gt, F32, MASK, lambda b, x, y: b.fcmp_ordered(">", x, y)),
    (operator.eq, F32, MASK, lambda b, x, y: b.fcmp_ordered("==", x, y)),
    (operator.ne, F32, MASK, lambda b, x, y: b.fcmp_unordered("!=", x, y)),
    (operator.add, I32, I32, ir.IRBuilder.add),
    (operator.sub, I32, I32, ir.IRBuilder.sub),
    (operator.mul, I32, I32, ir.IRBuilder.mul),
    (operator.and_, I32, I32, ir.IRBuilder.and_),
    (operator.or_, I32, I32, ir.IRBuilder.or_),
    (operator.xor, I32, I32, ir.IRBuilder.xor),
    (operator.lshift, I32, I32, ir.IRBuilder.shl),
    (operator.rshift, I32, I32, ir.IRBuilder.ashr),
    (operator.gt, I32, MASK, lambda b, x, y: b.icmp_signed(">", x, y)),
    (operator.and_, MASK, MASK, ir.IRBuilder.and_),
    (operator.or_, MASK, MASK, ir.IRBuilder.or_),
]
for _entry in _OPERATORS:
    _operator(*_entry)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def _unary(kind: types.Type, result: types.Type, emit: Callable[..., ir.Value], doc: str) -> Any:
    """A function of one operand of ``kind``."""

    def function(typingctx: Any, value: types.Type) -> Any:
        if value != kind:
            return None

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return emit(builder, args[0])

        return result(value), codegen

    function.__doc__ = doc
    return intrinsic(function)


absolute = _unary(
    F32, F32, lambda b, v: _call(b, "llvm.fabs.v16f32", F32.vector, [v]), "The absolute value."
)
square_root = _unary(
    F32, F32, lambda b, v: _call(b, "llvm.sqrt.v16f32", F32.vector, [v]), "The root, to nearest."
)
float_bits = _unary(
    types.float32, types.int32, lambda b, v: b.bitcast(v, _I32), "The IEEE bits of a float32."
)
bits_float = _unary(
    types.int32, types.float32, lambda b, v: b.bitcast(v, _FLOAT), "The float32 of IEEE bits."
)
as_bits = _unary(F32, I32, lambda b, v: b.bitcast(v, I32.vector), "The IEEE bits of each lane.")
as_float = _unary(I32, F32, lambda b, v: b.bitcast(v, F32.vector), "Lanes from their IEEE bits.")


lane_min = _unary(
    I32, types.int32, lambda b, v: _call(b, "llvm.vector.reduce.smin.v16i32", _I32, [v]), "Least."
)
lane_max = _unary(
    I32,
    types.int32,
    lambda b, v: _call(b, "llvm.vector.reduce.smax.v16i32", _I32, [v]),
    "Greatest.",
)
truncate = _unary(
    F32,
    I32,
    lambda b, v: b.fptosi(v, I32.vector),
    "Towards zero; lanes beyond int32 are undefined.",
)
lanes_set = _unary(
    MASK,
    types.uint32,
    lambda b, v: b.zext(b.bitcast(v, ir.IntType(LANES)), _I32),
    "The mask as an integer, lane 0 in bit 0.",
)
lowest_bit = _unary(
    types.uint32,
    types.int32,
    lambda b, v: _call(b, "llvm.cttz.i32", _I32, [v, ir.Constant(ir.IntType(1), 0)]),
    "The number of the lowest bit set, 32 if none is.",
)


def _swapped(distance: int) -> Any:
    def emit(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        order = ir.Constant(ir.VectorType(_I32, LANES), [k ^ distance for k in range(LANES)])
        return builder.shuffle_vector(value, ir.Constant(F32.vector, ir.Undefined), order)

    return _unary(F32, F32, emit, f"Lane ``k ^ {distance}`` in lane k.")


#: Adding these in turn leaves the sum of lanes in every lane: of 16, or without ``swap_8`` of 8.
swap_8, swap_4, swap_2, swap_1 = (_swapped(distance) for distance in (8, 4, 2, 1))


@intrinsic
def where(typingctx: Any, mask: types.Type, yes: types.Type, no: types.Type) -> Any:
    """``yes`` in the lanes where ``mask`` holds, ``no`` in the others."""
    if mask != MASK or yes != no or not isinstance(yes, Lanes):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.select(*args)

    return yes(mask, yes, no), codegen


def _extreme(name: str) -> Any:
    def function(typingctx: Any, a: types.Type, b: types.Type) -> Any:
        if a != I32 or not (b == I32 or isinstance(b, types.Integer)):
            return None

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            first, second = args
            if b != I32:
                second = _spread(builder, context.cast(builder, second, b, types.int32), I32)
            return _call(builder, f"llvm.{name}.v16i32", I32.vector, [first, second])

        return I32(a, b), codegen

    return intrinsic(function)


smaller, larger = _extreme("smin"), _extreme("smax")


@intrinsic
def spread(typingctx: Any, value: types.Type) -> Any:
    """A float32 in every lane."""
    if value != types.float32:
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _spread(builder, args[0], F32)

    return F32(value), codegen


@intrinsic
def spread_int(typingctx: Any, value: types.Type) -> Any:
    """An integer in every lane."""
    if not isinstance(value, types.Integer):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return _spread(builder, args[0], I32)

    return I32(types.int32), codegen


def _address(
    context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, index: ir.Value
) -> ir.Value:
    data = context.make_array(kind)(context, builder, value=array).data
    return builder.gep(data, [index])


def _is_vector(array: types.Type, dtype: types.Type) -> bool:
    return isinstance(array, types.Array) and array.ndim == 1 and array.dtype == dtype


@intrinsic
def load(typingctx: Any, array: types.Type, offset: types.Type) -> Any:
    """``array[offset : offset + 16]`` of float32."""
    if not (_is_vector(array, types.float32) and isinstance(offset, types.Integer)):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _address(context, builder, array, *args)
        return builder.load(builder.bitcast(pointer, F32.vector.as_pointer()), align=1)

    return F32(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: types.Type, offset: types.Type, value: types.Type) -> Any:
    """Write 16 lanes at ``array[offset]``."""
    if not (_is_vector(array, types.float32) and value == F32):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _address(context, builder, array, *args[:2])
        builder.store(args[2], builder.bitcast(pointer, F32.vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def store_bytes(typingctx: Any, array: types.Type, offset: types.Type, value: types.Type) -> Any:
    """Write the low byte of 16 lanes at ``array[offset]`` of uint8."""
    if not (_is_vector(array, types.uint8) and value == I32):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _address(context, builder, array, *args[:2])
        small = ir.VectorType(_I8, LANES)
        builder.store(
            builder.trunc(args[2], small), builder.bitcast(pointer, small.as_pointer()), align=1
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def store_nibbles(typingctx: Any, array: types.Type, offset: types.Type, value: types.Type) -> Any:
    """Write the low 4 bits of 16 lanes at ``array[offset : offset + 8]`` of uint8, in order."""
    if not (_is_vector(array, types.uint8) and value == I32):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _address(context, builder, array, *args[:2])
        small = builder.trunc(args[2], ir.VectorType(_I8, LANES))
        half, mask = ir.VectorType(_I8, LANES // 2), ir.VectorType(_I32, LANES // 2)
        low, high = (
            builder.shuffle_vector(small, small, ir.Constant(mask, list(range(odd, LANES, 2))))
            for odd in (0, 1)
        )
        four = ir.Constant(half, [4] * (LANES // 2))
        both = builder.or_(
            builder.and_(low, ir.Constant(half, [15] * (LANES // 2))), builder.shl(high, four)
        )
        builder.store(both, builder.bitcast(pointer, half.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def transpose(
    typingctx: Any,
    source: types.Type,
    start: types.Type,
    stride: types.Type,
    count: types.Type,
    tile: types.Type,
    offset: types.Type,
) -> Any:
    """``tile[offset + 16·i + k] = source[start + stride·k + i]`` for i, k in 0…15.

    Only ``count`` lanes exist in the source; lanes ``k >= count`` repeat lane 0.
    """
    if not (_is_vector(source, types.float32) and _is_vector(tile, types.float32)):
        return None
    low = [i // 2 + LANES * (i % 2) for i in range(LANES)]
    high = [i + LANES // 2 for i in low]
    mask_type = ir.VectorType(_I32, LANES)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        from_array, first, step, many, to_array, to = args
        rows = []
        for k in range(LANES):
            lane = ir.Constant(step.type, k)
            there = builder.select(
                builder.icmp_signed("<", lane, many), lane, ir.Constant(step.type, 0)
            )
            index = builder.add(first, builder.mul(step, there))
            pointer = _address(context, builder, source, from_array, index)
            rows.append(builder.load(builder.bitcast(pointer, F32.vector.as_pointer()), align=1))
        # Interleaving the two halves of the rows log2(16) times is a transposition.
        middle = LANES // 2
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[k], rows[k + middle], ir.Constant(mask_type, pick))
                for k in range(middle)
                for pick in (low, high)
            ]
        for i, row in enumerate(rows):
            index = builder.add(to, ir.Constant(to.type, LANES * i))
            pointer = _address(context, builder, tile, to_array, index)
            builder.store(row, builder.bitcast(pointer, F32.vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, types.intp, tile, types.intp), codegen


# ggml rounds by adding 1.5 · 2^23 and taking the mantissa, which also defines what becomes of
# numbers out of range, infinities and NaN. The same bits as a float in [2^23, 2^24) clamp as ints.
_MAGIC = np.float32(12582912.0)
_MANTISSA = 0x007FFFFF
_EXPONENT = 0x4B000000
_ZERO = 0x4B400000


@inline
def nearest(v: Any, low: Any, high: Any) -> Any:
    """ggml's ``nearest_int`` of float lanes, clamped to the integers low…high, as float lanes."""
    bits = (as_bits(v + _MAGIC) & _MANTISSA) | _EXPONENT
    return as_float(larger(smaller(bits, high + _ZERO), low + _ZERO)) - _MAGIC


@inline
def nearest_code(v: Any, low: Any, high: Any) -> Any:
    """As :func:`nearest`, as int lanes."""
    bits = (as_bits(v + _MAGIC) & _MANTISSA) | _EXPONENT
    return larger(smaller(bits, high + _ZERO), low + _ZERO) - _ZERO


@inline
def any_lane(mask: Any) -> Any:
    """Whether the mask holds anywhere."""
    return lanes_set(mask) != 0


@inline
def put_half(out: Any, at: Any, value: Any) -> Any:
    """Write a float32 as float16 to ``out[at : at + 2]``; what was stored, as float32."""
    stored = to_half(value)
    out[at] = stored & 0xFF
    out[at + 1] = stored >> 8
    return half(stored)
