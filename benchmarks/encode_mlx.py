"""MLX 4-bit and the other MLX formats: the fallback's encoder against ``mx.quantize`` on the CPU.

    python benchmarks/encode_mlx.py [--rows 2048] [--cols 4096] [--dtype bf16] [--rounds 7] [--json]
        [--record FOLDER]

Both run on one thread (``mx.quantize`` has no more), in turn, on the same weights; the figure is
the best of the rounds, in million weights a second. The bytes are compared too.
Needs mlxedge[mlx].
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import ml_dtypes
import mlx.core as mx
import numpy as np
from common import Recording, arguments, host

from mlxedge.encodings import MLX_FLOAT, Affine, MlxFloat
from mlxedge.encodings.mlx import AFFINE_BITS
from mlxedge.ops import load_ops

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights")
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=64, help="affine")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    weights = np.random.default_rng(0).normal(size=(options.rows, options.cols))
    weights = weights.astype(DTYPES[options.dtype])
    encodings: list[Affine | MlxFloat] = [
        *(Affine(bits, options.group, options.dtype) for bits in AFFINE_BITS),
        *MLX_FLOAT.values(),
    ]
    recording = Recording(options.record, ["mlx"])
    rows = [compare(weights, encoding, options.rounds, recording) for encoding in encodings]
    recording.write(f"encode_mlx: {options.rows} x {options.cols} {options.dtype}, one thread")
    if options.json:
        title = f"encode {options.rows} x {options.cols} {options.dtype}"
        print(json.dumps({"title": title, "mlx": mx.__version__, "host": host(), "rows": rows}))
        return
    print(f"{options.rows} x {options.cols} {options.dtype}, one thread, Mweights/s")
    print(f"{'encoding':20} {'mlxedge':>9} {'mx.quantize':>12} {'ratio':>7}  bytes")
    for row in rows:
        same = "same" if row["same_bytes"] else "DIFFERENT"
        print(
            f"{row['encoding']:20} {row['ours']:9.0f} {row['theirs']:12.0f} "
            f"{row['ratio']:6.2f}x  {same}"
        )


def compare(
    weights: np.ndarray, encoding: Affine | MlxFloat, rounds: int, recording: Recording
) -> dict[str, str | float | bool]:
    ops = load_ops("numpy")
    bits = weights.view(np.uint16) if weights.dtype == ml_dtypes.bfloat16 else weights
    theirs_in = mx.array(bits)
    if weights.dtype == ml_dtypes.bfloat16:
        theirs_in = theirs_in.view(mx.bfloat16)
    mx.eval(theirs_in)

    def ours() -> np.ndarray:
        return ops.encode(weights, encoding)["weight"]

    def theirs() -> mx.array:
        made = mx.quantize(
            theirs_in,
            group_size=encoding.group,
            bits=encoding.bits,
            mode=encoding.mode,
            stream=mx.cpu,
        )
        mx.eval(made)
        return made[0]

    same = np.array_equal(ours(), np.array(theirs()))
    sides: dict[str, Callable[[], object]] = {"mlxedge": ours, "mx.quantize": theirs}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            speeds[name].append(weights.size / 1e6 / (time.perf_counter() - started))
    recording.sides(encoding.name, "Mweights/s", speeds, "higher")
    best = [max(of_side) for of_side in speeds.values()]
    return {
        "encoding": encoding.name,
        "ours": round(best[0], 1),
        "theirs": round(best[1], 1),
        "ratio": round(best[0] / best[1], 2),
        "same_bytes": bool(same),
    }


if __name__ == "__main__":
    main()
