"""deepseek_v32: DeepSeek-V3.2; deepseek_v3 with an indexer that picks what attention sees.

The layers that predict further tokens are left out. Here it runs up to a context of ``index_topk``
tokens, within which attention sees everything.
"""

from __future__ import annotations

from dataclasses import replace

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import deepseek_v3, latent
from mlxedge.models.dense import Key
from mlxedge.models.rope import rope_settings
from mlxedge.models.spec import Config, Name

_INDEXER = "model.layers.{i}.self_attn.indexer."
_ROWS = (
    ("wq_b", "attn_q_b", ("index_query", "query_rank")),
    ("wk", "attn_k", ("index", "hidden")),
    ("weights_proj", "proj", ("index_heads", "hidden")),
    ("k_norm", "k_norm", ("index",)),
)
_NAMES = (
    *(Name(f"{_INDEXER}{hf}.weight", f"blk.{{i}}.indexer.{gguf}.weight", shape)
      for hf, gguf, shape in _ROWS),
    Name(f"{_INDEXER}k_norm.bias", "blk.{i}.indexer.k_norm.bias", ("index",)),
)  # fmt: skip
_KEYS = (
    Key("index_n_heads", "attention.indexer.head_count", "u32", 64),
    Key("index_head_dim", "attention.indexer.key_length", "u32", 128),
    Key("index_topk", "attention.indexer.top_k", "u32", 2048),
)


def _settle(config: Config) -> Config:
    wrong = [
        key.config
        for key in _KEYS
        if type(config.get(key.config)) is not int or not 0 < config[key.config] < 1 << 24
    ]
    if wrong:
        raise UnsupportedModelError(f"the config needs positive whole numbers for {wrong[0]}")
    if config["q_lora_rank"] is None:
        raise UnsupportedModelError("deepseek_v32 needs latents of queries (q_lora_rank)")
    return deepseek_v3.with_kinds(deepseek_v3.settle(config))


def _check(config: Config, runtime: str) -> list[str]:
    if runtime == "mlx":
        return deepseek_v3.check(config, runtime)
    found = []
    rope = rope_settings(config)
    if rope.type == "linear" or (rope.type == "yarn" and rope.factor > 1):
        plain = rope.type == "yarn" and rope.mscale_all_dim == 1.0
        if not plain or abs(rope.attention_factor - 1) > 1e-6:
            found.append(
                "llama.cpp's deepseek32 has yarn with mscale and mscale_all_dim of 1 alone"
            )
    if config.get("attention_bias"):
        found.append("llama.cpp's deepseek32 has no attention biases")
    size = config["index_head_dim"]
    if size < 64 or size & (size - 1):
        found.append("llama.cpp's deepseek32 needs an index_head_dim of 64, 128, 256 …")
    return found


def _metadata(config: Config) -> gv.Metadata:
    return deepseek_v3.metadata(config) | {"attention.q_lora_rank": gv.u32(config["q_lora_rank"])}


SPEC = replace(
    deepseek_v3.DENSE,
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    arch="deepseek32",
    names=(*deepseek_v3.DENSE.names, *_NAMES),
    mixers=lambda config: ("indexed_mla",) * int(config["num_hidden_layers"]),
    keys=(*deepseek_v3.DENSE.keys, *_KEYS),
    defaults={
        **deepseek_v3.DENSE.defaults,
        **{"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    },
    gguf=_metadata,
    adopts=lambda config: deepseek_v3.adopt_kinds(latent.adopt(config, deepseek_v3.SIZES)),
    settles=_settle,
    reads=lambda metadata: True,
    check=_check,
    back=lambda config, get: deepseek_v3.with_kinds(deepseek_v3.back(config, get)),
).spec()
