"""Write docs/architectures.md from a run of the tests that hold logits against transformers:

    python docs/make_architectures.py

Needs what the tests need (pip install -e '.[test]').
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mlxedge.models import known_model_types, spec_for

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("architectures.md")
TESTS = [ROOT / "tests" / "peers" / f"test_{name}.py" for name in ("logits", "remote_code_moe")]
PROGRAMS = ("llama.cpp", "mlx-lm", "ours")

HEAD = """# Architectures

What mlxedge converts, by the `model_type` in config.json. Each was held against transformers: small
random checkpoints that together draw the options of its config, as transformers saves them, were
converted to GGUF and MLX without quantization, and run on 96 tokens. The figures are the largest
difference of any logit from transformers', as a share of the largest logit, at the worst of the
checkpoints that it computes. A model that a runtime would compute otherwise is refused before
any work, with the reason; some of the checkpoints are there for that.

"ours" is mlxedge's own forward pass, with which it calibrates, evaluates and generates. llama.cpp
looks GELU up in a table of f16, which shows, as does that it takes the deviation of Gemma 3n's
sparse gates with n - 1. [conversion.md](conversion.md) says how to convert;
`tests/peers/test_logits.py` and `tests/oracles/architectures*.py` have the checkpoints; of
bailing_moe and deepseek, which transformers has no code of, `tests/peers/test_remote_code_moe.py`
has them, with models that compute the same as the truth. This page is written by
`docs/make_architectures.py` from a run of those tests.

| model_type | GGUF architecture | checkpoints | llama.cpp | mlx-lm | ours |
|---|---|---|---|---|---|
"""


def measured() -> list[dict[str, object]]:
    """What the tests note, once they all pass."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        command = [sys.executable, "-m", "pytest", "-q", *map(str, TESTS)]
        environment = {**os.environ, "MLXEDGE_LOGITS": str(notes)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return [json.loads(line) for line in notes.read_text("utf-8").splitlines()]


def page(notes: Iterable[dict[str, object]]) -> str:
    """The page for what was noted."""
    lines = []
    worst: dict[tuple[object, object], float] = {}
    drawn: dict[object, set[object]] = {}
    for note in notes:
        kind, error = note["model_type"], note["error"]
        assert isinstance(error, float)
        drawn.setdefault(kind, set()).add(note["checkpoint"])
        key = kind, note["program"]
        worst[key] = max(error, worst.get(key, 0.0))
    for kind in known_model_types():
        arch = spec_for({"model_type": kind}).gguf_arch
        found = [worst.get((kind, program)) for program in PROGRAMS]
        shown = " | ".join("" if error is None else f"{error:.0e}" for error in found)
        lines.append(f"| {kind} | {arch} | {len(drawn.get(kind, ()))} | {shown} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(measured()), encoding="utf-8")
