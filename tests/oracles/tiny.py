"""Tiny random models in Hugging Face's format, for tests that need a whole one in a second.

    folder = write_tiny_llama(tmp_path / "tiny", model_type="qwen3", dtype="bf16", shards=2)

They say nothing sensible, but everything about them is real: grouped-query attention, rows that are
multiples of 256 so that K-quants apply, a byte-level BPE tokenizer trained on the sentences below,
special tokens, a ChatML template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, IM_START, IM_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SENTENCES = """\
The river bends twice before it reaches the old stone bridge at the edge of the village.
A heron stands in the shallow water and waits, patient as a post, for something silver to move.
Nobody remembers who built the mill, but everybody knows the sound that its wheel makes at night.
On market days the square fills with carts, crates of apples, dogs, and people who talk too loudly.
My grandmother kept her letters in a tin box under the stairs, together with buttons and string.
It rained for eleven days in March 1962, and the lower fields were under water until April.
"Have you seen my blue umbrella?" she asked; "I left it by the door, or perhaps in the train."
He answered that he hadn't, that he never used umbrellas, and that he'd rather get wet.
The teacher wrote three numbers on the board: 7, 42 and 1000, and told us to find the fourth.
If you mix flour, salt, yeast and warm water, and wait long enough, you will have bread.
We couldn't decide whether to walk along the coast or to climb the hill behind the lighthouse.
Its lamp can be seen from twenty miles away, which is why the fishermen call it the Finger.
In winter the lake freezes from the shore inwards, and children skate where they swam in summer.
There's an owl in the church tower; it has been there longer than the present clock.
They're building a road through the forest, although most of us would prefer a path.
She opened the window, listened to the bells for a while, and then closed it without a word.
The capital of France is Paris, the capital of Italy is Rome, and the capital of Peru is Lima.
for i in range(10):
    print(i * i, end=", ")
def area(width, height):
    return width * height  # in square metres
Why do clocks run clockwise? Because the shadow of a sundial does, north of the equator.
He counted: one, two, three, four, five, six, seven, eight, nine, ten, and then he looked up.
A good question is worth more than a quick answer, said the carpenter, measuring the shelf again.
Between the two houses there was a narrow passage where the wind sounded like somebody breathing.
"""

_DTYPES: dict[str, tuple[str, Any]] = {
    "f32": ("float32", np.float32),
    "f16": ("float16", np.float16),
    "bf16": ("bfloat16", ml_dtypes.bfloat16),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_tiny_llama(
    folder: str | Path,
    *,
    layers: int = 2,
    hidden: int = 256,
    intermediate: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    model_type: str = "llama",
    tied: bool = True,
    rope: dict[str, Any] | None = None,
    dtype: str = "f32",
    shards: int = 1,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random model of ``model_type`` (llama, mistral, qwen2, qwen3) and return ``folder``.

    ``rope`` becomes ``rope_parameters`` (transformers 5's style) if it holds ``rope_theta``, else
    ``rope_scaling``. ``config`` is laid over config.json; ``attention_bias`` and ``head_dim`` also
    change the tensors. The same arguments give the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = config.setdefault("head_dim", hidden // heads)
    name, kind = _DTYPES[dtype]
    settings: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "torch_dtype": name,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if rope is not None and "rope_theta" in rope:
        settings["rope_parameters"] = rope
    else:
        settings |= {"rope_theta": 10000.0, "rope_scaling": rope}
    settings |= config
    tensors = _tensors(
        np.random.default_rng(seed), layers, hidden, intermediate, heads * head_dim,
        kv_heads * head_dim, head_dim, vocab, tied,
        qkv_bias=model_type == "qwen2" or bool(config.get("attention_bias")),
        o_bias=model_type == "llama" and bool(config.get("attention_bias")),
        qk_norm=model_type == "qwen3",
    )  # fmt: skip
    _save(folder, {k: v.astype(kind) for k, v in tensors.items()}, shards)
    _dump(folder / "config.json", settings)
    _dump(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [0, 2]})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nRandom weights.\n", "utf-8")
    write_tokenizer(folder, vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int = 512) -> None:
    """tokenizer.json and tokenizer_config.json: GPT-2-style byte-level BPE of ``vocab`` tokens, of
    which the first three are ``SPECIAL``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES.splitlines(keepends=True), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the sentences give {tokenizer.get_vocab_size()} tokens, not {vocab}")
    tokenizer.save(str(folder / "tokenizer.json"))
    _dump(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": IM_END,
            "pad_token": END,
            "unk_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _tensors(
    rng: np.random.Generator, layers: int, hidden: int, intermediate: int, q: int, kv: int,
    head_dim: int, vocab: int, tied: bool, *, qkv_bias: bool, o_bias: bool, qk_norm: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    def matrix(rows: int, cols: int) -> np.ndarray:
        return rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(1.5 / cols**0.5)

    def norm(size: int) -> np.ndarray:
        return 1 + np.float32(0.1) * rng.standard_normal(size, dtype=np.float32)

    def bias(size: int) -> np.ndarray:
        return np.float32(0.1) * rng.standard_normal(size, dtype=np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden)}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        tensors[f"model.layers.{i}.input_layernorm.weight"] = norm(hidden)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{attention}{part}_proj.weight"] = matrix(rows, hidden)
            if qkv_bias:
                tensors[f"{attention}{part}_proj.bias"] = bias(rows)
        tensors[f"{attention}o_proj.weight"] = matrix(hidden, q)
        if o_bias:
            tensors[f"{attention}o_proj.bias"] = bias(hidden)
        if qk_norm:
            tensors[f"{attention}q_norm.weight"] = norm(head_dim)
            tensors[f"{attention}k_norm.weight"] = norm(head_dim)
        tensors[f"model.layers.{i}.post_attention_layernorm.weight"] = norm(hidden)
        tensors[f"{mlp}gate_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{mlp}up_proj.weight"] = matrix(intermediate, hidden)
        tensors[f"{mlp}down_proj.weight"] = matrix(hidden, intermediate)
    tensors["model.norm.weight"] = norm(hidden)
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    return tensors


def _save(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    owner: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        owner |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(owner.items()))}
    _dump(folder / "model.safetensors.index.json", index)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
