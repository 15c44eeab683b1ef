"""Peak memory of calibrating a model that is larger than what it may use.

Makes a checkpoint of about ``--gigabytes`` in bf16 with the layer shapes of a 7B llama (one layer's
random weights, again and again), calibrates it in a process of its own, and prints the peak
resident memory beside the size of one layer, of its Hessians and of the model.

    python benchmarks/calibrate_memory.py [--gigabytes 8] [--tokens 256] [--hessians] [--json]
        [--record FOLDER]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from common import Recording, arguments, host, run_process
from safetensors.numpy import save_file

from mlxedge.demo import model_path

HIDDEN, INTERMEDIATE, KV = 4096, 11008, 4096
_MIB = 2**20


def write_checkpoint(folder: Path, gigabytes: float) -> tuple[int, int, int]:
    """Write a file for each layer; returns the layers, the bytes of one, and those of all
    weights."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, folder)
    vocab = json.loads((model_path() / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(0)

    def tensor(*shape: int) -> np.ndarray:
        scale = np.float32(shape[-1] ** -0.5)
        return (random.standard_normal(shape, np.float32) * scale).astype(ml_dtypes.bfloat16)

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV, HIDDEN),
        "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    ones = np.ones(HIDDEN, ml_dtypes.bfloat16)
    norms = ("input_layernorm", "post_attention_layernorm")
    block = {n: tensor(*s) for n, s in shapes.items()} | dict.fromkeys(norms, ones)
    layer_bytes = sum(t.nbytes for t in block.values())
    layers = max(2, round(gigabytes * 1e9 / layer_bytes))
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        name = f"layer-{layer:03d}.safetensors"
        named = {f"model.layers.{layer}.{n}.weight": t for n, t in block.items()}
        save_file(named, folder / name)
        weight_map |= dict.fromkeys(named, name)
    rest = {"model.embed_tokens.weight": tensor(vocab, HIDDEN), "model.norm.weight": ones}
    save_file(rest, folder / "rest.safetensors")
    weight_map |= dict.fromkeys(rest, "rest.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32 * KV // HIDDEN,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers, layer_bytes, sum(t.nbytes for t in rest.values()) + layers * layer_bytes


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hessians", action="store_true")
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    recording = Recording(options.record)
    with tempfile.TemporaryDirectory(dir=options.home) as folder:
        model = Path(folder, "model")
        layers, layer_bytes, model_bytes = write_checkpoint(model, options.gigabytes)
        command = [sys.executable, "-m", "mlxedge", "calibrate", str(model)]
        command += ["-o", str(Path(folder, "imatrix.gguf")), "--tokens", str(options.tokens)]
        run = run_process(command + ["--hessians"] * options.hessians)
    hessians = 4 * (3 * HIDDEN**2 + INTERMEDIATE**2) if options.hessians else 0
    result = {
        "model_mib": round(model_bytes / _MIB),
        "layers": layers,
        "layer_mib": round(layer_bytes / _MIB),
        "hessians_of_a_layer_mib": round(hessians / _MIB),
        "hidden_states_mib": round(4 * options.tokens * HIDDEN / _MIB),
        "peak_mib": round(run.peak_mib),
        "seconds": round(run.seconds, 1),
        **host(),
    }
    recording.add("time", "mlxedge", "s", [run.seconds])
    recording.add("peak memory", "mlxedge", "MiB", [run.peak_mib])
    what = "importance and Hessians" if options.hessians else "importance"
    recording.write(
        f"calibrate_memory: {what}, {model_bytes / 1e9:.1f} GB, {options.tokens} tokens"
    )
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
