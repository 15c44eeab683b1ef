"""baichuan: Baichuan and Baichuan 2, 7B and 13B; llama's graph with q, k and v in one matrix.
transformers has it by its own remote code alone, and mlx-lm does not have it.

The models of 40 layers tell positions by ALiBi, the others rotate. The head of Baichuan 2 has rows
of length one, whatever its files hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxedge import gguf_values as gv
from mlxedge.models.dense import Dense, no_ropes, one_rope
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, Values, joined_qkv
from mlxedge.models.rope import Rope
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors

if TYPE_CHECKING:
    import numpy as np

#: By these both their own code and llama.cpp tell them apart.
_ALIBI_LAYERS, _VOCAB_OF_2 = 40, 125696
_HEAD = ("lm_head.weight",)


def _alibi(config: Config) -> bool:
    return bool(config["num_hidden_layers"] == _ALIBI_LAYERS)


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    return no_ropes(config) if _alibi(config) else one_rope(config)


def _adopt(config: Config) -> Config:
    longest = config.get("max_position_embeddings") or config.get("model_max_length")
    return config if longest is None else config | {"max_position_embeddings": longest}


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    made: np.ndarray = rows / np.maximum(lengths, 1e-12)
    return made


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "mlx" or config["num_hidden_layers"] in (32, _ALIBI_LAYERS):
        return []
    return ["llama.cpp's baichuan rotates with 32 layers, and knows 40 beside them"]


SPEC = Dense(
    model_type="baichuan",
    architecture="BaichuanForCausalLM",
    arch="baichuan",
    names=names(rope_rows=True),
    recasts=(
        *joined_qkv("stored", "model.layers.{i}.self_attn.W_pack"),
        Recast(
            "stored",
            _HEAD,
            _HEAD,
            (Values(lambda rows: rows, _of_length_one),),
            when=lambda config: config["vocab_size"] == _VOCAB_OF_2,
        ),
    ),
    lacks=("mlx",),
    fixed={},
    defaults={"max_position_embeddings": 4096, "tie_word_embeddings": False},
    tied={"gguf": False},
    head_dim_free=False,
    adopts=_adopt,
    ropes=_ropes,
    factors=lambda config: Factors(alibi=8.0 if _alibi(config) else 0.0),
    gguf=lambda config: {"tensor_data_layout": gv.string("Meta AI original pth")},
    check=_check,
).spec()
