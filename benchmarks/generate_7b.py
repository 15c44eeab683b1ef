"""Peak memory and speed of a 7B model in Q4_K_M on mlxedge's own forward pass.

    python benchmarks/generate_7b.py [--threads N] [--prompt 64] [--tokens 8] [--json]
        [--record FOLDER]

The file has the shapes and types of Mistral-7B in Q4_K_M and holds only zeros, so that it takes no
room on disk; memory and time do not depend on the values. A process of its own is measured: Python,
the libraries, the weights, the cache, everything.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import gguf
from common import Recording, arguments, host, run_process

LAYERS, HIDDEN, FFN, VOCAB, KV = 32, 4096, 14336, 32000, 1024
_GIB = 2**30

_CHILD = """
import json, sys, time
import mlxedge
path, threads, prompt, count, report = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
with mlxedge.load(path, threads=threads) as model:
    session = model.session()
    started = time.perf_counter()
    session.feed([5] * prompt)
    middle = time.perf_counter()
    for _ in range(count):
        session.feed([5])
    end = time.perf_counter()
speeds = {"prefill": prompt / (middle - started), "decode": count / (end - middle)}
json.dump(speeds, open(report, "w"))
"""


def better(layer: int) -> bool:
    """Whether llama.cpp's Q4_K_M gives the layer's V and down projections Q6_K."""
    return layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2


def write_model(path: Path) -> int:
    """Write the file and return its size in bytes."""
    kind = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    shapes = {
        "token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN), "output_norm": (HIDDEN,),
    }  # fmt: skip
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN), f"blk.{i}.attn_k": (KV, HIDDEN),
            f"blk.{i}.attn_v": (KV, HIDDEN), f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (FFN, HIDDEN), f"blk.{i}.ffn_up": (FFN, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, FFN),
        }  # fmt: skip
    total = 0
    for name, shape in shapes.items():
        found = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)", name)
        sixth = name == "output" or (found is not None and better(int(found[1])))
        chosen = kind.F32 if len(shape) == 1 else kind.Q6_K if sixth else kind.Q4_K
        block, size = gguf.GGML_QUANT_SIZES[chosen]
        count = int(shape[0] * (shape[1] if len(shape) > 1 else 1))
        writer.add_tensor_info(
            f"{name}.weight", shape, "float32", count // block * size, raw_dtype=chosen
        )
        total += -(-count // block * size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(start + total)
    return start + total


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=host()["cpus"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    recording = Recording(options.record)
    with tempfile.TemporaryDirectory(prefix="mlxedge-bench-") as home:
        path, notes = Path(home) / "7b-Q4_K_M.gguf", Path(home) / "speeds.json"
        size = write_model(path)
        given = [str(path), str(options.threads), str(options.prompt), str(options.tokens)]
        run = run_process([sys.executable, "-c", _CHILD, *given, str(notes)])
        speeds = json.loads(notes.read_text())
    result = {
        "file_gib": round(size / _GIB, 2),
        "peak_gib": round(run.peak_mib / 1024, 2),
        "tokens_per_second": {k: round(v, 2) for k, v in speeds.items()},
        "threads": options.threads,
        "host": host(),
    }
    recording.add("peak memory", "mlxedge", "MiB", [run.peak_mib])
    for test, speed in speeds.items():
        recording.add(test, "mlxedge", "tokens/s", [speed], "higher")
    tokens = f"{options.prompt} + {options.tokens} tokens"
    recording.write(f"generate_7b: Q4_K_M, {options.threads} threads, {tokens}")
    if options.json:
        print(json.dumps(result))
        return
    print(f"file {result['file_gib']} GiB, peak memory {result['peak_gib']} GiB")
    print(f"{options.threads} threads, tokens per second: {result['tokens_per_second']}")


if __name__ == "__main__":
    main()
