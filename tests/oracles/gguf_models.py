"""Tiny GGUF models of shapes that mlxedge itself does not write, such as a mixture of experts, or
that nobody wants to fill with numbers, such as 80 layers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from mlxedge import gguf_values as gv
from mlxedge.encodings import F32, Encoding
from mlxedge.outputs.gguf_file import header_bytes

Shapes = dict[str, tuple[int, ...]]


def write_gguf_model(
    path: Path,
    *,
    arch: str = "llama",
    experts: int = 0,
    tied: bool = False,
    layers: int = 1,
    hidden: int = 256,
    intermediate: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 300,
    seed: int | None = 0,
) -> Shapes:
    """Write a random model, f32, or without ``seed`` one of zeros that takes up no disk.

    Returns the shapes of its tensors by GGUF name. llama.cpp runs it if ``arch`` is llama.
    """
    shapes = _shapes(experts, tied, layers, hidden, intermediate, hidden // heads * kv_heads, vocab)
    metadata = {
        "general.architecture": gv.string(arch),
        f"{arch}.block_count": gv.u32(layers),
        f"{arch}.context_length": gv.u32(2048),
        f"{arch}.embedding_length": gv.u32(hidden),
        f"{arch}.feed_forward_length": gv.u32(intermediate),
        f"{arch}.attention.head_count": gv.u32(heads),
        f"{arch}.attention.head_count_kv": gv.u32(kv_heads),
        f"{arch}.attention.layer_norm_rms_epsilon": gv.f32(1e-5),
        **_vocabulary(vocab),
    }
    if experts:
        metadata[f"{arch}.expert_count"] = gv.u32(experts)
        metadata[f"{arch}.expert_used_count"] = gv.u32(2)
    infos: list[tuple[str, tuple[int, ...], Encoding, int]] = []
    end = 0
    for name, shape in shapes.items():
        infos.append((name, shape, F32, end))
        end += -(-4 * math.prod(shape) // 32) * 32
    header = header_bytes(metadata, infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
        if seed is not None:
            rng = np.random.default_rng(seed)
            for _, shape, _, offset in infos:
                values = rng.standard_normal(shape, np.float32)
                file.seek(len(header) + offset)
                file.write((values / np.float32(math.sqrt(shape[-1]))).tobytes())
    return shapes


def _shapes(
    experts: int, tied: bool, layers: int, hidden: int, intermediate: int, kv: int, vocab: int
) -> Shapes:
    stack = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    shapes: Shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (vocab, hidden)
    for i in range(layers):
        if experts:
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (experts, hidden)
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (hidden, hidden),
            f"blk.{i}.attn_k.weight": (kv, hidden),
            f"blk.{i}.attn_v.weight": (kv, hidden),
            f"blk.{i}.attn_output.weight": (hidden, hidden),
            f"blk.{i}.ffn_gate{suffix}.weight": (*stack, intermediate, hidden),
            f"blk.{i}.ffn_up{suffix}.weight": (*stack, intermediate, hidden),
            f"blk.{i}.ffn_down{suffix}.weight": (*stack, hidden, intermediate),
        }
    return shapes


def _vocabulary(size: int) -> gv.Metadata:
    """Bytes as tokens, the three that SentencePiece begins with, and what fills up."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [f"t{i}" for i in range(size - len(tokens))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    return {
        "tokenizer.ggml.model": gv.string("llama"),
        "tokenizer.ggml.tokens": gv.array("str", tokens),
        "tokenizer.ggml.scores": gv.array("f32", [-float(i) for i in range(size)]),
        "tokenizer.ggml.token_type": gv.array("i32", kinds),
        "tokenizer.ggml.bos_token_id": gv.u32(1),
        "tokenizer.ggml.eos_token_id": gv.u32(2),
    }
