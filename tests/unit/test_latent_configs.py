"""Published configs of models with latent attention: what they mean, and who computes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import normalise, spec_for, spec_for_gguf
from mlxedge.models.shape import Shape, shape_of

_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_YARN = {
    **{"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40},
    "original_max_position_embeddings": 4096,
}
_DEEPSEEK: dict[str, Any] = {
    **_MLA,
    **{"aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu", "moe_layer_freq": 1},
    **{"attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 10000, "seq_aux": True},
    **{"tie_word_embeddings": False, "max_position_embeddings": 163840},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        **_DEEPSEEK,
        **{"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944},
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16},
        **{"q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax"},
        **{"norm_topk_prob": False, "routed_scaling_factor": 1.0, "vocab_size": 102400},
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V2": {
        **_DEEPSEEK,
        **{"model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12288},
        **{"num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128},
        **{"q_lora_rank": 1536, "n_routed_experts": 160, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "moe_intermediate_size": 1536, "first_k_dense_replace": 1},
        **{"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
        **{"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0},
        **{"vocab_size": 102400, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    },
    "DeepSeek-V3": {
        **_DEEPSEEK,
        **{"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432},
        **{"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
        **{"q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3},
        **{"n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "vocab_size": 129280},
        **{"num_nextn_predict_layers": 1},
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Moonlight-16B-A3B": {
        **_DEEPSEEK,
        **{"model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264},
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16},
        **{"q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.446, "vocab_size": 163840},
        **{"rms_norm_eps": 1e-5, "rope_theta": 50000.0, "max_position_embeddings": 8192},
    },
    "Kimi-K2-Instruct": {
        **_DEEPSEEK,
        **{"model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432},
        **{"num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64},
        **{"q_lora_rank": 1536, "n_routed_experts": 384, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.827, "vocab_size": 163840},
        **{"rope_theta": 50000.0, "max_position_embeddings": 131072, "num_nextn_predict_layers": 0},
        "rope_scaling": {
            **_YARN,
            **{"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
            **{"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    },
    "GLM-4.7-Flash": {
        **{"model_type": "glm4_moe_lite", "hidden_size": 2048, "intermediate_size": 10240},
        **{"num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20},
        **{"q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192},
        **{"qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 64},
        **{"n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 1536},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 1.8, "num_nextn_predict_layers": 1},
        **{"partial_rotary_factor": 1.0, "rms_norm_eps": 1e-5, "rope_scaling": None},
        **{"rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 154880},
        **{"max_position_embeddings": 202752, "hidden_act": "silu", "attention_bias": False},
    },
    "MiniCPM3-4B": {
        **{"model_type": "minicpm3", "hidden_size": 2560, "intermediate_size": 6400},
        **{"num_hidden_layers": 62, "num_attention_heads": 40, "num_key_value_heads": 40},
        **{"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64},
        **{"qk_rope_head_dim": 32, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "vocab_size": 73448},
        "rope_scaling": {
            **{"type": "longrope", "original_max_position_embeddings": 32768},
            **{"long_factor": [1.1] * 16, "short_factor": [1.1] * 16},
        },
    },
}
#: What llama.cpp's graph has not, by the models that have it.
REFUSED = {
    "DeepSeek-V2": "llama.cpp chooses groups of experts by their two best",
    "Kimi-K2-Instruct": "llama.cpp reads no beta_fast and beta_slow of yarn for deepseek2",
}


def settled(name: str, **changes: Any) -> dict[str, Any]:
    config = CONFIGS[name] | changes
    head = [] if name.startswith("MiniCPM3") else ["lm_head.weight"]
    return spec_for(config).settle(normalise(config, head))


def shape(name: str) -> Shape:
    return shape_of(settled(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models_are_computed_by_both_runtimes(name: str) -> None:
    config = settled(name)
    spec = spec_for(config)
    found = spec.objections(config, "gguf")
    assert [REFUSED[name] in said for said in found] == [True] * (name in REFUSED)
    assert not spec.objections(config, "mlx")
    assert spec.mlx_config(config)["rope_theta"] == config.get("rope_theta", 1e4)


def test_the_sizes_of_heads_and_latents() -> None:
    deepseek = shape("DeepSeek-V3").mixing["mla"]
    assert (deepseek.q_rank, deepseek.kv_rank, deepseek.value) == (1536, 512, 128)
    assert (deepseek.plain, deepseek.turned, deepseek.neighbours) == (128, 64, True)
    minicpm = shape("MiniCPM3-4B").mixing["mla"]
    assert (minicpm.value, minicpm.key, minicpm.neighbours) == (64, 96, False)
    assert shape("DeepSeek-V2-Lite").mixing["mla"].q_rank is None


def test_yarn_scales_scores_and_not_rotations() -> None:
    """0.1 · 0.707 · ln 40 + 1, squared, as DeepSeek-V2-Lite's own code computes it."""
    lite = shape("DeepSeek-V2-Lite")
    assert lite.mixing["mla"].scale == pytest.approx(192**-0.5 * 1.2608037**2, rel=1e-6)
    assert lite.ropes[0] is not None
    assert lite.ropes[0].attention_factor == 1.0
    written = spec_for(CONFIGS["DeepSeek-V2-Lite"]).gguf_metadata(settled("DeepSeek-V2-Lite"))
    multiplier = written["deepseek2.rope.scaling.yarn_log_multiplier"]
    assert multiplier.value == pytest.approx(0.0707)


