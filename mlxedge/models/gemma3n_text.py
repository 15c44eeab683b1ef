"""gemma3n_text: heads and norms as in gemma4_text, with four alternating streams (``altup``), a
small residual beside attention, inputs of each layer's own (``per_layer``), gates of which few are
kept, and last layers that attend to keys and values of earlier ones.

mlx-lm knows it only within the model that sees and hears as well; llama.cpp only in the sizes of
the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import altup, per_layer
from mlxedge.models.altup import COUNT, AltUp
from mlxedge.models.dense import Dense, Get, Key
from mlxedge.models.gemma2 import WIRING as GEMMA2
from mlxedge.models.gemma3_text import ropes_by_type, settle_ropes
from mlxedge.models.names import names
from mlxedge.models.recasts import Extend, Join, Recast, Stack
from mlxedge.models.rope import rope_settings
from mlxedge.models.rope_files import shortest
from mlxedge.models.sharing import donors, own_layers, unused
from mlxedge.models.spec import Config, Name, Placeholders
from mlxedge.models.windows import FULL, SLIDING, windows_by_type
from mlxedge.models.wiring import Factors, Heads

WIRING = replace(GEMMA2, unit_norm=False, head_norm="head", value_norm=True, laurel=True)

#: What llama.cpp's graph is written for: these layers keep keys and values, so many are sparse, so
#: much, and these are the widths (``gemma3n.cpp``, ``llama-hparams.h``).
_KEEPING, _SPARSE, _SPARSITY = 20, 10, 0.95
_WIDTHS = {"hidden_size_per_layer_input": 256, "laurel_rank": 64, "altup_active_idx": 0}
_MLX = "model.language_model."


def _adopt(config: Config) -> Config:
    widths = config.get("intermediate_size")
    if isinstance(widths, list):
        if len({str(width) for width in widths}) != 1:
            raise UnsupportedModelError("gemma3n_text with MLPs of several widths is not supported")
        config = config | {"intermediate_size": widths[0]}
    return config


def _settle(config: Config) -> Config:
    config = settle_ropes(config)
    layers = config["num_hidden_layers"]
    sparse = _SPARSE if layers > _SPARSE else 0
    if config.get("activation_sparsity_pattern") is None:
        config["activation_sparsity_pattern"] = [_SPARSITY] * sparse + [0.0] * (layers - sparse)
    pattern = config["activation_sparsity_pattern"]
    whole = isinstance(pattern, list) and len(pattern) == layers
    if not whole or any(type(part) not in (int, float) or not 0 <= part < 1 for part in pattern):
        raise UnsupportedModelError(
            "activation_sparsity_pattern is not a part below one for each layer"
        )
    counts = ("laurel_rank", "hidden_size_per_layer_input", "vocab_size_per_layer_input")
    wrong = [k for k in counts if type(config[k]) is not int or not 0 < config[k] < 1 << 31]
    if type(config["num_kv_shared_layers"]) is not int or config["num_kv_shared_layers"] < 0:
        wrong.append("num_kv_shared_layers")
    if wrong:
        raise UnsupportedModelError(f"the config needs whole numbers for {', '.join(wrong)}")
    if config["altup_num_inputs"] != COUNT or config["altup_active_idx"] not in range(COUNT):
        raise UnsupportedModelError("gemma3n_text with other than four streams is not supported")
    if config["head_dim"] % 16:
        raise UnsupportedModelError("gemma3n_text needs heads of a multiple of 16 dimensions")
    donors(config)
    return config


def _heads(config: Config) -> tuple[Heads, ...]:
    own = Heads(config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])
    return tuple(replace(own, shared_with=donor) for donor in donors(config))


def _factors(config: Config) -> Factors:
    return Factors(
        embedding=math.sqrt(config["hidden_size"]),
        attention=1.0,
        logits_cap=float(config["final_logit_softcapping"] or 0.0),
    )


def _check(config: Config, runtime: str) -> list[str]:
    found = []
    if config.get("attention_bias"):
        found.append("attention_bias is not in the runtimes")
    if any(rope_settings(config, kind).type != "default" for kind in (SLIDING, FULL)):
        found.append("the runtimes have no rope scaling for gemma3n")
    if runtime == "mlx":
        own = config["layer_types"][: len(own_layers(config))]
        if {*own} != {SLIDING, FULL}:
            found.append("mlx-lm needs layers of both types that have keys of their own")
        return found
    layers, own_count = config["num_hidden_layers"], len(own_layers(config))
    types = config["layer_types"][:own_count]
    alike = own_count == min(layers, _KEEPING)
    if not alike or (layers > own_count and types[-2:] != [SLIDING, FULL]):
        found.append(f"llama.cpp's gemma3n shares keys and values from layer {_KEEPING} on only")
    sparse = [_SPARSITY if i < _SPARSE else 0.0 for i in range(layers)]
    if config["activation_sparsity_pattern"] != sparse:
        found.append(f"llama.cpp's gemma3n keeps {_SPARSITY} of gates from {_SPARSE} layers only")
    found += [
        f"llama.cpp's gemma3n has {key} {value} only"
        for key, value in _WIDTHS.items()
        if config[key] != value
    ]
    if not config["altup_correct_scale"] or not config["final_logit_softcapping"]:
        found.append(
            "llama.cpp's gemma3n always scales (altup_correct_scale) and caps "
            "(final_logit_softcapping)"
        )
    return found


def _gguf(config: Config) -> gv.Metadata:
    parts = config["activation_sparsity_pattern"]
    scales = [NormalDist().inv_cdf(part) if part else -math.inf for part in parts]
    return {
        "altup.active_idx": gv.u32(config["altup_active_idx"]),
        "altup.num_inputs": gv.u32(COUNT),
        "embedding_length_per_layer_input": gv.u32(config["hidden_size_per_layer_input"]),
        "attention.shared_kv_layers": gv.u32(config["num_kv_shared_layers"]),
        "activation_sparsity_scale": gv.array("f32", scales),
    }


def _back(config: Config, get: Get) -> Config:
    scales, widths = get("activation_sparsity_scale"), get("feed_forward_length")
    if not isinstance(widths, int) and len({*widths}) != 1:
        raise UnsupportedModelError("gemma3n_text with MLPs of several widths is not supported")
    made = config | {
        "num_kv_shared_layers": get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input", 256),
        "vocab_size_per_layer_input": config["vocab_size"],
        "altup_active_idx": get("altup.active_idx", 0),
        "altup_num_inputs": get("altup.num_inputs", COUNT),
        "altup_correct_scale": True,
        "laurel_rank": _WIDTHS["laurel_rank"],
    }
    if scales is not None:
        made["activation_sparsity_pattern"] = [
            shortest(NormalDist().cdf(float(scale))) for scale in scales
        ]
    return settle_ropes({k: v for k, v in made.items() if k != "rope_parameters"})


#: Of the whole, where mlx-lm or others look for them.
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def _placeholders(config: Config, world: str) -> Placeholders:
    """Both runtimes want matrices for keys and values everywhere."""
    if world == "stored":
        return {}
    kv, head = config["num_key_value_heads"] * config["head_dim"], config["head_dim"]
    parts: Mapping[str, tuple[int, ...]] = {
        "k_proj": (kv, config["hidden_size"]),
        "v_proj": (kv, config["hidden_size"]),
        "k_norm": (head,),
    }
    found: Placeholders = {}
    for layer in range(len(own_layers(config)), config["num_hidden_layers"]):
        for part, shape in parts.items():
            hf = f"model.layers.{layer}.self_attn.{part}.weight"
            like = f"model.layers.{layer}.self_attn.q_proj.weight" if len(shape) > 1 else None
            name = hf.replace("model.", _MLX, 1) if world == "mlx" else _gguf_name(hf)
            found[name] = shape, like
    return found


def _gguf_name(hf: str) -> str:
    mapped = SPEC.to_gguf(hf)
    assert mapped is not None
    return mapped[0]


def _name(name: Name) -> Name:
    if name.hf.endswith(("k_proj.weight", "k_norm.weight", "v_proj.weight")):
        name = replace(name, layers=own_layers)
    return replace(name, mlx=name.hf.replace("model.", _MLX, 1))


def _layer(hf: str, gguf: str, *shape: str) -> Name:
    return Name(f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}.weight", shape)


_NAMES = (
    *names(WIRING),
    *per_layer.NAMES,
    _layer("laurel.linear_left.weight", "laurel_l", "laurel", "hidden"),
    _layer("laurel.linear_right.weight", "laurel_r", "hidden", "laurel"),
    _layer("laurel.post_laurel_norm.weight", "laurel_post_norm", "hidden"),
    _layer("altup.modality_router.weight", "altup_router", "streams", "hidden"),
    _layer("altup.router_norm.weight", "altup_router_norm", "hidden"),
    _layer("altup.prediction_coefs.weight", "altup_predict_coef", "pairs", "streams"),
    _layer("altup.correction_coefs.weight", "altup_correct_coef", "streams", "streams"),
    _layer("altup.correct_output_scale", "altup_correct_scale", "hidden"),
    *(
        Name(hf, f"{gguf}.{i}.weight", ("hidden", "hidden"))
        for gguf, group in (("altup_proj", altup.PROJECTIONS), ("altup_unembd_proj", altup.MERGES))
        for i, hf in enumerate(group)
    ),
)


DENSE = Dense(
    model_type="gemma3n_text",
    architecture="Gemma3nForCausalLM",
    arch="gemma3n",
    names=tuple(map(_name, _NAMES)),
    recasts=(
        Recast(
            "gguf",
            (per_layer.TABLE,),
            ("per_layer_token_embd.weight",),
            (Extend(lambda config: int(config["vocab_size"])),),
        ),
        *(
            Recast("gguf", group, (f"{gguf}.weight",), (Join(), Stack(lambda config: COUNT - 1)))
            for gguf, group in (
                ("altup_proj", altup.PROJECTIONS),
                ("altup_unembd_proj", altup.MERGES),
            )
        ),
    ),
    wiring=WIRING,
    factors=_factors,
    heads=_heads,
    per_layer=lambda config: int(config["hidden_size_per_layer_input"]),
    altup=lambda config: AltUp(config["altup_active_idx"], bool(config["altup_correct_scale"])),
    sparsity=lambda config: tuple(map(float, config["activation_sparsity_pattern"])),
    words=lambda config: {
        "laurel": config["laurel_rank"],
        "streams": COUNT,
        "pairs": COUNT * COUNT,
    },
    unused=unused,
    placeholders=_placeholders,
    fixed={"attention_bias": False},
    theta=1e6,
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 262400,
        "max_position_embeddings": 32768,
        "head_dim": 256,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "altup_num_inputs": COUNT,
        "altup_coef_clip": 120.0,  # of training alone
        "num_kv_shared_layers": 15,
        "laurel_rank": 64,
    },
    adopts=_adopt,
    settles=_settle,
    ropes=ropes_by_type,
    keys=(
        Key("final_logit_softcapping", "final_logit_softcapping", default=30.0),
        Key("rope_local_base_freq", "rope.freq_base_swa", default=1e4),
    ),
    gguf=_gguf,
    tied={"mlx": True},
    windowed={"gguf", "mlx"},
    period=5,
    windows=windows_by_type,
    check=_check,
    back=_back,
)


def _mlx(config: Config) -> Config:
    """That of the model that sees and hears, with nothing but the language model in it."""
    keys: tuple[str, ...] = (
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "rope_local_base_freq",
    )
    text: dict[str, Any] = DENSE.mlx_config(config) | {key: config[key] for key in keys}
    whole = {key: text[key] for key in _OF_THE_WHOLE if key in text}
    kind = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    return kind | whole | {"text_config": text}


SPEC = replace(DENSE.spec(), mlx_config=_mlx, mlx_reads_stored=False)
