"""Micro-benchmarks: memory bandwidth, encoders and decoders, products with quantized matrices.

Each figure is measured several times after a warm-up, on one thread or on all, and stands beside
the share of the roofline that it reaches: of the memory bandwidth measured here, the bytes that it
must move at least (what it reads and what it writes, once) over the time it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxedge.bench.figures import Figure
from mlxedge.encodings import GGML, MLX_FLOAT, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.ops import Parts, Quality, load_forward, load_ops, load_reference

#: Called with figures done, figures in all, and what is measured now.
ProgressHook = Callable[[int, int, str], None]

#: Larger than caches are.
_STREAM_BYTES = 1 << 28
#: Rows and columns of what is encoded and decoded: a chunk as convert makes them.
_MATRIX = (64, 2048)
#: Matrices of a 7B and a 1B model, ``[rows, cols]``, and how many positions they multiply.
SHAPES = ((4096, 4096), (14336, 4096), (2048, 2048))
POSITIONS = (1, 64)
#: What they are encoded in.
PRODUCTS: tuple[Encoding, ...] = (GGML["q4_k"], GGML["q8_0"], Affine(4, 64), Affine(8, 64))
#: A kernel is called again until a value took so long, for clocks are coarse.
_LEAST_SECONDS = 0.02


@dataclass(frozen=True)
class _Job:
    name: str
    side: str
    unit: str
    #: What one call counts for, in units.
    units: float
    #: Bytes that one call moves at least.
    nbytes: float
    call: Callable[[], object]


def measure_kernels(
    engine: str, repeats: int, *, threads: int, progress: ProgressHook | None = None
) -> list[Figure]:
    """All figures of a backend ("numpy" or "mlx")."""
    figures: list[Figure] = []
    bandwidth = 0.0
    jobs = [*_streams(threads), *_encoders(engine), *_MULTIPLIES[engine](threads)]
    for number, job in enumerate(jobs):
        if progress:
            progress(number, len(jobs), job.name)
        seconds = _time(job.call, repeats)
        values = tuple(job.units / s for s in seconds)
        if job.unit == "GB/s" and job.name.startswith("memory"):
            bandwidth = max(bandwidth, *(v * 1e9 for v in values))
            figures.append(Figure(job.name, job.side, job.unit, "higher", values))
            continue
        share = job.nbytes / (sorted(seconds)[len(seconds) // 2] * bandwidth)
        figures.append(Figure(job.name, job.side, job.unit, "higher", values, share))
    if progress:
        progress(len(jobs), len(jobs), "")
    return figures


def _time(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of one call, ``repeats`` times; each over as many calls as make it long enough."""
    started = time.perf_counter()
    call()  # compiles what is compiled, and warms up
    call()
    once = max((time.perf_counter() - started) / 2, 1e-9)
    calls = max(1, min(10_000, round(_LEAST_SECONDS / once)))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - started) / calls)
    return found


def _streams(threads: int) -> Iterator[_Job]:
    """Reading, and copying (read and written, both counted), by all threads at once."""
    pool = ThreadPoolExecutor(threads)
    size = _STREAM_BYTES // 4 // threads
    parts = [(np.ones(size, np.float32), np.empty(size, np.float32)) for _ in range(threads)]
    total = 4.0 * size * threads

    def read() -> None:
        list(pool.map(lambda pair: np.add.reduce(pair[0]), parts))

    def copy() -> None:
        list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))

    side = f"{threads} threads"
    yield _Job("memory, read", side, "GB/s", total / 1e9, total, read)
    yield _Job("memory, copy", side, "GB/s", 2 * total / 1e9, 2 * total, copy)


def _encodings() -> list[Encoding]:
    return [*GGML.values(), *(Affine(bits, 64) for bits in AFFINE_BITS), *MLX_FLOAT.values()]


