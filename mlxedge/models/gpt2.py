"""gpt2: GPT-2 and DistilGPT-2; learned positions, LayerNorm, an MLP of two matrices.

transformers keeps the matrices of its blocks transposed, q, k and v in one of them. Files on the
Hub leave out that all is in a ``transformer``, and hold the masks of attention.
"""

from __future__ import annotations

from mlxedge.models.dense import GELUS, GPT2_KEYS, Dense, mirrored, no_ropes
from mlxedge.models.names import names
from mlxedge.models.recasts import Recast, Transpose, joined_qkv
from mlxedge.models.spec import Config
from mlxedge.models.wiring import NAMES, Factors, Wiring

WIRING = Wiring(layer_norm=True, mlp="plain", activation="gelu_new")
MODULES = {
    "model.layers": "transformer.h",
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
MLX_MODULES = {module: own.replace("transformer.", "model.") for module, own in MODULES.items()}
#: What tells a module of the transformer where its files leave that out.
SPELLINGS = ((r"^(?=(wte|wpe|ln_f|h\.\d+)\.)", "transformer."),)
BUFFERS = (r".*\.attn\.(bias|masked_bias)",)


def adopt(config: Config) -> Config:
    config = mirrored(config, GPT2_KEYS)
    width = config["intermediate_size"]
    if width is None and isinstance(config["hidden_size"], int):
        width = 4 * config["hidden_size"]
    made = {"intermediate_size": width, "n_inner": width, "n_ctx": config["n_positions"]}
    return config | made


def scale_of(config: Config) -> float:
    return float(config["head_dim"] ** -0.5) if config.get("scale_attn_weights", True) else 1.0


def _factors(config: Config) -> Factors:
    scale = scale_of(config)
    if not config.get("scale_attn_by_inverse_layer_idx"):
        return Factors(attention=scale)
    layers = range(1, config["num_hidden_layers"] + 1)
    return Factors(attention=tuple(scale / layer for layer in layers))


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config.get("scale_attn_by_inverse_layer_idx"):
        found.append(f"{NAMES[runtime]} scales attention alike in all layers")
    if not config.get("scale_attn_weights", True):
        found.append(f"{NAMES[runtime]} always scales attention (scale_attn_weights)")
    if runtime == "mlx" and config["intermediate_size"] != 4 * config["hidden_size"]:
        found.append("mlx-lm's gpt2 has an MLP four times as wide as the stream")
    return found


def _transposed() -> tuple[Recast, ...]:
    modules = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return tuple(
        Recast(
            "stored",
            (f"model.layers.{{i}}.{module}.weight",),
            (f"transformer.h.{{i}}.{MODULES[module]}.weight",),
            (Transpose(floats=True),),
        )
        for module in modules
    )


SPEC = Dense(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    arch="gpt2",
    names=names(
        WIRING,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm_bias=True,
        called=MODULES,
        mlx_called=MLX_MODULES,
        learned_positions=True,
    ),
    recasts=(
        *joined_qkv("stored", "transformer.h.{i}.attn.c_attn", transposed=True),
        *_transposed(),
        *joined_qkv("mlx", "model.h.{i}.attn.c_attn"),
        *joined_qkv("gguf", "blk.{i}.attn_qkv"),
    ),
    spellings=SPELLINGS,
    buffers=BUFFERS,
    wiring=WIRING,
    nearly=GELUS,
    epsilon="layer_norm_epsilon",
    fixed={},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    tied={"mlx": True},
    adopts=adopt,
    factors=_factors,
    ropes=no_ropes,
    check=_check,
).spec()
