"""Configs as they are on the Hub, of older styles than transformers 5 writes: they are read, and
the runtimes that have the architecture take them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from oracles import published_fused

from mlxedge.errors import MlxedgeError
from mlxedge.models import normalise, spec_for
from mlxedge.models.rope import Rope
from mlxedge.models.shape import shape_of

#: By the model's name, the keys that matter here; the formats whose runtime takes it; and what the
#: forward pass is told of it.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "swiss-ai/Apertus-8B-2509": (
        {
            "model_type": "apertus",
            "hidden_act": "xielu",
            "hidden_size": 4096,
            "intermediate_size": 21504,
            "max_position_embeddings": 65536,
            "mlp_bias": False,
            "attention_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "post_norm": False,
            "qk_norm": True,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 12000000,
            "tie_word_embeddings": False,
            "vocab_size": 131072,
        },
        ("gguf", "mlx"),
        {"activation": "xielu", "head_dim": 128, "theta": 12e6, "rope": "llama3"},
    ),
    "internlm/internlm3-8b-instruct": (
        {
            "model_type": "internlm3",
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
            "bias": False,
            "qkv_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 10240,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 48,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
            "tie_word_embeddings": False,
            "vocab_size": 128512,
        },
        ("gguf", "mlx"),
        {"head_dim": 128, "theta": 5e7, "rope": "default"},
    ),
    "mistralai/Ministral-3-8B-Base-2512": (
        {
            "model_type": "ministral3",
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 262144,
            "num_attention_heads": 32,
            "num_hidden_layers": 34,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 131072,
        },
        ("gguf", "mlx"),
        {"tempered": 0.1, "span": 16384, "rope": "yarn", "attention_factor": 1.0},
    ),
    "openbmb/MiniCPM-2B-sft-bf16": (
        {
            "model_type": "minicpm",
            "auto_map": {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"},
            "dim_model_base": 256,
            "hidden_act": "silu",
            "hidden_size": 2304,
            "intermediate_size": 5760,
            "max_position_embeddings": 4096,
            "num_attention_heads": 36,
            "num_hidden_layers": 40,
            "num_key_value_heads": 36,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "scale_depth": 1.4,
            "scale_emb": 12,
            "vocab_size": 122753,
        },
        ("gguf", "mlx"),
        {"embedding": 12.0, "logits": 256 / 2304, "residual": 1.4 / 40**0.5, "theta": 1e4},
    ),
    "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct": (
        {
            "model_type": "exaone",
            "activation_function": "silu",
            "auto_map": {"AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM"},
            "head_dim": 80,
            "hidden_size": 2560,
            "intermediate_size": 7168,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_layers": 30,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 102400,
        },
        ("gguf", "mlx"),
        {"layers": 30, "epsilon": 1e-5, "head_dim": 80, "theta": 1e6, "rope": "llama3"},
    ),
    "microsoft/phi-2": (
        {
            "model_type": "phi",
            "hidden_act": "gelu_new",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.4,
            "qk_layernorm": False,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 51200,
        },
        ("gguf", "mlx"),
        {"activation": "gelu_tanh", "fraction": 0.4, "head_dim": 80},
    ),
    "THUDM/glm-4-9b-chat-hf": (
        {
            "model_type": "glm",
            "attention_bias": True,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 151552,
        },
        ("gguf",),
        {"fraction": 0.5, "epsilon": 1.5625e-07},
    ),
    "stabilityai/stablelm-2-12b": (
        {
            "model_type": "stablelm",
            "hidden_act": "silu",
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.25,
            "qk_layernorm": True,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "use_qkv_bias": False,
            "vocab_size": 100352,
        },
        ("gguf", "mlx"),
        {"parallel": True, "fraction": 0.25},
    ),
    "allenai/OLMo-1.7-7B-hf": (
        {
            "model_type": "olmo",
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
        ("gguf",),
        {"qkv_limit": None, "epsilon": 1e-5},
    ),
    "XiaomiMiMo/MiMo-7B-RL": (
        {
            "model_type": "mimo",
            "attention_bias": True,
            "auto_map": {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"},
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "num_nextn_predict_layers": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 640000,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151680,
        },
        ("gguf", "mlx"),
        {"theta": 640000.0, "kv_heads": 8},
    ),
    "arcee-ai/AFM-4.5B": (
        {
            "model_type": "arcee",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "relu2",
            "hidden_size": 2560,
            "intermediate_size": 18432,
            "max_position_embeddings": 65536,
            "mlp_bias": False,
            "num_attention_heads": 20,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 20.0,
                "mscale": 1.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128004,
        },
        ("gguf",),
        {"activation": "relu2", "rope": "yarn"},
    ),
    "kyutai/helium-1-2b": (
        {
            "model_type": "helium",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "mlp_bias": False,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-8,
            "rope_theta": 20000.0,
            "tie_word_embeddings": False,
            "vocab_size": 64000,
        },
        ("gguf", "mlx"),
        {"epsilon": 1e-8, "theta": 2e4},
    ),
}
PUBLISHED |= published_fused.PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(name: str) -> None:
    config, formats, told = PUBLISHED[name]
    spec = spec_for(config)
    tied = config.get("tie_word_embeddings", True)
    settled = spec.settle(normalise(config, [] if tied else ["lm_head.weight"]))
    taken = [kind for kind in ("gguf", "mlx") if not spec.objections(settled, kind)]
    assert taken == list(formats)
    shape = shape_of(settled)
    rope = shape.ropes[0] or Rope()
    found = {**vars(rope), **vars(shape.wiring), **vars(shape.factors), **vars(shape)}
    found["rope"] = rope.type
    assert {key: found[key] for key in told} == pytest.approx(told)


#: What a config may hold where it makes no sense.
NONSENSE: tuple[Any, ...] = (None, "x", -1, 0, 3.5, True, [], {}, 1 << 40, ...)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_nonsense_end_in_one_error(name: str) -> None:
    """Whatever one key holds, the config is taken or refused; ``...`` is a key left out."""
    config = PUBLISHED[name][0]
    extra = ("rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "seq_length")
    refused = 0
    for key, value in itertools.product({*config, *extra} - {"model_type"}, NONSENSE):
        changed = {k: v for k, v in (config | {key: value}).items() if v is not ...}
        try:
            spec = spec_for(changed)
            settled = spec.settle(normalise(changed, []))
            if not spec.objections(settled, "gguf"):
                spec.gguf_metadata(settled)
            if not spec.objections(settled, "mlx"):
                spec.mlx_config(settled)
            shape_of(settled)
        except MlxedgeError:
            refused += 1
    assert refused > 20