def test_experts_are_chosen_from_groups() -> None:
    experts = shape("DeepSeek-V2").experts
    assert experts is not None
    assert (experts.groups, experts.top_groups, experts.group_best) == (8, 3, 1)
    assert (experts.score, experts.normalise, experts.scale) == ("softmax", False, 16.0)
    experts = shape("DeepSeek-V3").experts
    assert experts is not None
    assert (experts.groups, experts.top_groups, experts.group_best) == (8, 4, 2)
    assert (experts.score, experts.normalise, experts.bias) == ("sigmoid", True, True)
    assert min(experts.layers) == 3


def test_kimi_k2_is_deepseek_v3_under_another_name() -> None:
    kimi = settled("Kimi-K2-Instruct")
    same = settled("Kimi-K2-Instruct", model_type="deepseek_v3")
    assert kimi["model_type"] == "deepseek_v3"
    assert "auto_map" not in kimi
    assert shape_of(kimi) == shape_of(same)


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "DeepSeek-V3", "GLM-4.7-Flash"])
def test_gguf_files_are_read_as_what_they_are(name: str) -> None:
    config = settled(name)
    spec = spec_for(config)
    metadata = spec.gguf_metadata(config)
    found = spec_for_gguf("deepseek2", metadata)
    assert found.model_type == spec.model_type
    back = found.config_from_gguf(metadata, {})
    back = found.settle(normalise(back, ["lm_head.weight"]))
    one, other = (shape_of(c).mixing["mla"] for c in (back, config))
    assert replace(one, scale=0.0) == replace(other, scale=0.0)
    assert one.scale == pytest.approx(other.scale, rel=1e-6)
    assert found.expected(back) == spec.expected(config)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq is not supported"),
        ("DeepSeek-V3", {"n_group": 7}, "cannot be chosen from 4 of 7 groups"),
        ("DeepSeek-V3", {"n_group": 256, "topk_group": 64}, "have no 2 best"),
        ("DeepSeek-V3", {"kv_lora_rank": "512"}, r"kv_lora_rank \('512'\)"),
        ("DeepSeek-V3", {"q_lora_rank": 0}, r"q_lora_rank \('0'\)"),
        ("DeepSeek-V3", {"n_shared_experts": 0}, "whole numbers for n_shared_experts"),
        ("DeepSeek-V3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ("DeepSeek-V3", {"qk_rope_head_dim": 63}, r"head_dim \(63\) is odd"),
        ("DeepSeek-V3", {"num_key_value_heads": 64}, "as many heads of keys as of queries"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("DeepSeek-V2", {"scoring_func": "sigmoid"}, "scores by softmax alone"),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["dense"]}, "not a list of all layers"),
        ("MiniCPM3-4B", {"scale_depth": "deep"}, "positive numbers for scale_depth"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        settled(name, **changes)


@pytest.mark.parametrize(
    ("layers", "rank", "refused"), [(27, 1536, True), (27, None, False), (12, None, False)]
)
def test_llama_cpp_knows_queries_without_latents_by_layers(
    layers: int, rank: int | None, refused: bool
) -> None:
    config = settled("DeepSeek-V2-Lite", num_hidden_layers=layers, q_lora_rank=rank)
    spec = spec_for(config)
    assert bool(spec.objections(config, "gguf")) == refused
    written = spec.gguf_metadata(config).get("deepseek2.attention.q_lora_rank")
    assert (written and written.value) == {(27, 1536): 1536, (12, None): 0}.get((layers, rank))
