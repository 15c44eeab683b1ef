"""Peak memory of converting a large sharded checkpoint to several outputs at once.

Makes a synthetic llama checkpoint of about ``--gigabytes`` in bf16 (random weights, real layout,
many shards), converts it to MLX 4-bit, GGUF Q4_K_M and Q8_0 in one process, and prints the peak
resident memory against the bound of 1 GiB plus twice the largest tensor.

    python benchmarks/memory.py [--gigabytes 8] [--to ...] [--json] [--record FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from common import RATIO, Recording, arguments, run_process
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, VOCAB = 4096, 14336, 32000


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write the shards, one per layer; returns the size of the largest tensor in bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    pool = (random.standard_normal(1 << 24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def tensor(*shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        start = int(random.integers(1 << 20))
        return np.resize(pool[start:], size).reshape(shape)

    kv = HIDDEN // 4
    block = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    per_layer = 2 * sum(a * b for a, b in block.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    weight_map: dict[str, str] = {}

    def write(number: int, tensors: dict[str, np.ndarray]) -> None:
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    ones = np.ones(HIDDEN, ml_dtypes.bfloat16)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        made = {f"{prefix}{name}.weight": tensor(*shape) for name, shape in block.items()}
        made[prefix + "input_layernorm.weight"] = ones
        made[prefix + "post_attention_layernorm.weight"] = ones
        write(i, made)
    write(
        layers,
        {
            "model.embed_tokens.weight": tensor(VOCAB, HIDDEN),
            "lm_head.weight": tensor(VOCAB, HIDDEN),
            "model.norm.weight": ones,
        },
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return 2 * max(VOCAB * HIDDEN, HIDDEN * INTERMEDIATE)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--to", action="append", help="default: mlx:4bit gguf:q4_k_m gguf:q8_0")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    targets = options.to or ["mlx:4bit", "gguf:q4_k_m", "gguf:q8_0"]
    recording = Recording(options.record)
    with tempfile.TemporaryDirectory(dir=options.home) as folder:
        model, out = Path(folder, "model"), Path(folder, "out")
        largest = write_checkpoint(model, options.gigabytes)
        size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        command = [sys.executable, "-m", "mlxedge", "convert", str(model), "-o", str(out)]
        run = run_process([*command, *(a for t in targets for a in ("--to", t))])
    bound = 1024 + 2 * largest / 2**20
    result = {
        "source_gb": round(size / 1e9, 2),
        "targets": targets,
        "seconds": round(run.seconds, 1),
        "peak_mib": round(run.peak_mib),
        "bound_mib": round(bound),
        "ratio": round(run.peak_mib / bound, 3),
    }
    recording.add("time", "mlxedge", "s", [run.seconds])
    recording.add("peak memory", "mlxedge", "MiB", [run.peak_mib])
    recording.add("peak memory", "mlxedge : bound", RATIO, [bound / run.peak_mib], "higher")
    recording.write(f"memory: {size / 1e9:.1f} GB to {', '.join(targets)}")
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
