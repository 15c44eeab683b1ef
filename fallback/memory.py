"""Numbers and vectors at addresses, for kernels that read quantized blocks.

Blocks are 18 to 210 bytes long, nothing in them is aligned, and a tape of steps (forward_ops)
has no array types; so these intrinsics take an address (int64). ``get_*`` and ``put_*`` move one
number, ``load_*`` and ``store_*`` sixteen (:mod:`mlxedge.fallback.lanes`). Nothing is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from mlxedge.fallback.lanes import F32, I32, LANES

ADDRESS = types.int64
NOTHING = types.none

I8, I16, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
FLOAT, HALF = ir.FloatType(), ir.HalfType()
VOID = ir.Constant(I8.as_pointer(), None)


def op(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba intrinsic of a function ``(builder, *values)`` that emits LLVM code."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(context: Any, *_: Any) -> Any:
            def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                return emit(builder, *values)

            return result(*parameters), lower

        # numba counts the arguments of an intrinsic by its signature.
        names = ["context", *(f"a{i}" for i in range(len(parameters)))]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        typed.__signature__ = signature  # type: ignore[attr-defined]
        typed.__name__ = typed.__qualname__ = emit.__name__
        typed.__doc__ = emit.__doc__
        return intrinsic(typed)

    return decorate


def read(b: Any, address: Any, kind: Any, align: int = 1) -> Any:
    """Emit a load."""
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def write(b: Any, address: Any, value: Any, align: int = 4) -> Any:
    """Emit a store."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align
    return VOID


def call(b: Any, name: str, result: Any, *values: Any, fastmath: tuple[str, ...] = ()) -> Any:
    """Emit a call of an LLVM intrinsic."""
    kind = ir.FunctionType(result, [v.type for v in values])
    function = cgutils.get_or_insert_function(b.module, kind, name)
    return b.call(function, values, fastmath=fastmath)


def spread(b: Any, value: Any, kind: Any) -> Any:
    """Emit a vector of one value."""
    hole = ir.Constant(kind, ir.Undefined)
    order = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return b.shuffle_vector(b.insert_element(hole, value, ir.IntType(32)(0)), hole, order)


