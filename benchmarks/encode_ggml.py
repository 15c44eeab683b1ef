"""Speed of our ggml encoders beside ggml's own C, on one matrix, one thread each.

    python benchmarks/encode_ggml.py                # every type
    python benchmarks/encode_ggml.py --types q4_k q6_k --repeats 9 --json
    python benchmarks/encode_ggml.py --importance   # both sides with an importance matrix

The C is ``ggml_quantize_chunk`` of the ``xllamacpp`` wheel (pip install 'mlxedge[test]'). The two
take turns; the figures are medians over the rounds. The first call of an encoder, which compiles
it unless numba's cache has it, is timed apart. The bytes of both are compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Recording, arguments, host

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from oracles import ggml

from mlxedge.encodings import GGML
from mlxedge.fallback.ggml_encode import ENCODERS, NEEDS_IMPORTANCE


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(
    name: str,
    weights: np.ndarray,
    repeats: int,
    importance: np.ndarray | None,
    recording: Recording,
) -> dict[str, object]:
    """Million weights a second of ours and of ggml's C, medians of ``repeats`` rounds."""
    rows, cols = weights.shape
    ours = np.zeros((rows, GGML[name].nbytes((cols,))), np.uint8)
    theirs = np.zeros_like(ours)
    first = seconds(lambda: ENCODERS[name](weights[:1], ours[:1], importance))
    ENCODERS[name](weights, ours, importance)
    ggml.quantize(name, weights, theirs, importance)
    rounds = [
        (
            seconds(lambda: ENCODERS[name](weights, ours, importance)),
            seconds(lambda: ggml.quantize(name, weights, theirs, importance)),
        )
        for _ in range(repeats)
    ]
    million = weights.size / 1e6
    speeds = [[million / s for s in side] for side in zip(*rounds, strict=True)]
    recording.sides(
        name, "Mweights/s", dict(zip(("mlxedge", "ggml"), speeds, strict=True)), "higher"
    )
    speed = [million / statistics.median(side) for side in zip(*rounds, strict=True)]
    return {
        "type": name,
        "mweights_per_s": round(speed[0], 1),
        "ggml_mweights_per_s": round(speed[1], 1),
        "ratio": round(statistics.median(c / o for o, c in rounds), 2),
        "differing_bytes": int((ours != theirs).sum()),
        "first_call_s": round(first, 2),
    }


def main() -> None:
    parser = arguments(__doc__, raw=True)
    parser.add_argument("--types", nargs="+", choices=ENCODERS, help="default: all that can be")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--importance", action="store_true", help="give both an importance matrix")
    options = parser.parse_args()
    possible = [n for n in ENCODERS if options.importance or n not in NEEDS_IMPORTANCE]
    types = options.types or possible
    if not set(types) <= set(possible):
        parser.error(f"{', '.join(sorted(NEEDS_IMPORTANCE))} need --importance")

    rng = np.random.default_rng(0)
    weights = rng.standard_normal((options.rows, options.cols), np.float32)
    importance = rng.random(options.cols, np.float32) if options.importance else None
    recording = Recording(options.record, ["xllamacpp"])
    results = [measure(name, weights, options.repeats, importance, recording) for name in types]
    given = ", importance given" if options.importance else ""
    recording.write(f"encode_ggml: {options.rows} x {options.cols}{given}, one thread")
    if options.json:
        record = {"shape": weights.shape, "importance": options.importance}
        print(json.dumps({**record, "results": results, "host": host()}))
        return
    print(
        f"{options.rows} x {options.cols} normal weights{given}, one thread, "
        "million weights a second"
    )
    print(f"{'type':8}{'ours':>9}{'ggml':>9}{'ratio':>8}{'bytes differ':>14}{'first call':>12}")
    for r in results:
        print(
            f"{r['type']:8}{r['mweights_per_s']:9}{r['ggml_mweights_per_s']:9}{r['ratio']:8}"
            f"{r['differing_bytes']:14}{r['first_call_s']:10} s"
        )


if __name__ == "__main__":
    main()
