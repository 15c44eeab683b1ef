"""The searching encoders (quality "fast") beside the programs whose formats they write.

    python benchmarks/encode_fast.py
    python benchmarks/encode_fast.py --only affine-4bit-g64 --dtype f32 --rounds 9 --json
    python benchmarks/encode_fast.py --only q4_k affine-4bit-g64 --threads 2

Ours searches with an importance for every column. The peers are in ``PEERS``: for MLX's formats
``mx.quantize`` on the CPU, which takes its scales from the range of the weights; for GGUF's
``ggml_quantize_chunk`` with the same importance, on f32 weights as it takes no others. Both run on
one thread, in turn, on the same weights; the figure is the best of the rounds, in million weights a
second. ``--threads 2`` also runs ours on so many threads, each on chunks of rows as large as
convert's, and shows how many times the speed of one such thread that is. The first call of ours,
which compiles it unless numba's cache has it, is not counted. Needs mlxedge[mlx,test].
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from common import RATIO, Recording, arguments, host

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from oracles import ggml

from mlxedge.conversion import CHUNK_WEIGHTS
from mlxedge.encodings import GGML, MLX_FLOAT, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.ops import load_ops

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

#: What encodes once. A peer's maker gets ready all that is not encoding.
Side = Callable[[], object]


def mx_quantize(weights: np.ndarray, importance: np.ndarray, encoding: Encoding) -> Side:
    """Has no use for importance."""
    if weights.dtype == ml_dtypes.bfloat16:
        theirs = mx.array(weights.view(np.uint16)).view(mx.bfloat16)
    else:
        theirs = mx.array(weights)
    mx.eval(theirs)
    if isinstance(encoding, Affine):
        how: dict[str, Any] = {"group_size": encoding.group, "bits": encoding.bits}
    else:
        how = {"mode": encoding.name.removeprefix("mlx-")}

    def encode() -> None:
        mx.eval(mx.quantize(theirs, **how, stream=mx.cpu))

    return encode


def ggml_quantize(weights: np.ndarray, importance: np.ndarray, encoding: Encoding) -> Side:
    theirs = weights.astype(np.float32)
    out = np.zeros((len(weights), encoding.nbytes((weights.shape[1],))), np.uint8)
    return partial(ggml.quantize, encoding.name, theirs, out, importance)


#: What is compared: the encoding for a dtype of weights, the peer and its maker.
PEERS: list[tuple[Callable[[str], Encoding], str, Callable[..., Side]]] = [
    *(
        (partial(Affine, bits, group), "mx.quantize", mx_quantize)
        for group in AFFINE_GROUPS
        for bits in AFFINE_BITS
    ),
    *((lambda dtype, e=e: e, "mx.quantize", mx_quantize) for e in MLX_FLOAT.values()),
    *(
        (lambda dtype, e=e: e, "ggml with imatrix", ggml_quantize)
        for e in GGML.values()
        if e.writable
    ),
]


def in_pool(encode: Callable[[np.ndarray], object], chunks: list[np.ndarray], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(encode, chunks))


def compare(
    weights: np.ndarray,
    importance: np.ndarray,
    encoding: Encoding,
    peer: str,
    make_peer: Callable[..., Side],
    rounds: int,
    threads: int,
    recording: Recording,
) -> dict[str, str | float]:
    """Million weights a second of ours and of the peer, and ours in terms of the peer's."""
    ops = load_ops("numpy")

    def ours(rows: np.ndarray) -> object:
        return ops.encode(rows, encoding, importance, quality="fast")

    sides: dict[str, Side] = {
        "ours": lambda: ours(weights),
        "theirs": make_peer(weights, importance, encoding),
    }
    if threads > 1:
        rows = max(1, CHUNK_WEIGHTS["numpy"] // weights.shape[1])
        chunks = [weights[i : i + rows] for i in range(0, len(weights), rows)] * 4 * threads
        for count in (1, threads):
            sides[f"pool {count}"] = partial(in_pool, ours, chunks, count)
    took: dict[str, list[float]] = {name: [] for name in sides}
    for timed in (False, *[True] * rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if timed:
                took[name].append(time.perf_counter() - started)
    speeds = {n: [weights.size / s / 1e6 for s in took[n]] for n in ("ours", "theirs")}
    recording.sides(
        encoding.name, "Mweights/s", {"mlxedge": speeds["ours"], peer: speeds["theirs"]}, "higher"
    )
    if threads > 1:
        pairs = zip(took["pool 1"], took[f"pool {threads}"], strict=True)
        many = f"mlxedge, {threads} threads : 1"
        recording.add(encoding.name, many, RATIO, [a / b for a, b in pairs], "higher")
    best = {name: min(seconds) for name, seconds in took.items()}
    speed = {name: max(values) for name, values in speeds.items()}
    return {
        "encoding": encoding.name,
        "peer": peer,
        "ours": round(speed["ours"], 1),
        "theirs": round(speed["theirs"], 1),
        "ratio": round(speed["ours"] / speed["theirs"], 2),
        **({"scaling": round(best["pool 1"] / best[f"pool {threads}"], 2)} if threads > 1 else {}),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--only", nargs="+", metavar="ENCODING", help="such as affine-4bit-g64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="also run ours on so many")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((options.rows, options.cols), np.float32)
    weights = weights.astype(DTYPES[options.dtype])
    importance = rng.random(options.cols, np.float32)
    cases = [(make(options.dtype), peer, side) for make, peer, side in PEERS]
    names = [encoding.name for encoding, _, _ in cases]
    unknown = sorted(set(options.only or []) - set(names))
    if unknown:
        parser.error(f"no {', '.join(unknown)}: choose from {', '.join(names)}")
    title = f"search {options.rows} x {options.cols} {options.dtype}, one thread, Mweights/s"
    if not options.json:
        print(title)
        print(f"{'encoding':20} {'mlxedge':>9} {'peer':>9} {'ratio':>7}  peer")
    recording = Recording(options.record, ["mlx", "xllamacpp"])
    rows = []
    for encoding, peer, side in cases:
        if options.only and encoding.name not in options.only:
            continue
        shared = options.rounds, options.threads, recording
        row = compare(weights, importance, encoding, peer, side, *shared)
        rows.append(row)
        if not options.json:
            scaling = (
                f"  {options.threads} threads: {row['scaling']}x" if options.threads > 1 else ""
            )
            print(
                f"{row['encoding']:20} {row['ours']:9.0f} {row['theirs']:9.0f} "
                f"{row['ratio']:6.2f}x  {row['peer']}{scaling}",
                flush=True,
            )
    recording.write(f"encode_fast: {options.rows} x {options.cols} {options.dtype}, one thread")
    if options.json:
        print(json.dumps({"title": title, "mlx": version("mlx"), "host": host(), "rows": rows}))


if __name__ == "__main__":
    main()
