"""Ops on MLX: blocks through the encoders and decoders of this package, a few at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mlxedge.accel import ggml_decode, ggml_k, ggml_legacy, mlx_affine, mlx_float
from mlxedge.accel.casts import DTYPES, dtype_name, load_f32, store_as, to_mlx
from mlxedge.accel.k_search import KSearch
from mlxedge.encodings import Affine, Encoding, GgmlBlock, MlxFloat, Plain
from mlxedge.errors import UnsupportedEncodingError, UsageError
from mlxedge.ops import Feedback, Parts, Quality, check_importance

#: Weights in one evaluation: few enough that a GPU's watchdog stays calm and that the dozen
#: temporaries of a search stay near 200 MB.
WEIGHTS_AT_ONCE = 1 << 22

Encoder = Callable[[np.ndarray], dict[str, mx.array]]
Decoder = Callable[[Parts], mx.array]


class MlxOps:
    """The ``mlx`` backend: the fallback's bytes, computed by MLX on its default device.

    ``compiled`` tells whether the K-quant searches are fused by ``mx.compile``; ``None`` means
    where the default device is a GPU (on a CPU, MLX compiles through g++ for seconds).
    """

    name = "mlx"
    #: The device runs one evaluation at a time, and temporaries are meant to exist once.
    parallel = False
    #: The names of ggml's types that are encoded here; the fallback encodes more.
    ggml_types = frozenset({**ggml_legacy.ENCODERS, **ggml_k.ENCODERS})

    def __init__(self, *, compiled: bool | None = None) -> None:
        self._compiled = compiled

    def encode(
        self,
        weights: np.ndarray,
        encoding: Encoding,
        importance: np.ndarray | None = None,
        *,
        quality: Quality = "reference",
        feedback: Feedback | None = None,
    ) -> Parts:
        """Encode ``weights`` ``[rows, cols]`` (f32, f16 or bf16, any strides) row by row.

        Raises UnsupportedEncodingError if ``cols`` is not a multiple of ``encoding.block``, the
        encoding can only be read here, or it would have to heed ``importance`` (f32 ``[cols]``),
        which the fallback alone does; UsageError for other dtypes, ranks and importance.
        """
        if weights.ndim != 2:
            raise UsageError(f"weights have shape {weights.shape}: encode takes [rows, cols]")
        if dtype_name(weights) not in ("f32", "f16", "bf16"):
            raise UsageError(f"weights are {weights.dtype}: encode takes f32, f16 or bf16")
        if not encoding.fits(weights.shape):
            raise UnsupportedEncodingError(
                f"rows of {weights.shape[1]} weights cannot be {encoding}: "
                f"they must be a multiple of {encoding.block}"
            )
        if importance is not None:
            check_importance(importance, weights.shape[1])
            if quality == "reference" and isinstance(encoding, GgmlBlock) and encoding.weighs:
                raise UnsupportedEncodingError(
                    f"{encoding} with importance cannot be written by MLX: use --backend numpy"
                )
        if isinstance(encoding, Plain) and dtype_name(weights) == encoding.dtype:
            return {"weight": np.ascontiguousarray(weights)}
        if quality != "reference" and not isinstance(encoding, Plain):
            from mlxedge.accel import search

            use = feedback if quality == "best" else None
            return search.encode(np.ascontiguousarray(weights), encoding, importance, use)
        encoder = self._encoder(encoding)
        blocks = np.ascontiguousarray(weights).reshape(-1, encoding.block)
        parts = {
            name: np.empty(part.shape, DTYPES[part.dtype])
            for name, part in encoding.parts(weights.shape).items()
        }
        for piece in _pieces(len(blocks), encoding.block):
            encoded = encoder(blocks[piece])
            mx.eval(*encoded.values())
            for name, out in parts.items():
                _rows(out, len(blocks))[piece] = _rows(np.array(encoded[name]), len(blocks[piece]))
        mx.clear_cache()
        return parts

    def decode(self, parts: Parts, encoding: Encoding) -> np.ndarray:
        """Decode to f32 ``[rows, cols]``; other leading dimensions are kept.

        Raises UsageError if the parts are not those of ``encoding``.
        """
        shape = _decoded_shape(parts, encoding)
        decoder = _decoder(encoding)
        count = int(np.prod(shape)) // encoding.block
        rows = {name: _rows(np.ascontiguousarray(part), count) for name, part in parts.items()}
        out = np.empty((count, encoding.block), np.float32)
        for piece in _pieces(count, encoding.block):
            out[piece] = np.array(decoder({n: r[piece] for n, r in rows.items()})).reshape(
                -1, encoding.block
            )
        mx.clear_cache()
        return out.reshape(shape)

    def _encoder(self, encoding: Encoding) -> Encoder:
        """From NumPy blocks ``[N, block]`` to MLX parts whose first elements are those of the
        first block, and so on."""
        if isinstance(encoding, Plain):
            return lambda blocks: {"weight": store_as(load_f32(blocks), encoding.dtype)}
        if isinstance(encoding, Affine):
            return lambda blocks: mlx_affine.encode(load_f32(blocks), encoding)
        if isinstance(encoding, MlxFloat):
            return lambda blocks: mlx_float.encode(load_f32(blocks), encoding, dtype_name(blocks))
        if encoding.name in ggml_legacy.ENCODERS:
            legacy = ggml_legacy.ENCODERS[encoding.name]
            return lambda blocks: {"weight": legacy(load_f32(blocks))}
        if encoding.name in ggml_k.ENCODERS:
            k_quant, search = ggml_k.ENCODERS[encoding.name], self._search()
            return lambda blocks: {"weight": k_quant(load_f32(blocks), search)}
        if isinstance(encoding, GgmlBlock) and encoding.writable:
            raise UnsupportedEncodingError(
                f"{encoding} cannot be written by MLX: use --backend numpy"
            )
        raise UnsupportedEncodingError(
            f"{encoding} can be read but not written: choose {', '.join(sorted(self.ggml_types))}"
        )

    def _search(self) -> KSearch:
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return _k_search(on_gpu if self._compiled is None else self._compiled)


@functools.cache
def _k_search(compiled: bool) -> KSearch:
    return KSearch(compiled=compiled)


def _pieces(blocks: int, block: int) -> Iterator[slice]:
    """Slices of ``blocks`` of at most WEIGHTS_AT_ONCE weights."""
    step = max(1, WEIGHTS_AT_ONCE // block)
    return (slice(start, start + step) for start in range(0, blocks, step))


def _rows(array: np.ndarray, count: int) -> np.ndarray:
    """``array`` as ``[count, elements]``, its 16-bit floats as bits; a view if it is in C order."""
    bits = array.view(np.uint16) if array.dtype.itemsize == 2 else array
    return bits.reshape(count, bits.size // max(count, 1))


def _decoded_shape(parts: Parts, encoding: Encoding) -> tuple[int, ...]:
    """The shape of the tensor whose parts these are."""
    weight = parts.get("weight")
    if weight is None or weight.ndim == 0:
        raise UsageError(f"{encoding}: the part 'weight' is missing")
    per_block = encoding.parts((encoding.block,))["weight"].shape[-1]
    blocks, rest = divmod(weight.shape[-1], per_block)
    shape = (*weight.shape[:-1], blocks * encoding.block)
    for name, part in encoding.parts(shape).items():
        given = parts.get(name)
        if given is None or given.shape != part.shape or given.dtype != DTYPES[part.dtype] or rest:
            found = "missing" if given is None else f"{given.dtype} {given.shape}"
            raise UsageError(
                f"{encoding}: the part {name!r} is {found}, not {part.dtype} {part.shape}"
            )
    return shape


def _decoder(encoding: Encoding) -> Decoder:
    """From NumPy parts of N blocks to f32 ``[N, block]``."""
    if isinstance(encoding, Plain):
        return lambda parts: load_f32(parts["weight"].view(DTYPES[encoding.dtype]))
    if isinstance(encoding, Affine):
        scale = DTYPES[encoding.scale_dtype]
        return lambda parts: mlx_affine.decode(
            to_mlx(parts["weight"]),
            load_f32(parts["scales"].view(scale)).reshape(-1),
            load_f32(parts["biases"].view(scale)).reshape(-1),
            encoding,
        )
    if isinstance(encoding, MlxFloat):
        return lambda parts: mlx_float.decode(
            to_mlx(parts["weight"]), to_mlx(parts["scales"]).reshape(-1), encoding
        )
    if isinstance(encoding, GgmlBlock) and encoding.name in ggml_decode.DECODERS:
        ggml = ggml_decode.DECODERS[encoding.name]
        return lambda parts: ggml(to_mlx(parts["weight"]))
    raise UnsupportedEncodingError(f"{encoding} cannot be decoded")
