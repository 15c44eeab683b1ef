"""Make tests/golden/imatrix/ with the real llama-imatrix:

    python tests/golden/make_imatrix.py /path/to/llama-imatrix

The committed files are by llama-imatrix of llama.cpp as vendored by llama-cpp-python 0.3.36, from
the random models and the text of tests/oracles, on x86-64. Sums differ a little elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "imatrix"
sys.path.insert(0, str(Path(__file__).parents[1]))


def main(program: str) -> None:
    from oracles.gguf_models import write_gguf_model
    from oracles.tiny import SENTENCES, write_tiny_llama

    import mlxedge

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "text.txt").write_text(SENTENCES, encoding="utf-8")
        folder = write_tiny_llama(work / "tiny", layers=1, hidden=128, intermediate=256)
        mlxedge.convert(folder, "gguf:f32", work / "dense.gguf")
        write_gguf_model(work / "experts.gguf", experts=4, hidden=64, intermediate=32, heads=2)
        for model in ("dense", "experts"):
            for form in ("gguf", "dat"):
                made = FOLDER / f"{model}.{form}"
                command = [program, "-m", f"{model}.gguf", "-f", "text.txt", "-o", str(made)]
                options = ["--output-format", form, "--no-ppl", "-c", "64", "-t", "1"]
                subprocess.run([*command, *options], cwd=work, check=True)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
