"""What llama, mistral, qwen2, qwen3 and their kind share: names, metadata, configs.

GGUF keys are those of llama.cpp's conversion/base.py (``TextModel.set_gguf_parameters``) and
conversion/llama.py, as vendored by llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge import gguf_values as gv
from mlxedge.errors import TokenizerError, UnsupportedModelError
from mlxedge.models.experts import ROUTER, SHARED, SHARED_GATE, STACKS, Experts
from mlxedge.models.rope import Rope, inverse_frequencies, rope_settings
from mlxedge.models.spec import Config, ModelSpec, Name, RowOrder

if TYPE_CHECKING:
    import numpy as np

_BLOCK = "model.layers.{i}."


def names(
    *, rope_rows: bool = False, qkv_bias: bool | str = False, o_bias: bool | str = False,
    mlp_bias: bool | str = False, qk_norm: bool = False, experts: Experts | None = None,
    block: str = "mlp", parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Name, ...]:  # fmt: skip
    """The tensors of a decoder. ``rope_rows``: Q and K are interleaved in GGUF. A bias is there
    always (``True``), never, or as the config key of that name says. With ``experts``, files call
    the module that holds them ``block``, and gate, up and down of one expert ``parts``."""
    q: RowOrder = "rope_q" if rope_rows else "same"
    k: RowOrder = "rope_k" if rope_rows else "same"
    norm, wide, narrow = ("hidden",), ("intermediate", "hidden"), ("hidden", "intermediate")
    layer: list[tuple[Any, ...]] = [
        ("input_layernorm.weight", "attn_norm.weight", norm),
        ("post_attention_layernorm.weight", "ffn_norm.weight", norm),
        ("self_attn.q_proj.weight", "attn_q.weight", ("q", "hidden"), q),
        ("self_attn.k_proj.weight", "attn_k.weight", ("kv", "hidden"), k),
        ("self_attn.v_proj.weight", "attn_v.weight", ("kv", "hidden")),
        ("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "q")),
    ]
    dense: tuple[Any, ...] = ()
    if experts is not None:
        dense = "same", lambda config: True, experts.dense_layers
    if experts is None or experts.sparse:
        layer += [
            ("mlp.gate_proj.weight", "ffn_gate.weight", wide, *dense),
            ("mlp.up_proj.weight", "ffn_up.weight", wide, *dense),
            ("mlp.down_proj.weight", "ffn_down.weight", narrow, *dense),
        ]
    if qkv_bias:
        given = _given(qkv_bias)
        layer += [
            ("self_attn.q_proj.bias", "attn_q.bias", ("q",), q, given),
            ("self_attn.k_proj.bias", "attn_k.bias", ("kv",), k, given),
            ("self_attn.v_proj.bias", "attn_v.bias", ("kv",), "same", given),
        ]
    if o_bias:
        given = _given(o_bias)
        layer.append(("self_attn.o_proj.bias", "attn_output.bias", norm, "same", given))
    if mlp_bias:
        given = _given(mlp_bias)
        for part, width in (("gate", "intermediate"), ("up", "intermediate"), ("down", "hidden")):
            layer.append((f"mlp.{part}_proj.bias", f"ffn_{part}.bias", (width,), "same", given))
    if qk_norm:
        layer += [
            ("self_attn.q_norm.weight", "attn_q_norm.weight", ("head",)),
            ("self_attn.k_norm.weight", "attn_k_norm.weight", ("head",)),
        ]
    return (
        Name("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
        Name("model.norm.weight", "output_norm.weight", norm),
        Name("lm_head.weight", "output.weight", ("vocab", "hidden"), present=_untied),
        *(Name(_BLOCK + hf, "blk.{i}." + gguf, *rest) for hf, gguf, *rest in layer),
        *(_expert_names(experts, block, parts) if experts else ()),
    )


def _expert_names(experts: Experts, block: str, parts: Sequence[str]) -> Iterator[Name]:
    shapes = (("expert", "hidden"), ("expert", "hidden"), ("hidden", "expert"))
    layers = experts.layers

    def own(name: str) -> str | None:
        return None if block == "mlp" else f"{_BLOCK}{block}.{name}.weight"

    yield Name(
        f"{_BLOCK}{ROUTER}.weight",
        "blk.{i}.ffn_gate_inp.weight",
        ("experts", "hidden"),
        layers=layers,
        stored=own("gate"),
        mlx=own("gate"),
    )
    for stack, part, kind, shape in zip(STACKS, parts, ("gate", "up", "down"), shapes, strict=True):
        yield Name(
            f"{_BLOCK}{stack}.weight",
            f"blk.{{i}}.ffn_{kind}_exps.weight",
            ("experts", *shape),
            layers=layers,
            stored=f"{_BLOCK}{block}.experts.{{e}}.{part}.weight",
            mlx=f"{_BLOCK}{block}.switch_mlp.{kind}_proj.weight",
        )
    if experts.shared_width is None:
        return
    for shared, kind, (rows, cols) in zip(SHARED, ("gate", "up", "down"), shapes, strict=True):
        wide = tuple("shared" if word == "expert" else word for word in (rows, cols))
        gguf = f"blk.{{i}}.ffn_{kind}_shexp.weight"
        yield Name(f"{_BLOCK}{shared}.weight", gguf, wide, layers=layers)
    gguf = "blk.{i}.ffn_gate_inp_shexp.weight"
    yield Name(f"{_BLOCK}{SHARED_GATE}.weight", gguf, ("one", "hidden"), layers=layers)


def _given(bias: bool | str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(bias)) if isinstance(bias, str) else bias


def _untied(config: Config) -> bool:
    return not config["tie_word_embeddings"]


def no_windows(config: Config) -> tuple[int, ...]:
    return (0,) * config["num_hidden_layers"]


@dataclass(frozen=True)
class Dense:
    """The functions of a ``ModelSpec`` for one dense architecture.

    ``fixed`` are config keys that every model of this type has (``attention_bias`` and the like);
    ``freq_factors`` tells whether llama.cpp reads ``rope_freqs.weight`` for it; ``head_dim_free``
    whether llama.cpp allows heads that do not add up to the hidden size.
    """

    model_type: str
    architecture: str
    arch: str
    names: tuple[Name, ...]
    fixed: Mapping[str, Any]
    freq_factors: bool = False
    head_dim_free: bool = True
    experts: Experts | None = None
    #: The sliding window of each layer, 0 for none, as transformers 5 applies it.
    windows: Callable[[Config], tuple[int, ...]] = no_windows
    reads: Callable[[Mapping[str, gv.GgufValue]], bool] = lambda metadata: True
    check: Callable[[Config, str], list[str]] = lambda config, runtime: []

    def spec(self) -> ModelSpec:
        return ModelSpec(
            model_type=self.model_type,
            architecture=self.architecture,
            gguf_arch=self.arch,
            names=self.names,
            gguf_metadata=self.gguf_metadata,
            gguf_extra=self.gguf_extra,
            config_from_gguf=self.config_from_gguf,
            mlx_config=self.mlx_config,
            objections=self.objections,
            window=self.window,
            windows=self.windows,
            settle=self.experts.settle if self.experts else lambda config: config,
            reads=self.reads,
            experts=self.experts,
        )

    def gguf_metadata(self, config: Config) -> gv.Metadata:
        head_dim = config["head_dim"]
        rope = rope_settings(config)
        values = {
            "block_count": gv.u32(config["num_hidden_layers"]),
            "context_length": gv.u32(_context(config, self.window(config))),
            "embedding_length": gv.u32(config["hidden_size"]),
            "feed_forward_length": gv.u32(config["intermediate_size"]),
            "attention.head_count": gv.u32(config["num_attention_heads"]),
            "attention.head_count_kv": gv.u32(config["num_key_value_heads"]),
            "attention.key_length": gv.u32(head_dim),
            "attention.value_length": gv.u32(head_dim),
            "attention.layer_norm_rms_epsilon": gv.f32(config["rms_norm_eps"]),
            "vocab_size": gv.u32(config["vocab_size"]),
            "rope.dimension_count": gv.u32(rope.dims(head_dim)),
            "rope.freq_base": gv.f32(rope.theta),
        }
        if self.experts is not None:
            keys = _expert_keys(self.experts)
            values |= {gguf_key: gv.u32(config[key]) for key, gguf_key in keys.items()}
        return {f"{self.arch}.{k}": v for k, v in (values | _rope_scaling(rope)).items()}

    def gguf_extra(self, config: Config) -> dict[str, np.ndarray]:
        """``rope_freqs.weight`` f32 ``[head_dim / 2]`` for llama3 rope: plain over scaled."""
        import numpy as np

        rope = rope_settings(config)
        if rope.type != "llama3":
            return {}
        plain = inverse_frequencies(Rope(theta=rope.theta), config["head_dim"])
        scaled = inverse_frequencies(rope, config["head_dim"])
        return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}

    def config_from_gguf(
        self, metadata: Mapping[str, gv.GgufValue], extra: Mapping[str, np.ndarray]
    ) -> Config:
        def get(key: str, default: Any = None) -> Any:
            found = metadata.get(f"{self.arch}.{key}")
            return default if found is None else found.value

        def need(key: str) -> int:
            value = get(key)
            if not isinstance(value, int) or value <= 0:
                raise UnsupportedModelError(
                    f"the GGUF metadata lacks a positive {self.arch}.{key}: the file is incomplete"
                )
            return value

        heads = need("attention.head_count")
        hidden = need("embedding_length")
        tokens = metadata.get("tokenizer.ggml.tokens")
        vocab = get("vocab_size") or (len(tokens.value) if tokens else None)
        if not vocab:
            raise TokenizerError("the GGUF metadata says neither vocab_size nor the tokens")
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": float(get("rope.freq_base", 10000.0)),
        }
        kind = get("rope.scaling.type")
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": float(get("rope.scaling.factor", 1.0))}
        elif kind not in (None, "none"):
            raise UnsupportedModelError(f"rope scaling {kind!r} of a GGUF file is not supported")
        if kind == "yarn":
            rope["original_max_position_embeddings"] = need("rope.scaling.original_context_length")
            for key, gguf_key in _YARN.items():
                if (value := get(gguf_key)) is not None:
                    rope[key] = float(value)
        config: Config = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv") or heads,
            "head_dim": get("attention.key_length") or hidden // heads,
            "max_position_embeddings": get("context_length", 2048),
            "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon", 1e-6)),
            "vocab_size": vocab,
            **self.fixed,
        }
        if self.experts is not None:
            for key, gguf_key in _expert_keys(self.experts).items():
                if (value := get(gguf_key)) is not None or key not in config:
                    config[key] = value
        if (factors := extra.get("rope_freqs.weight")) is not None:
            rope |= llama3_from_factors(factors, rope["rope_theta"], config["head_dim"])
        return config | _both_styles(rope)

    def mlx_config(self, config: Config) -> Config:
        """mlx-lm reads ``rope_theta`` and ``rope_scaling`` only (0.32.2), so both styles are
        written; its defaults differ from transformers', so nothing is left to them."""
        rope = rope_settings(config)
        values: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
        if rope.type != "default":
            values["factor"] = rope.factor
        if rope.type == "llama3":
            values["low_freq_factor"] = rope.low_freq_factor
            values["high_freq_factor"] = rope.high_freq_factor
        if rope.type == "yarn":
            values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.type in ("llama3", "yarn"):
            values["original_max_position_embeddings"] = rope.original_max_position
        made = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
        made |= {k: v for k, v in self.fixed.items() if k not in made}
        # mlx-lm runs every layer of these types with full attention.
        made.pop("layer_types", None)
        if (window := self.window(config)) is not None:
            made["max_position_embeddings"] = window
        return made | _both_styles(values)

    def window(self, config: Config) -> int | None:
        """The smallest sliding window of any layer, if the model's context is longer."""
        window = min((w for w in self.windows(config) if w), default=None)
        return window if window is not None and window < _context(config) else None

    def objections(self, config: Config, runtime: str) -> list[str]:
        """Why llama.cpp ("gguf") or mlx-lm ("mlx") would compute something else."""
        rope = rope_settings(config)
        found = list(self.check(config, runtime))
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            found.append(f"hidden_act {config['hidden_act']!r} is not silu")
        if rope.fraction != 1.0:
            found.append("partial rotary embeddings are not part of this architecture")
        if runtime == "gguf":
            if rope.type == "dynamic":
                found.append("llama.cpp has no dynamic rope scaling")
            if rope.type == "llama3" and not self.freq_factors:
                found.append(f"llama.cpp reads no llama3 rope factors for {self.arch}")
            full = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
            if not full and not self.head_dim_free:
                found.append(f"llama.cpp's {self.arch} needs heads that add up to the hidden size")
        if rope.type == "yarn" and not rope.truncate:
            found.append("the runtime cannot be told this yarn truncate: false")
        default = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        if rope.type == "yarn" and not math.isclose(rope.attention_factor, default, rel_tol=1e-6):
            found.append("the runtime cannot be told this yarn attention_factor")
        return found


