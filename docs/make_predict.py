"""Writes docs/predict.md: what predict does, and its error against the published results.

python docs/make_predict.py
"""

from __future__ import annotations

import statistics
import textwrap
from pathlib import Path

from mlxedge.bench.predict import BUILD, reference_errors

PAGE = Path(__file__).with_name("predict.md")
HEAD = f"""# Will it run, and how fast?

```
mlxedge predict Qwen/Qwen3-8B --to mlx:4bit --to gguf:q4_k_m --chip M2 --memory 16GB --context 8192
```

answers before anything is downloaded: of a Hub repository only the heads of its files are read. On
a Mac, `--chip`, `--gpu-cores` and `--memory` are its own unless told.

- **Memory** is the weights as that target has them (planned as for a conversion, tensor by tensor),
  keys and values of the context in f16 (layers with a sliding window keep no more than it), states
  of recurrent layers in f32, and 0.5 GB for the rest of a runtime. A Mac lets its GPU have about
  two thirds of a memory of up to 36 GB and three quarters of a larger one, unless
  `iogpu.wired_limit_mb` was raised.
- **Decode speed** at the end of that context: a token reads the weights that serve it (not the
  table of embeddings, of experts those that are chosen) and the keys and values, once. Memory
  bandwidth over these bytes is the roofline. What share of it is reached is learnt from the
  published results of chips of the same kind, base, Pro, Max or Ultra, with Llama-2-7B Q4_0 in
  {BUILD}, and the range is wider than theirs by 7 % either way. The output names this basis.

What the range does not know: other engines and later builds (prefill on M5 differs threefold
between two of them, decode by a tenth), models that read less than 1 GB a token (what a step costs
beside reading shows, so they stay below it), mixtures of experts, whose steps are many and small,
throttling, and what else runs. It is a first answer; `mlxedge bench` is the one that counts.
Nothing of this was measured on a Mac by us.

## How far off it is

"""
TABLE = """| chip | GPU cores | published tokens/s | from the others | error of the middle |
|---|---|---|---|---|
"""


def page() -> str:
    rows = reference_errors()
    errors = [abs(row.error) for row in rows]
    said = (
        "Each published result, predicted from the others of its kind (without other sizes of the "
        f"same chip): {sum(row.inside for row in rows)} of {len(rows)} lie in the range that the "
        "others of their kind give; the middle of it is off by "
        f"{statistics.median(errors):.1%} in the median and by {max(errors):.0%} at most. The "
        "rows, with their builds and sources, are those of `mlxedge compare --reference`."
    )
    lines = [
        f"| {row.chip.name} | {row.chip.gpu_cores} | {row.chip.decode:.1f} | "
        f"{row.low:.1f} to {row.high:.1f} | {row.error:+.0%} |"
        for row in rows
    ]
    return HEAD + textwrap.fill(said, 100) + "\n\n" + TABLE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
