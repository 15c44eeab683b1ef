"""gemma4_text: gemma3 with heads of other sizes in the layers that attend to everything, a norm of
values, a factor after each block, and norms that are stored as they are.

The small ones (E2B, E4B) have inputs of each layer's own (``per_layer``), and last layers that
attend to keys and values of earlier ones; the large ones no matrix of values where they attend to
everything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container
from dataclasses import replace
from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import beside, per_layer
from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.experts import Experts
from mlxedge.models.gemma2 import WIRING as GEMMA2
from mlxedge.models.names import names
from mlxedge.models.rope import PROPORTIONAL, Rope, rope_settings
from mlxedge.models.rope_files import shortest
from mlxedge.models.sharing import donors, own_layers, sharing_objections, unused
from mlxedge.models.spec import Config, Name
from mlxedge.models.windows import FULL, SLIDING, windows_by_type
from mlxedge.models.wiring import Factors, Heads

WIRING = replace(GEMMA2, unit_norm=False, head_norm="head", value_norm=True, layer_scalar=True)

_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_OLD = ("rope_theta", "rope_scaling", "partial_rotary_factor")
#: The keys of layers that attend to everything, and of ``per_layer_config`` the same.
_GLOBAL = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}


def _settle(config: Config) -> Config:
    """With all keys spelled out, and sizes of layers in the older style."""
    types = [*(config.get("layer_types") or [])]
    types = types or [FULL if i % 6 == 5 else SLIDING for i in range(config["num_hidden_layers"])]
    types[-1] = FULL  # as transformers has it, whatever the config says
    if set(types) - {SLIDING, FULL}:
        raise UnsupportedModelError("gemma4_text has layers of other types than it knows")
    config = {
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "final_logit_softcapping": None,
        "enable_moe_block": False,
        **config,
        "layer_types": types,
    }
    if "per_layer_config" in config:
        config |= _by_layer(config.pop("per_layer_config"), config)
    config |= _whole(config)
    given = config.get("rope_parameters") or {}
    ropes = {kind: {**own, **(given.get(kind) or {})} for kind, own in _ROPES.items()}
    for own in ropes.values():
        if own["rope_type"] == "default":
            own.pop("partial_rotary_factor", None)  # transformers turns all of a head
    if ropes[FULL]["rope_type"] == "default":
        ropes[FULL] |= {"rope_type": PROPORTIONAL, "partial_rotary_factor": 1.0}
    config = {k: v for k, v in config.items() if k not in _OLD}
    config["rope_parameters"] = ropes
    if config["enable_moe_block"]:
        config["num_experts_per_tok"] = config.get("top_k_experts")
    if config["vocab_size_per_layer_input"] != config["vocab_size"]:
        if config["hidden_size_per_layer_input"]:
            raise UnsupportedModelError(
                "gemma4_text with another vocabulary for the inputs of layers is not supported"
            )
        config["vocab_size_per_layer_input"] = config["vocab_size"]
    donors(config)
    return config


def _by_layer(given: Any, config: Config) -> Config:
    """What transformers 5 keeps of single layers under ``per_layer_config``, as the keys that stand
    for all layers of a type."""
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == FULL]
    if not given:
        return {"global_head_dim": config["head_dim"], "num_global_key_value_heads": None}
    found = {int(layer): own for layer, own in given.items() if own} if _numbered(given) else {}
    known = {"head_dim", "num_key_value_heads"}
    same = bool(found) and sorted(found) == full and not set(found[full[0]]) - known
    if not same or any(own != found[full[0]] for own in found.values()):
        raise UnsupportedModelError("gemma4_text with this per_layer_config is not supported")
    own = found[full[0]]
    made = {key: own[name] for key, name in _GLOBAL.items() if name in own}
    return {"global_head_dim": config["head_dim"]} | made


def _numbered(given: Any) -> bool:
    return isinstance(given, dict) and all(str(layer).isdigit() for layer in given)


def _whole(config: Config) -> Config:
    """The sizes, checked."""
    config = dict(config)
    config["global_head_dim"] = config["global_head_dim"] or config["head_dim"]
    if not config["attention_k_eq_v"]:
        config["num_global_key_value_heads"] = None
    counts = ("num_kv_shared_layers", "hidden_size_per_layer_input", "global_head_dim")
    sizes = {key: config[key] or 0 for key in counts}
    sizes["num_global_key_value_heads"] = config["num_global_key_value_heads"] or 1
    wrong = [k for k, v in sizes.items() if type(v) is not int or not 0 <= v < 1 << 24]
    if wrong:
        raise UnsupportedModelError(f"the config needs whole numbers for {', '.join(wrong)}")
    if config["head_dim"] % 16 or sizes["global_head_dim"] % 16:
        raise UnsupportedModelError("gemma4_text needs heads of a multiple of 16 dimensions")
    return config | {key: sizes[key] for key in counts}


def _heads(config: Config) -> tuple[Heads, ...]:
    count, kv = config["num_attention_heads"], config["num_key_value_heads"]
    alike = config["attention_k_eq_v"]
    kinds = {
        SLIDING: Heads(count, kv, config["head_dim"]),
        FULL: Heads(
            count, config["num_global_key_value_heads"] or kv, config["global_head_dim"], alike
        ),
    }
    pairs = zip(config["layer_types"], donors(config), strict=True)
    return tuple(replace(kinds[kind], shared_with=donor) for kind, donor in pairs)


def _widths(config: Config) -> tuple[int, ...]:
    """Layers that share keys and values may have MLPs of twice the width."""
    width = config["intermediate_size"]
    shared = 2 * width if config["use_double_wide_mlp"] else width
    return tuple(width if donor is None else shared for donor in donors(config))


def _ropes(config: Config) -> tuple[Rope | None, ...]:
    return tuple(rope_settings(config, kind) for kind in config["layer_types"])


def _factors(config: Config) -> Factors:
    return Factors(
        embedding=math.sqrt(config["hidden_size"]),
        attention=1.0,
        logits_cap=float(config["final_logit_softcapping"] or 0.0),
    )


def _check(config: Config, runtime: str) -> list[str]:
    found = sharing_objections(config, runtime)
    if config.get("attention_bias") or config.get("use_bidirectional_attention") == "all":
        found.append("attention_bias and bidirectional attention are not in the runtimes")
    if rope_settings(config, SLIDING).type != "default":
        found.append("layers with windows have no rope scaling in the runtimes")
    full = rope_settings(config, FULL)
    if full.type != PROPORTIONAL:
        found.append(f"the runtimes have no {full.type} rope scaling for gemma4")
    elif runtime == "mlx" and int(config["global_head_dim"] * full.fraction) % 2:
        found.append("mlx-lm rounds an odd number of rotated dimensions otherwise")
    return found


def _gguf(config: Config) -> gv.Metadata:
    head, sliding = config["head_dim"], rope_settings(config, SLIDING)
    return {
        "attention.key_length_swa": gv.u32(head),
        "attention.value_length_swa": gv.u32(head),
        "attention.shared_kv_layers": gv.u32(config["num_kv_shared_layers"]),
        "embedding_length_per_layer_input": gv.u32(config["hidden_size_per_layer_input"]),
        "rope.dimension_count_swa": gv.u32(head),
        "rope.freq_base_swa": gv.f32(sliding.theta),
        "attention.sliding_window": gv.u32(config["sliding_window"]),
    }


def _mlx(config: Config) -> Config:
    return {
        "rope_parameters": config["rope_parameters"],
        "rope_theta": None,
        "rope_scaling": None,
    }


def _back(config: Config, get: Get) -> Config:
    shared = get("attention.shared_kv_layers", 0)
    full = config.pop("rope_parameters")
    if full["rope_type"] != PROPORTIONAL:
        full = _ROPES[FULL] | {"rope_theta": full["rope_theta"], "partial_rotary_factor": 1.0}
    theta = shortest(get("rope.freq_base_swa", 1e4))
    widths, kv = get("feed_forward_length"), get("attention.head_count_kv")
    made = config | {
        "global_head_dim": config["head_dim"],
        "head_dim": get("attention.key_length_swa", config["head_dim"]),
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": not isinstance(widths, int) and len(set(widths)) > 1,
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "rope_parameters": {
            FULL: full,
            SLIDING: {"rope_type": "default", "rope_theta": theta},
        },
        "tie_word_embeddings": True,
        "enable_moe_block": bool(config.get("num_experts")),
        "top_k_experts": config.get("num_experts_per_tok"),
    }
    if not isinstance(kv, int):
        by_type = dict(zip(config["layer_types"], map(int, kv), strict=True))
        made["num_global_key_value_heads"] = by_type[FULL]
        made["num_key_value_heads"] = by_type.get(SLIDING, by_type[FULL])
    return made


def _by_tensors(config: Config, names: Container[str]) -> Config:
    full = config["layer_types"].index(FULL)
    return config | {"attention_k_eq_v": f"blk.{full}.attn_v.weight" not in names}


def _with_values(config: Config) -> Collection[int]:
    heads = _heads(config)
    return [i for i in own_layers(config) if not heads[i].keys_as_values]


def _name(name: Name) -> Name:
    if name.hf.endswith(("self_attn.k_proj.weight", "self_attn.k_norm.weight")):
        return replace(name, layers=own_layers)
    if name.hf.endswith("self_attn.v_proj.weight"):
        return replace(name, layers=_with_values)
    return name


EXPERTS = Experts(sparse=False, normalise=True, given="enable_moe_block", beside=True)


def _expert_layers(config: Config) -> Collection[int]:
    return EXPERTS.layers(config) if EXPERTS.present(config) else ()


_SCALAR = Name("model.layers.{i}.layer_scalar", "blk.{i}.layer_output_scale.weight", ("one",))

DENSE = Dense(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    arch="gemma4",
    names=(*map(_name, names(WIRING)), *per_layer.NAMES, _SCALAR, *beside.names(_expert_layers)),
    experts=EXPERTS,
    recasts=beside.RECASTS,
    wiring=WIRING,
    factors=_factors,
    heads=_heads,
    widths=_widths,
    per_layer=lambda config: int(config["hidden_size_per_layer_input"]),
    unused=unused,
    by_tensors=_by_tensors,
    fixed={"attention_bias": False},
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262144,
        "max_position_embeddings": 131072,
        "head_dim": 256,
        "sliding_window": 512,
        "tie_word_embeddings": True,
    },
    settles=_settle,
    ropes=_ropes,
    # llama.cpp takes 30 where a file is silent.
    keys=(Key("final_logit_softcapping", "final_logit_softcapping", default=30.0, none=0),),
    gguf=_gguf,
    mlx=_mlx,
    windowed={"gguf", "mlx"},
    windows=windows_by_type,
    check=_check,
    back=_back,
)
SPEC = DENSE.spec()
