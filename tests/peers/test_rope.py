"""Rotary settings of every type and in both styles, against transformers' own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.rope import Rope, inverse_frequencies, rope_settings

THETA, HEAD, CONTEXT = 500000.0, 64, 16384
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn, all settings": {
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "yarn, attention factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.5,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, values = name.partition(",")[0], CASES[name]
    new = {"rope_theta": THETA, "rope_type": kind, **values}
    config = LlamaConfig(
        hidden_size=8 * HEAD,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(new),
    )
    rope = rope_settings(config.to_dict())
    found = inverse_frequencies(rope, HEAD)
    if kind == "default":
        expected, amplitude = THETA ** -(np.arange(0, HEAD, 2) / HEAD), 1.0
    else:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, None)
        expected = frequencies.double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(amplitude)
    # The older style says the same, with either name of the type.
    for key in ("type", "rope_type"):
        old = {"rope_theta": THETA, "rope_scaling": {key: kind, **values}}
        assert rope_settings(old | {"max_position_embeddings": CONTEXT}) == rope


def test_defaults() -> None:
    assert rope_settings({}) == Rope(theta=10000.0)
    assert rope_settings({"rope_scaling": None, "rope_theta": 1e6}) == Rope(theta=1e6)


def test_a_fraction_of_each_head_may_turn() -> None:
    rope = rope_settings({"partial_rotary_factor": 0.25})
    assert rope.dims(64) == 16
    assert inverse_frequencies(rope, 64).shape == (8,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "mystery", "factor": 2.0}}, "'mystery' is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "original_max_position"),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by layer"),
    ],
)
def test_what_cannot_be_computed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        rope_settings(config)