def _expert_keys(experts: Experts) -> dict[str, str]:
    """GGUF's keys by the config's."""
    keys = {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        experts.width: "expert_feed_forward_length",
    }
    if experts.shared_width:
        keys[experts.shared_width] = "expert_shared_feed_forward_length"
    return keys


def plain_rope(config: Config, runtime: str) -> list[str]:
    """An objection where a runtime has no scaled rotary embeddings for an architecture."""
    kind = rope_settings(config).type
    model_type = config["model_type"]
    return [] if kind == "default" else [f"{runtime}'s {model_type} has no {kind} rope scaling"]


def experts_everywhere(experts: Experts, config: Config, runtime: str) -> list[str]:
    """An objection where a runtime has no dense layers between those with experts."""
    if not experts.dense_layers(config):
        return []
    name = {"gguf": "llama.cpp", "mlx": "mlx-lm"}[runtime]
    return [f"{name} has experts in every layer of a {config['model_type']}, this model has not"]


def every_layer(config: Config, default: int | None) -> tuple[int, ...]:
    """``sliding_window`` for all layers; ``default`` is what a silent config means."""
    return (int(config.get("sliding_window", default) or 0),) * config["num_hidden_layers"]


def qwen_windows(config: Config) -> tuple[int, ...]:
    """None unless ``use_sliding_window`` is set; then in the layers that ``layer_types`` names, or
    from ``max_window_layers`` on."""
    layers = range(config["num_hidden_layers"])
    window = int(config.get("sliding_window", 4096) or 0)
    if not config.get("use_sliding_window"):
        return no_windows(config)
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = int(config.get("max_window_layers", 28))
    return tuple(window if layer >= first else 0 for layer in layers)


