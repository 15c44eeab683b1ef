"""bloom: BLOOM and BLOOMZ; ALiBi instead of positions, a norm of the embeddings, q, k and v of each
head in turn in one matrix. mlx-lm does not have the architecture."""

from __future__ import annotations

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.dense import Dense, mirrored, no_ropes
from mlxedge.models.names import names
from mlxedge.models.recasts import heads_apart, joined_qkv
from mlxedge.models.spec import Config
from mlxedge.models.wiring import Factors, Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="gelu_pytorch_tanh", embedding_norm=True)
_MODULES = {
    "model.layers": "transformer.h",
    "model.embed_tokens": "transformer.word_embeddings",
    "model.embed_norm": "transformer.word_embeddings_layernorm",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embed": "hidden_size",
    "seq_length": "max_position_embeddings",
}


def _adopt(config: Config) -> Config:
    config = mirrored(config, _KEYS)
    longest = config["max_position_embeddings"] or 2048
    made = config | {"max_position_embeddings": longest, "seq_length": longest}
    hidden = config["hidden_size"]
    return made | ({"intermediate_size": 4 * hidden} if isinstance(hidden, int) else {})


def _settle(config: Config) -> Config:
    if config.get("apply_residual_connection_post_layernorm"):
        raise UnsupportedModelError(
            "bloom with apply_residual_connection_post_layernorm is not supported"
        )
    return config


SPEC = Dense(
    model_type="bloom",
    architecture="BloomForCausalLM",
    arch="bloom",
    names=names(WIRING, qkv_bias=True, o_bias=True, mlp_bias=True, norm_bias=True, called=_MODULES),
    recasts=(
        *joined_qkv("stored", "transformer.h.{i}.self_attention.query_key_value", heads_apart),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
    ),
    spellings=(
        (r"^(?=(word_embeddings|word_embeddings_layernorm|ln_f|h\.\d+)\.)", "transformer."),
    ),
    lacks=("mlx",),
    wiring=WIRING,
    epsilon="layer_norm_epsilon",
    fixed={},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    adopts=_adopt,
    settles=_settle,
    factors=lambda config: Factors(alibi=8.0),
    ropes=no_ropes,
).spec()
