"""What architectures with multi-head latent attention (``mixers.mla``) share: names, metadata,
configs.

GGUF's names and keys are those of ``DeepseekV2Model`` in llama.cpp's conversion/deepseek.py. Its
graph takes the two halves of ``kv_b_proj`` apart, that of the keys transposed, so that it can do
with one head of latents in its cache; files of older converters have the matrix as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models.recasts import Each, Recast, Split, Stack, Transpose, World, interleaved
from mlxedge.models.rope import Rope, mscale_of, rope_settings
from mlxedge.models.rope_files import Get, both_styles, rope_values, shortest
from mlxedge.models.spec import Config, Name

if TYPE_CHECKING:
    import numpy as np

_ATTENTION = "model.layers.{i}.self_attn."
_REPLACED = tuple(f"{_ATTENTION}{part}_proj." for part in "qkvo")
_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MULTIPLIER = "rope.scaling.yarn_log_multiplier"


def latent_names(others: Sequence[Name], *, biases: bool = True) -> tuple[Name, ...]:
    """The tensors of a decoder with latent attention instead of q, k and v, in the words of
    ``mixers.mla``. ``biases``: of what sees or feeds the stream, as ``attention_bias`` says."""
    rows = [
        ("q_proj", "attn_q", "query", "hidden", _whole),
        ("q_a_proj", "attn_q_a", "query_rank", "hidden", _ranked),
        ("q_b_proj", "attn_q_b", "query", "query_rank", _ranked),
        ("kv_a_proj_with_mqa", "attn_kv_a_mqa", "latent_rotary", "hidden", _always),
        ("kv_b_proj", "attn_kv_b", "keys_values", "latent", _always),
        ("o_proj", "attn_output", "hidden", "mixed", _always),
    ]
    norms = [
        ("q_a_layernorm", "attn_q_a_norm", "query_rank", _ranked),
        ("kv_a_layernorm", "attn_kv_a_norm", "latent", _always),
    ]
    found = [
        Name(f"{_ATTENTION}{hf}.weight", f"blk.{{i}}.{gguf}.weight", (out, cols), present=present)
        for hf, gguf, out, cols, present in rows
    ]
    found += [
        Name(f"{_ATTENTION}{hf}.weight", f"blk.{{i}}.{gguf}.weight", (size,), present=present)
        for hf, gguf, size, present in norms
    ]
    biased = {"q_a_proj": _biased_query, "kv_a_proj_with_mqa": _biased, "o_proj": _biased}
    found += [
        Name(f"{_ATTENTION}{hf}.bias", f"blk.{{i}}.{gguf}.bias", (out,), present=biased[hf])
        for hf, gguf, out, *_ in rows
        if biases and hf in biased
    ]
    return (*(name for name in others if not name.hf.startswith(_REPLACED)), *found)


def _always(config: Config) -> bool:
    return True


def _ranked(config: Config) -> bool:
    return config["q_lora_rank"] is not None


def _whole(config: Config) -> bool:
    return config["q_lora_rank"] is None


def _biased(config: Config) -> bool:
    return bool(config.get("attention_bias"))


def _biased_query(config: Config) -> bool:
    return _biased(config) and _ranked(config)


def everywhere(config: Config) -> tuple[str, ...]:
    """The mixer of each layer."""
    return ("mla",) * int(config["num_hidden_layers"])


def split(world: World, keys: str, values: str) -> Recast:
    """``kv_b_proj`` as ``world`` has it: by head the keys' rows transposed, and the values'."""
    return Recast(
        world,
        (f"{_ATTENTION}kv_b_proj.weight",),
        (keys, values),
        (
            Split(_keys_and_values, _heads_apart),
            Each(((Stack(_heads), Transpose()), (Stack(_heads),))),
        ),
    )


def _heads(config: Config) -> int:
    return int(config["num_attention_heads"])


def _keys_and_values(config: Config) -> tuple[int, int]:
    heads = _heads(config)
    return heads * config["qk_nope_head_dim"], heads * config["v_head_dim"]


def _heads_apart(config: Config, sizes: Sequence[int]) -> np.ndarray:
    return interleaved(_heads(config), sizes)


def adopt(config: Config, defaults: Config) -> Config:
    """With ``defaults`` for sizes that a config leaves out; a ``q_lora_rank`` of null is none. What
    a head rotates is what ``head_dim`` means elsewhere."""
    config = defaults | config
    config |= {key: defaults[key] for key in _SIZES if config[key] is None and key in defaults}
    return config | {
        "head_dim": config["qk_rope_head_dim"],
        "num_key_value_heads": config.get("num_key_value_heads")
        or config.get("num_attention_heads"),
    }


def check_sizes(config: Config) -> None:
    """Raise UnsupportedModelError where they make no sense."""
    keys = [*_SIZES, *(["q_lora_rank"] if config["q_lora_rank"] is not None else [])]
    wrong = [k for k in keys if type(config.get(k)) is not int or not 0 < config[k] < 1 << 24]
    if wrong:
        given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
        raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")
    if rope_settings(config).fraction != 1.0:
        raise UnsupportedModelError(
            "latent attention rotates all of qk_rope_head_dim: partial_rotary_factor must be 1"
        )
    heads = config["num_attention_heads"]
    if config["num_key_value_heads"] != heads:
        raise UnsupportedModelError(
            f"latent attention has as many heads of keys as of queries ({heads}), and "
            f"num_key_value_heads is {config['num_key_value_heads']}"
        )


def deepseek2_metadata(config: Config) -> gv.Metadata:
    """Of llama.cpp's deepseek2, where all heads share one of latents; without the architecture."""
    latent, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    values = {
        "attention.head_count_kv": gv.u32(1),
        "attention.kv_lora_rank": gv.u32(latent),
        "attention.key_length": gv.u32(latent + turned),
        "attention.value_length": gv.u32(latent),
        "attention.key_length_mla": gv.u32(config["qk_nope_head_dim"] + turned),
        "attention.value_length_mla": gv.u32(config["v_head_dim"]),
    }
    if config["q_lora_rank"] is not None or not is_lite(config):
        # What is read there of all but the lite ones; 0 is for queries without a latent.
        values["attention.q_lora_rank"] = gv.u32(config["q_lora_rank"] or 0)
    if share := rope_settings(config).mscale_all_dim:
        values[_MULTIPLIER] = gv.f32(0.1 * share)
    return values