def _context(config: Config, window: int | None = None) -> int:
    context: int = config.get("max_position_embeddings") or 2048
    return context if window is None else min(context, window)


_YARN = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def _rope_scaling(rope: Rope) -> gv.Metadata:
    if rope.type not in ("linear", "yarn"):
        return {}
    values = {
        "rope.scaling.type": gv.string(rope.type),
        "rope.scaling.factor": gv.f32(rope.factor),
    }
    if rope.type == "yarn":
        values["rope.scaling.original_context_length"] = gv.u32(rope.original_max_position)
        values["rope.scaling.yarn_beta_fast"] = gv.f32(rope.beta_fast)
        values["rope.scaling.yarn_beta_slow"] = gv.f32(rope.beta_slow)
    return values


def _both_styles(rope: dict[str, Any]) -> Config:
    """``rope_theta`` and ``rope_scaling`` for older readers, ``rope_parameters`` for newer."""
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if rope["rope_type"] != "default" else None,
        "rope_parameters": rope,
    }


def _shortest(value: float) -> float:
    """The decimal number that an f32 was made from: 9.999999747378752e-06 → 1e-05."""
    return float(f"{value:.7g}")


def llama3_from_factors(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 rope settings that give these frequency factors f32 ``[head_dim / 2]``.

    Between the two wavelengths 1/factor is linear in the frequency, so two points of that stretch
    tell them; only ratios matter, so ``low_freq_factor`` is taken as 1, as published models do.
    Raises UnsupportedModelError if the factors are not of this form.
    """
    import numpy as np

    f = np.asarray(factors, dtype=np.float64)
    plain = inverse_frequencies(Rope(theta=theta), head_dim)
    if f.shape != plain.shape:
        raise UnsupportedModelError(
            f"rope_freqs.weight has {f.size} factors for {plain.size} pairs"
        )
    factor = float(f.max())
    settings: dict[str, Any] = {"rope_type": "llama3", "factor": float(f"{factor:.6g}")}
    candidates = [(8192.0, 4.0)]
    inner = np.flatnonzero((f > 1.0) & (f < factor))
    if inner.size >= 2:
        keep = (1 / f[inner] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(plain[inner] / (2 * math.pi), keep, 1)
        candidates.append((float(slope / -offset), float(1 + 1 / -offset)))
    for original, high in candidates:
        trial = settings | {
            "low_freq_factor": 1.0,
            "high_freq_factor": float(f"{high:.4g}"),
            "original_max_position_embeddings": round(original),
        }
        rope = rope_settings({"rope_parameters": trial | {"rope_theta": theta}})
        if np.allclose(plain / inverse_frequencies(rope, head_dim), f, rtol=1e-3):
            return trial
    raise UnsupportedModelError("rope_freqs.weight holds factors that are not llama3's")