def _encoders(engine: str) -> Iterator[_Job]:
    ops = load_ops(engine)
    rows, cols = _MATRIX
    weights = np.random.default_rng(0).normal(0.0, 0.02, _MATRIX).astype(np.float32)
    importance = np.ones(cols, np.float32)
    million = rows * cols / 1e6
    for encoding in _encodings():
        moved = 4.0 * rows * cols + encoding.nbytes(_MATRIX)
        side = f"{engine}, 1 thread"
        ways: tuple[tuple[str, Quality, np.ndarray | None], ...] = (
            ("reference", "reference", None),
            ("reference with imatrix", "reference", importance),
            ("fast", "fast", importance),
        )
        for name, quality, given in ways:
            try:
                ops.encode(weights, encoding, given, quality=quality)
            except UnsupportedEncodingError:
                continue

            def encode(
                encoding: Encoding = encoding, given: Any = given, quality: Any = quality
            ) -> None:
                ops.encode(weights, encoding, given, quality=quality)

            yield _Job(
                f"encode {encoding.name}, {name}", side, "Mweights/s", million, moved, encode
            )
        try:
            parts = load_reference().encode(weights, encoding, importance)
            ops.decode(parts, encoding)
        except UnsupportedEncodingError:
            continue

        def decode(encoding: Encoding = encoding, parts: Parts = parts) -> None:
            ops.decode(parts, encoding)

        yield _Job(f"decode {encoding.name}", side, "Mweights/s", million, moved, decode)


def _multiplies_numpy(threads: int) -> Iterator[_Job]:
    """Through the tape of the forward pass, as a model runs."""
    ops = load_forward()
    team = ops.Team(threads)
    for rows, cols in SHAPES:
        for encoding in PRODUCTS:
            matrix = ops.Matrix(_encoded(rows, cols, encoding), encoding, rows, cols)
            tape = ops.Tape()
            x, out = tape.buffer(cols), tape.buffer(rows)
            tape.linear(x, [ops.Product(matrix, out)])
            runner = ops.Runner(tape, team, hidden=x, result=None, ropes=[], rows=max(POSITIONS))
            for n in POSITIONS:
                hidden = np.random.default_rng(1).normal(size=(n, cols)).astype(np.float32)
                cache = ops.Cache(tape, 1)

                def multiply(
                    runner: Any = runner, hidden: np.ndarray = hidden, cache: Any = cache
                ) -> None:
                    runner.advance(hidden, 0, cache)

                yield _product(f"numpy, {threads} threads", encoding, rows, cols, n, multiply)


def _multiplies_mlx(threads: int) -> Iterator[_Job]:
    import mlx.core as mx

    side = "mlx, gpu" if mx.default_device().type == mx.gpu else "mlx, cpu"
    for rows, cols in SHAPES:
        for encoding in PRODUCTS:
            if not isinstance(encoding, Affine):
                continue
            weights = mx.array(_normal(rows, cols)).astype(mx.bfloat16)
            parts = mx.quantize(weights, group_size=encoding.group, bits=encoding.bits)
            mx.eval(*parts)
            for n in POSITIONS:
                x = mx.random.normal((n, cols)).astype(mx.bfloat16)
                mx.eval(x)

                def multiply(x: Any = x, parts: Any = parts, encoding: Affine = encoding) -> None:
                    w, scales, biases = parts
                    group, bits = encoding.group, encoding.bits
                    made = mx.quantized_matmul(x, w, scales, biases, group_size=group, bits=bits)
                    mx.eval(made)

                yield _product(side, encoding, rows, cols, n, multiply)


_MULTIPLIES: dict[str, Callable[[int], Iterator[_Job]]] = {
    "numpy": _multiplies_numpy,
    "mlx": _multiplies_mlx,
}


def _product(
    side: str, encoding: Encoding, rows: int, cols: int, n: int, call: Callable[[], object]
) -> _Job:
    """One position is limited by the weights that are read, many by arithmetic."""
    read = float(encoding.nbytes((rows, cols)))
    name = f"matmul {n} × [{rows}, {cols}] {encoding.name}"
    moved = read + 4.0 * n * (rows + cols)
    if n == 1:
        return _Job(name, side, "GB/s", read / 1e9, moved, call)
    return _Job(name, side, "GFLOP/s", 2.0 * n * rows * cols / 1e9, moved, call)


def _normal(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, 0.02, (rows, cols)).astype(np.float32)


def _encoded(rows: int, cols: int, encoding: Encoding) -> Parts:
    return load_reference().encode(_normal(rows, cols), encoding)