def is_lite(config: Config) -> bool:
    """Whether llama.cpp takes it for one of those whose queries have no latent: by these."""
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    return layers in (26, 27) or (layers, vocab) == (48, 128256)


def sizes_from_gguf(config: Config, get: Get) -> Config:
    """The keys of latent attention, of GGUF files of newer and of older converters."""
    latent = get("attention.kv_lora_rank")
    turned = get("rope.dimension_count")
    key = get("attention.key_length_mla") or get("attention.key_length")
    value = get("attention.value_length_mla") or get("attention.value_length")
    if not all(type(size) is int and size > 0 for size in (latent, turned, key, value)):
        raise UnsupportedModelError("the GGUF metadata lacks sizes of latent attention")
    return config | {
        "q_lora_rank": get("attention.q_lora_rank") or None,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": key - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": value,
        "head_dim": turned,
        "num_key_value_heads": config["num_attention_heads"],
    }


def yarn_from_gguf(config: Config, get: Get) -> Config:
    """With how much yarn scales scores: llama.cpp takes both of its scales as equal."""
    share, rope = get(_MULTIPLIER), config["rope_parameters"]
    if not share or rope["rope_type"] != "yarn":
        return config
    scale = shortest(float(share) / 0.1)
    return config | both_styles(rope | {"mscale": scale, "mscale_all_dim": scale})


def told(rope: Rope) -> dict[str, Any]:
    """``rope_parameters`` with yarn's scales, for readers of either style."""
    values = rope_values(rope)
    if rope.type != "yarn":
        return values
    values |= {"mscale": mscale_of(rope), "mscale_all_dim": rope.mscale_all_dim}
    if not (values["mscale"] and values["mscale_all_dim"]):
        values["attention_factor"] = rope.attention_factor
    return values


def yarn_objections(config: Config) -> list[str]:
    """Where llama.cpp's deepseek2 would scale scores otherwise: it takes all scaling for yarn with
    both of its scales equal."""
    rope = rope_settings(config)
    if rope.type == "default" or rope.factor <= 1:
        return []
    if rope.type == "linear":
        return ["llama.cpp's deepseek2 has no linear rope scaling"]
    if rope.type != "yarn" or (rope.mscale_all_dim and abs(rope.attention_factor - 1) < 1e-6):
        return []
    return ["llama.cpp's deepseek2 has yarn with mscale equal to mscale_all_dim"]


def epsilon_notes(config: Config, runtimes: Sequence[str], runtime: str) -> list[str]:
    """A note where a runtime takes one epsilon for all norms."""
    given = config["rms_norm_eps"]
    if given == 1e-6 or runtime not in runtimes:
        return []
    return [
        f"the runtime norms the latents of attention with an epsilon of {given:g} like all else, "
        "the model with 1e-06: a difference in the last digits"
    ]


#: As llama.cpp's deepseek2 has it, and as mlx-lm's deepseek_v3 has it.
SPLIT_GGUF = split("gguf", "blk.{i}.attn_k_b.weight", "blk.{i}.attn_v_b.weight")
SPLIT_MLX = split("mlx", f"{_ATTENTION}embed_q.weight", f"{_ATTENTION}unembed_out.weight")
