"""A tiny random mixture of experts as a GGUF file of architecture llama, which llama.cpp runs.

mlxedge has no such model of its own; its recipes and imatrix files know experts all the same.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mlxedge import gguf_values as gv
from mlxedge.encodings import F32, Encoding
from mlxedge.outputs.gguf_file import header_bytes


def write_experts(
    path: Path,
    *,
    experts: int = 8,
    layers: int = 1,
    hidden: int = 256,
    intermediate: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 300,
    seed: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Write the model, f32, untied; returns the shapes of its tensors by GGUF name."""
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, hidden),
        "output.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (hidden, hidden),
            f"blk.{i}.attn_k.weight": (kv, hidden),
            f"blk.{i}.attn_v.weight": (kv, hidden),
            f"blk.{i}.attn_output.weight": (hidden, hidden),
            f"blk.{i}.ffn_gate_inp.weight": (experts, hidden),
            f"blk.{i}.ffn_gate_exps.weight": (experts, intermediate, hidden),
            f"blk.{i}.ffn_up_exps.weight": (experts, intermediate, hidden),
            f"blk.{i}.ffn_down_exps.weight": (experts, hidden, intermediate),
        }
    # Bytes as tokens, the two that SentencePiece begins with, and what fills up.
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [f"t{i}" for i in range(vocab - len(tokens))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (vocab - 259)]
    metadata: gv.Metadata = {
        "general.architecture": gv.string("llama"),
        "llama.block_count": gv.u32(layers),
        "llama.context_length": gv.u32(2048),
        "llama.embedding_length": gv.u32(hidden),
        "llama.feed_forward_length": gv.u32(intermediate),
        "llama.attention.head_count": gv.u32(heads),
        "llama.attention.head_count_kv": gv.u32(kv_heads),
        "llama.attention.layer_norm_rms_epsilon": gv.f32(1e-5),
        "llama.expert_count": gv.u32(experts),
        "llama.expert_used_count": gv.u32(2),
        "tokenizer.ggml.model": gv.string("llama"),
        "tokenizer.ggml.tokens": gv.array("str", tokens),
        "tokenizer.ggml.scores": gv.array("f32", [-float(i) for i in range(vocab)]),
        "tokenizer.ggml.token_type": gv.array("i32", kinds),
        "tokenizer.ggml.bos_token_id": gv.u32(1),
        "tokenizer.ggml.eos_token_id": gv.u32(2),
    }
    rng = np.random.default_rng(seed)
    infos: list[tuple[str, tuple[int, ...], Encoding, int]] = []
    body = bytearray()
    for name, shape in shapes.items():
        infos.append((name, shape, F32, len(body)))
        body += (
            rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))
        ).tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(header_bytes(metadata, infos) + bytes(body))
    return shapes
