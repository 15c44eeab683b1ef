"""What a config says of state spaces is checked before anything is computed of it."""

from __future__ import annotations

from typing import Any

import pytest

from mlxedge.errors import UnsupportedModelError
from mlxedge.models import normalise

CONFIG = {
    "model_type": "granitemoehybrid",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "layer_types": ["mamba", "attention"],
    "vocab_size": 10,
}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"mamba_n_heads": 0, "mamba_d_head": "auto"}, "whole numbers for mamba_n_heads"),
        ({"mamba_expand": {}}, "whole numbers for mamba_expand"),
        ({"mamba_d_state": -1}, "whole numbers for mamba_d_state"),
        ({"time_step_limit": [2, 1]}, "time_step_limit is 2 to 1"),
        ({"time_step_limit": ["nan", 1]}, "time_step_limit is nan to 1"),
        ({"time_step_limit": 3}, "not two numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        normalise(CONFIG | given, [])