def target() -> tuple[str, str]:
    """The triple and the features that numba compiles for."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, features


def _widen(b: Any, halves: Any) -> Any:
    """Emit the float32 of float16: one number or a vector."""
    triple, features = target()
    many = getattr(halves.type, "count", 0)
    float_kind: Any = ir.VectorType(FLOAT, many) if many else FLOAT
    if "+f16c" in features or triple.startswith(("aarch64", "arm64")):
        return b.fpext(halves, float_kind)
    # Elsewhere LLVM would call a function that is not there. The exponent moves by 112; a
    # multiplication does that for subnormal numbers as well.
    bits_kind: Any = ir.VectorType(ir.IntType(32), many) if many else ir.IntType(32)
    short_kind: Any = ir.VectorType(I16, many) if many else I16

    def fill(kind: Any, value: float) -> Any:
        return ir.Constant(kind, [value] * many if many else value)

    bits = b.zext(b.bitcast(halves, short_kind), bits_kind)
    size = b.shl(b.and_(bits, fill(bits_kind, 0x7FFF)), fill(bits_kind, 13))
    number = b.fmul(b.bitcast(size, float_kind), fill(float_kind, 2.0**112))
    special = b.icmp_unsigned(">=", size, fill(bits_kind, 0x0F800000))
    topped = b.or_(size, fill(bits_kind, 0x7F800000))
    size = b.select(special, topped, b.bitcast(number, bits_kind))
    sign = b.shl(b.and_(bits, fill(bits_kind, 0x8000)), fill(bits_kind, 16))
    return b.bitcast(b.or_(size, sign), float_kind)


@op(types.float32, ADDRESS)
def get_f32(b: Any, p: Any) -> Any:
    return read(b, p, FLOAT)


@op(types.float32, ADDRESS)
def get_f16(b: Any, p: Any) -> Any:
    return _widen(b, read(b, p, HALF))


@op(types.float32, ADDRESS)
def get_bf16(b: Any, p: Any) -> Any:
    wide = b.zext(read(b, p, I16), ir.IntType(32))
    return b.bitcast(b.shl(wide, wide.type(16)), FLOAT)


@op(types.int64, ADDRESS)
def get_i8(b: Any, p: Any) -> Any:
    return b.sext(read(b, p, I8), I64)


@op(types.int64, ADDRESS)
def get_u8(b: Any, p: Any) -> Any:
    return b.zext(read(b, p, I8), I64)


@op(types.int64, ADDRESS)
def get_u32(b: Any, p: Any) -> Any:
    return b.zext(read(b, p, ir.IntType(32)), I64)


@op(types.int64, ADDRESS)
def get_i64(b: Any, p: Any) -> Any:
    return read(b, p, I64)


@op(NOTHING, ADDRESS, types.float32)
def put_f32(b: Any, p: Any, value: Any) -> Any:
    return write(b, p, value)


@op(F32, ADDRESS)
def load_f32(b: Any, p: Any) -> Any:
    return read(b, p, F32.vector, 4)


@op(F32, ADDRESS)
def load_f16(b: Any, p: Any) -> Any:
    return _widen(b, read(b, p, ir.VectorType(HALF, LANES)))


@op(F32, ADDRESS)
def load_bf16(b: Any, p: Any) -> Any:
    wide = b.zext(read(b, p, ir.VectorType(I16, LANES)), I32.vector)
    return b.bitcast(b.shl(wide, I32.vector([16] * LANES)), F32.vector)


@op(I32, ADDRESS)
def load_i8(b: Any, p: Any) -> Any:
    return b.sext(read(b, p, ir.VectorType(I8, LANES)), I32.vector)


@op(I32, ADDRESS)
def load_u8(b: Any, p: Any) -> Any:
    return b.zext(read(b, p, ir.VectorType(I8, LANES)), I32.vector)


@op(NOTHING, ADDRESS, F32)
def store_f32(b: Any, p: Any, v: Any) -> Any:
    return write(b, p, v)


@op(I32, types.int64, types.int64, types.int64)
def by_bit(b: Any, bits: Any, one: Any, zero: Any) -> Any:
    """``one`` in the lanes whose bit (of the low 16) is set, ``zero`` in the others."""
    flags = b.bitcast(b.trunc(bits, I16), ir.VectorType(ir.IntType(1), LANES))
    yes, no = (spread(b, b.trunc(v, ir.IntType(32)), I32.vector) for v in (one, zero))
    return b.select(flags, yes, no)


def _make_load_codes(bits: int) -> Any:
    @op(I32, ADDRESS)
    def load_codes(b: Any, p: Any) -> Any:
        raw = read(b, p, ir.VectorType(I8, 2 * bits))
        hole = ir.Constant(raw.type, ir.Undefined)
        start = [lane * bits for lane in range(LANES)]
        value = b.zext(b.shuffle_vector(raw, hole, I32.vector([s // 8 for s in start])), I32.vector)
        if 8 % bits:  # some codes straddle two bytes
            after = I32.vector([min(s // 8 + 1, 2 * bits - 1) for s in start])
            high = b.zext(b.shuffle_vector(raw, hole, after), I32.vector)
            value = b.or_(value, b.shl(high, I32.vector([8] * LANES)))
        value = b.lshr(value, I32.vector([s % 8 for s in start]))
        return b.and_(value, I32.vector([(1 << bits) - 1] * LANES))

    return load_codes


#: By width: 16 codes from a little-endian bit stream of ``2 · bits`` bytes.
LOAD_CODES = {bits: _make_load_codes(bits) for bits in (2, 3, 4, 5, 6, 8)}
