"""Names, metadata and configs: each way there and back."""

from typing import Any

import numpy as np
import pytest
from oracles.checkpoints import OWN, SIZES

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import (
    known_model_types,
    normalise,
    rope_row_order,
    rope_row_order_to_gguf,
    spec_for,
    spec_for_gguf,
)
from mlxedge.models.rope import inverse_frequencies, rope_settings
from mlxedge.models.rope_files import llama3_from_factors

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        **changes,
    }


def test_both_config_styles_mean_the_same() -> None:
    old = config(rope_scaling=LLAMA3)
    new = config(rope_parameters={**LLAMA3, "rope_theta": 50000.0})
    del new["rope_theta"]
    assert rope_settings(old) == rope_settings(new)
    spec = spec_for(old)
    made = [spec.mlx_config(normalise(c, ["lm_head.weight"])) for c in (old, new)]
    assert made[0] == made[1]
    assert made[0]["rope_theta"] == 50000.0
    assert made[0]["rope_scaling"] == LLAMA3


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", [None, LINEAR, YARN], ids=["default", "linear", "yarn"])
def test_metadata_round_trip(model_type: str, scaling: dict[str, Any] | None) -> None:
    before = normalise(config(model_type, rope_scaling=scaling), ["lm_head.weight"])
    spec = spec_for(before)
    after = spec.config_from_gguf(spec.gguf_metadata(before), spec.gguf_extra(before))
    assert rope_settings(after) == rope_settings(before)
    same = (set(before) & set(after)) - {"rope_scaling"}
    assert {k: after[k] for k in same} == {k: before[k] for k in same}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "settings",
    [LLAMA3, {**LLAMA3, "factor": 32.0}, {**LLAMA3, "high_freq_factor": 6.0}],
    ids=["factor8", "factor32", "high6"],
)
def test_llama3_settings_come_back_from_the_factors(
    head_dim: int, settings: dict[str, Any]
) -> None:
    before = normalise(
        config(rope_theta=500000.0, rope_scaling=settings, head_dim=head_dim), ["lm_head.weight"]
    )
    factors = spec_for(before).gguf_extra(before)["rope_freqs.weight"]
    after = llama3_from_factors(factors, 500000.0, head_dim)
    np.testing.assert_allclose(
        inverse_frequencies(
            rope_settings({"rope_theta": 500000.0, "rope_scaling": after}), head_dim
        ),
        inverse_frequencies(rope_settings(before), head_dim),
        rtol=2e-3,
    )


def test_factors_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not llama3"):
        llama3_from_factors(np.linspace(1, 3, 32, dtype=np.float32), 10000.0, 64)


@pytest.mark.parametrize("model_type", known_model_types())
def test_names_round_trip(model_type: str) -> None:
    spec = spec_for({"model_type": model_type})
    for name in spec.names:
        hf = name.hf.format(i=11)
        gguf, rows = spec.to_gguf(hf) or ("", "")
        recasts = (recast for recast in spec.recasts if recast.world == "gguf")
        if any(recast.layer_of(gguf, recast.other) is not None for recast in recasts):
            hf = gguf  # until it is recast
        assert spec.from_gguf(gguf) == (hf, rows)
    assert spec.to_gguf("model.layers.0.unknown.weight") is None


def test_gguf_names_are_llama_cpps() -> None:
    import gguf

    arch_of = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
    for model_type, arch in arch_of.items():
        mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], 4)
        for name in spec_for({"model_type": model_type}).names:
            hf, ours = name.hf.format(i=3), name.gguf.format(i=3)
            assert mapping.get_name(hf, try_suffixes=(".weight", ".bias")) == ours


def test_row_orders_undo_each_other() -> None:
    there, back = rope_row_order_to_gguf(24, 3), rope_row_order(24, 3)
    np.testing.assert_array_equal(np.arange(24)[there][back], np.arange(24))
    # One head of 8 rows: halves become neighbours.
    np.testing.assert_array_equal(rope_row_order_to_gguf(8, 1), [0, 4, 1, 5, 2, 6, 3, 7])


def test_unknown_architectures_say_what_is_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"known: .*llama, .*mistral, .*qwen3"):
        spec_for({"model_type": "brontosaurus"})
    with pytest.raises(UnsupportedModelError, match="never run"):
        spec_for({"model_type": "x", "auto_map": {"AutoModel": "modeling_x.X"}})
    with pytest.raises(UnsupportedModelError, match=r"known: .*llama, .*qwen2, .*qwen3"):
        spec_for_gguf("brontosaurus", {})
    # A module of the package that is no architecture must not pass for one.
    with pytest.raises(UnsupportedModelError):
        spec_for({"model_type": "rope"})


@pytest.mark.parametrize(
    ("changes", "runtime", "reason"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "gguf", "dynamic"),
        ({"hidden_act": "gelu"}, "mlx", "gelu"),
        ({"model_type": "qwen2", "rope_scaling": LLAMA3}, "gguf", "llama3"),
        ({"model_type": "qwen2", "head_dim": 32}, "gguf", "hidden size"),
        ({"model_type": "qwen3", "attention_bias": True}, "mlx", "biases"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.7}}, "mlx", "attention_factor"),
        ({"partial_rotary_factor": 0.5}, "gguf", "partial"),
    ],
)
def test_what_a_runtime_cannot_compute_is_said(
    changes: dict[str, Any], runtime: str, reason: str
) -> None:
    made = normalise(config(**changes), ["lm_head.weight"])
    assert reason in "; ".join(spec_for(made).objections(made, runtime))


def test_a_plain_model_meets_no_objection() -> None:
    for model_type in known_model_types():
        spec = spec_for({"model_type": model_type})
        own = OWN.get(model_type, {})
        made = spec.settle(
            normalise(
                config(model_type, **SIZES | {"num_hidden_layers": 6} | own), ["lm_head.weight"]
            )
        )
        for runtime in ("gguf", "mlx"):
            assert bool(spec.objections(made, runtime)) == (runtime in spec.lacks)


def test_normalise_spells_out_defaults() -> None:
    made = normalise(config(), ["model.embed_tokens.weight"])
    assert (made["head_dim"], made["tie_word_embeddings"]) == (64, True)
    assert normalise(config(), ["lm_head.weight"])["tie_word_embeddings"] is False
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        normalise({"model_type": "llama"}, [])
