"""Configs of Gemma 3n and 4 as they are on the Hub, within the models that see and hear."""

from __future__ import annotations

from typing import Any

import pytest

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import normalise, spec_for
from mlxedge.models.shape import Shape, shape_of
from mlxedge.models.wiring import Heads

SLIDING, FULL = "sliding_attention", "full_attention"
_ROPES = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _ROPES,
    "tie_word_embeddings": True,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "enable_moe_block": False,
    "attention_bias": False,
}
E2B = GEMMA4 | {
    "attention_k_eq_v": False,
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144,
    "layer_types": [*[SLIDING] * 4, FULL] * 7,
    "num_attention_heads": 8,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "sliding_window": 512,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": True,
}
LARGE = GEMMA4 | {
    "attention_k_eq_v": True,
    "hidden_size": 5376,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 21504,
    "layer_types": [*[SLIDING] * 5, FULL] * 10,
    "num_attention_heads": 32,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 60,
    "num_key_value_heads": 16,
    "num_kv_shared_layers": 0,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
}
EXPERTS = LARGE | {
    "enable_moe_block": True,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "layer_types": [*[SLIDING] * 5, FULL] * 5,
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "top_k_experts": 8,
}
GEMMA3N: dict[str, Any] = {
    "model_type": "gemma3n_text",
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": [16384] * 35,
    "laurel_rank": 64,
    "layer_types": [*[SLIDING] * 4, FULL] * 7,
    "max_position_embeddings": 32768,
    "num_attention_heads": 8,
    "num_hidden_layers": 35,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 15,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
}
PUBLISHED = {"E2B": E2B, "31B": LARGE, "26B-A4B": EXPERTS, "3n-E4B": GEMMA3N}


def settled(config: dict[str, Any]) -> dict[str, Any]:
    return spec_for(config).settle(normalise(config, []))


def shape(config: dict[str, Any]) -> Shape:
    return shape_of(settled(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_runtimes_know_what_is_published(name: str) -> None:
    config = settled(PUBLISHED[name])
    spec = spec_for(config)
    assert [spec.objections(config, kind) for kind in ("gguf", "mlx")] == [[], []]
    assert spec.expected(config)["model.embed_tokens.weight"] == (
        config["vocab_size"],
        config["hidden_size"],
    )


def test_sizes_differ_by_layer() -> None:
    small, large, experts, older = (shape(config) for config in PUBLISHED.values())
    assert small.attention[13:16] == (
        Heads(8, 1, 256),
        Heads(8, 1, 512),
        Heads(8, 1, 256, shared_with=13),
    )
    assert small.attention[-1] == Heads(8, 1, 512, shared_with=14)
    assert small.widths == (6144,) * 15 + (12288,) * 20
    assert large.attention[4:6] == (Heads(32, 16, 256), Heads(32, 4, 512, keys_as_values=True))
    assert (experts.experts is not None, large.experts) == (True, None)
    assert older.attention[19:21] == (Heads(8, 2, 256), Heads(8, 2, 256, shared_with=18))
    assert [older.sparsity[i] for i in (9, 10)] == [0.95, 0.0]


def test_the_stream_carries_what_later_layers_need() -> None:
    small, large, _, older = (shape(config) for config in PUBLISHED.values())
    assert large.stream == large.hidden
    assert small.stream == 1536 + 35 * 256 + 2 * 256 + 2 * 512
    assert older.stream == 4 * 2048 + 35 * 256 + 2 * 2 * 512


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (E2B, {"num_kv_shared_layers": 33}, "leaves no layer of each type"),
        (E2B, {"num_kv_shared_layers": -1}, "whole numbers for num_kv_shared_layers"),
        (E2B, {"global_head_dim": 40}, "heads of a multiple of 16"),
        (E2B, {"layer_types": ["chunked_attention"] * 35}, "layers of other types"),
        (E2B, {"vocab_size_per_layer_input": 1000}, "another vocabulary for the inputs"),
        (E2B, {"per_layer_config": {"0": {"head_dim": 64}}}, "this per_layer_config"),
        (E2B, {"per_layer_config": ["x"]}, "this per_layer_config"),
        (EXPERTS, {"top_k_experts": 200}, r"num_experts_per_tok \(200\) exceeds"),
        (GEMMA3N, {"altup_num_inputs": 3}, "other than four streams"),
        (GEMMA3N, {"intermediate_size": [1, 2] * 17 + [3]}, "MLPs of several widths"),
        (GEMMA3N, {"activation_sparsity_pattern": [0.5]}, "not a part below one for each layer"),
        (GEMMA3N, {"laurel_rank": "64"}, "whole numbers for laurel_rank"),
    ],
)
def test_configs_that_make_no_sense(
    base: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        settled(base | change)
