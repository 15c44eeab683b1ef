"""What llama, mistral, qwen2, qwen3 and their kind share: names, metadata, configs.

GGUF keys are those of llama.cpp's conversion/base.py (``TextModel.set_gguf_parameters``) and
conversion/llama.py, as vendored by llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mlxedge import gguf_values as gv
from mlxedge.errors import TokenizerError, UnsupportedModelError
from mlxedge.models.experts import Experts
from mlxedge.models.recasts import Recast
from mlxedge.models.rope import DEFAULT_THETA, LONG, Rope, rope_settings
from mlxedge.models.rope_files import (
    Get,
    both_styles,
    rope_from_gguf,
    rope_metadata,
    rope_objections,
    rope_tensors,
    rope_values,
    shortest,
)
from mlxedge.models.spec import (
    PREDICTING,
    Config,
    ModelSpec,
    Name,
    Placeholders,
    attention_everywhere,
    heads_everywhere,
    one_width,
)
from mlxedge.models.windows import FULL, SLIDING, layer_types, no_windows
from mlxedge.models.wiring import (
    ACTIVATIONS,
    NAMES,
    PRE_NORM,
    Factors,
    Heads,
    Wiring,
    activation_name,
)

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.models.altup import AltUp


def no_ropes(config: Config) -> tuple[Rope | None, ...]:
    """Nothing rotates."""
    return (None,) * config["num_hidden_layers"]


def one_rope(config: Config) -> tuple[Rope | None, ...]:
    """The same in all layers."""
    return (rope_settings(config),) * config["num_hidden_layers"]


@dataclass(frozen=True)
class Key:
    """A config key that a GGUF file has under the name ``gguf``; ``default`` is what a file means
    that does not have it, and ``none`` what stands for none there, if the key is always written."""

    config: str
    gguf: str
    kind: Literal["f32", "u32"] = "f32"
    default: float | int | None = None
    none: int | None = None


@dataclass(frozen=True)
class Dense:
    """The functions of a ``ModelSpec`` for one dense architecture.

    - ``fixed``: config keys that every model of this type has (``attention_bias`` and the like).
    - ``defaults``: what transformers takes for keys that a config leaves out, and ``theta`` for
      the base of rotary embeddings.
    - ``freq_factors``: whether llama.cpp reads ``rope_freqs.weight``; ``head_dim_free``: whether it
      allows heads that do not add up to the hidden size.
    - ``keys``: further config keys that GGUF has; ``mlx``: those that mlx-lm reads under another
      name or in another form.
      ``hf`` gives the config for transformers, where that is of another type.
      ``gguf`` gives GGUF's metadata that no config key has.
    - ``windowed``: the runtimes that have this architecture's sliding windows; ``period``: all
      layers have one but every ``period``-th, unless ``layer_types`` says otherwise.
    - ``rounds_ramp``: the runtimes round the ends of yarn's ramp where the model does not, and are
      what everybody runs it with: it is said and not refused.
    - ``longrope``: whether it is part of the architecture; ``notes``: what to say of a target.
    - ``archs``: see ``ModelSpec``.
    - ``nearly``: what the runtimes compute nearly, as configs call it: GGUF then says which it is.
    - ``lacks``: the runtimes that do not have it, ``unlike`` what one has under its name instead;
      ``wires``: a config's wiring, where it differs.
    - ``yarn_told``: the runtimes that can be told yarn's attention factor.
    - ``tied``: the runtimes that have only tied embeddings, or only untied ones.
    - ``unties``: whether mlx-lm gets a tied table twice, as it needs a head of its own.
    - ``recasts``, ``spellings``, ``heads``, ``widths``, ``per_layer``, ``altup``, ``sparsity``,
      ``words``, ``unused``, ``by_tensors``, ``placeholders``: see ``ModelSpec``; ``buffers``:
      patterns of names of tensors that files hold beside the weights; ``within``: of a language
      model that mlx-lm knows as the part of one that sees as well, what it puts before the names of
      tensors, and its type.
    - ``adopts``, ``settles``: further steps of ``ModelSpec.adopt`` and ``settle``.
    """

    model_type: str
    architecture: str
    arch: str
    names: tuple[Name, ...]
    fixed: Mapping[str, Any]
    archs: Callable[[Config], str | None] = lambda config: None
    freq_factors: bool = False
    head_dim_free: bool = True
    experts: Experts | None = None
    recasts: tuple[Recast, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    drops_predicting: bool = False
    within: tuple[str, str] | None = None
    wiring: Wiring = PRE_NORM
    factors: Callable[[Config], Factors] = lambda config: Factors()
    mixers: Callable[[Config], tuple[str, ...]] = attention_everywhere
    heads: Callable[[Config], tuple[Heads, ...]] = heads_everywhere
    widths: Callable[[Config], tuple[int, ...]] = one_width
    per_layer: Callable[[Config], int] = lambda config: 0
    altup: Callable[[Config], AltUp | None] = lambda config: None
    sparsity: Callable[[Config], tuple[float, ...]] = lambda config: ()
    words: Callable[[Config], dict[str, int]] = lambda config: {}
    placeholders: Callable[[Config, str], Placeholders] = lambda config, world: {}
    unused: Callable[[str, Config], bool] = lambda name, config: False
    by_tensors: Callable[[Config, Container[str]], Config] = lambda config, names: config
    ropes: Callable[[Config], tuple[Rope | None, ...]] = one_rope
    epsilon: str = "rms_norm_eps"
    theta: float = DEFAULT_THETA
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    mlx: Callable[[Config], Config] = lambda config: {}
    gguf: Callable[[Config], gv.Metadata] = lambda config: {}
    hf: Callable[[Config], Config] = lambda config: config
    windowed: Container[str] = ()
    period: int = 0
    rounds_ramp: bool = False
    longrope: bool = False
    nearly: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    unlike: Mapping[str, str] = field(default_factory=dict)
    wires: Callable[[Config], Wiring] | None = None
    yarn_told: Container[str] = ()
    notes: Callable[[Config, str], list[str]] = lambda config, runtime: []
    tied: Mapping[str, bool] = field(default_factory=dict)
    unties: bool = False
    adopts: Callable[[Config], Config] = lambda config: config
    settles: Callable[[Config], Config] = lambda config: config
    #: The sliding window of each layer, 0 for none, as transformers 5 applies it.
    windows: Callable[[Config], tuple[int, ...]] = no_windows
    reads: Callable[[Mapping[str, gv.GgufValue]], bool] = lambda metadata: True
    check: Callable[[Config, str], list[str]] = lambda config, runtime: []
    #: The last step of ``config_from_gguf``: the config so far, and what reads the metadata.
    back: Callable[[Config, Get], Config] = lambda config, get: config

    def spec(self) -> ModelSpec:
        return ModelSpec(
            model_type=self.model_type,
            architecture=self.architecture,
            gguf_arch=self.arch,
            archs=self.archs,
            names=self.names,
            gguf_metadata=self.gguf_metadata,
            gguf_extra=self.gguf_extra,
            config_from_gguf=self.config_from_gguf,
            mlx_config=self.mlx_config,
            hf_config=self.hf,
            objections=self.objections,
            notes=self.all_notes,
            window=self.window,
            windows=self.windows,
            ropes=self.ropes,
            mixers=self.mixers,
            heads=self.heads,
            widths=self.widths,
            per_layer=self.per_layer,
            altup=self.altup,
            sparsity=self.sparsity,
            words=self.words,
            placeholders=self.placeholders,
            unused=self.unused,
            by_tensors=self.by_tensors,
            factors=self.factors,
            wiring=self.wiring,
            wires=self.wires,
            lacks=self.lacks,
            unties=self.unties,
            epsilon=self.epsilon,
            adopt=self.adopt,
            settle=self.settle,
            reads=self.reads,
            experts=self.experts,
            recasts=self.recasts,
            spellings=self.spellings,
            ignored=(*ModelSpec.ignored, *self.buffers),
            drops_predicting=self.drops_predicting,
            mlx_prefix=self.within[0] if self.within else "",
        )

    def adopt(self, config: Config) -> Config:
        config = self.adopts(config)
        missing = {k: v for k, v in self.defaults.items() if config.get(k) is None}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if self.ropes is no_ropes:
            return config | missing
        told = isinstance(rope, Mapping) and "rope_theta" in rope
        if config.get("rope_theta") is None and not told:
            missing |= {"rope_theta": self.theta}
        return config | missing

    def settle(self, config: Config) -> Config:
        if self.period and config.get("layer_types") is None:
            config = config | {"layer_types": layer_types(config, self.period)}
        config = self.settles(config)
        config = self.experts.settle(config) if self.experts else config
        self._check_factors(config)
        return config

    def _check_factors(self, config: Config) -> None:
        """Raise UnsupportedModelError where they are no finite numbers."""
        try:
            found = vars(self.factors(config)).values()
            numbers = [n for one in found for n in (one if isinstance(one, tuple) else (one,))]
            sane = all(number is None or math.isfinite(number) for number in numbers)
        except (TypeError, ValueError, ArithmeticError):
            sane = False
        if not sane:
            raise UnsupportedModelError(
                "the config's numbers that scale, cap or clip activations make no sense"
            )

    def gguf_metadata(self, config: Config) -> gv.Metadata:
        rope, heads = self._rope(config)
        kv_heads, widths = [h.kv for h in self.heads(config)], self.widths(config)
        values = {
            "block_count": gv.u32(config["num_hidden_layers"]),
            "context_length": gv.u32(_context(config, self.window(config, "gguf"))),
            "embedding_length": gv.u32(config["hidden_size"]),
            "feed_forward_length": _one_or_all(widths),
            "attention.head_count": gv.u32(config["num_attention_heads"]),
            "attention.head_count_kv": _one_or_all(kv_heads),
            "attention.key_length": gv.u32(heads.size),
            "attention.value_length": gv.u32(heads.size),
            self._epsilon_key: gv.f32(config[self.epsilon]),
            "vocab_size": gv.u32(config["vocab_size"]),
        }
        if self.ropes is not no_ropes:
            values["rope.dimension_count"] = gv.u32(rope.dims(heads.size))
            values["rope.freq_base"] = gv.f32(rope.theta)
        for key in self.keys:
            value = config.get(key.config)
            if (value := key.none if value is None else value) is not None:
                values[key.gguf] = gv.f32(value) if key.kind == "f32" else gv.u32(value)
        if "gguf" in self.windowed and any(windows := self.windows(config)):
            values["attention.sliding_window"] = gv.u32(max(windows))
            own = [kind == SLIDING for kind in layer_types(config, self.period)]
            if own != (pattern := [w > 0 for w in windows]) or not self.period:
                values["attention.sliding_window_pattern"] = gv.array("bool", pattern)
        if self.nearly:
            values["hidden_activation"] = gv.string(activation_name(config, self.wiring))
        if self.experts is not None and self.experts.present(config):
            keys = _expert_keys(self.experts)
            values |= {gguf_key: gv.u32(config[key]) for key, gguf_key in keys.items()}
        values |= rope_metadata(rope) | self.gguf(config)
        arch = self.archs(config) or self.arch
        return {f"{arch}.{k}": v for k, v in values.items()}

    @property
    def _epsilon_key(self) -> str:
        kind = "layer_norm_epsilon" if self.wiring.layer_norm else "layer_norm_rms_epsilon"
        return f"attention.{kind}"

    def _rope(self, config: Config) -> tuple[Rope, Heads]:
        """Those of the layers that attend to everything, where they differ."""
        heads = self.heads(config)
        triples = zip(self.windows(config), self.ropes(config), heads, strict=True)
        found = [(window, rope, own) for window, rope, own in triples if rope is not None]
        return min(found, key=lambda one: one[0], default=(0, Rope(), heads[0]))[1:]

    def gguf_extra(self, config: Config) -> dict[str, np.ndarray]:
        rope, heads = self._rope(config)
        return rope_tensors(rope, heads.size)

    def config_from_gguf(
        self, metadata: Mapping[str, gv.GgufValue], extra: Mapping[str, np.ndarray]
    ) -> Config:
        def get(key: str, default: Any = None) -> Any:
            found = metadata.get(f"{self.arch}.{key}")
            return default if found is None else found.value

        def need(key: str) -> int:
            value = _first(get(key))
            if not isinstance(value, int) or value <= 0:
                raise UnsupportedModelError(
                    f"the GGUF metadata lacks a positive {self.arch}.{key}: the file is incomplete"
                )
            return value

        # llama.cpp counts the layers that predict further tokens.
        ahead = int(get("nextn_predict_layers", 0)) if self.drops_predicting else 0
        heads = need("attention.head_count")
        hidden = need("embedding_length")
        tokens = metadata.get("tokenizer.ggml.tokens")
        vocab = get("vocab_size") or (len(tokens.value) if tokens else None)
        if not vocab:
            raise TokenizerError("the GGUF metadata says neither vocab_size nor the tokens")
        head_dim = get("attention.key_length") or hidden // heads
        rope = rope_from_gguf(get, extra, head_dim, self.wiring.partial)
        config: Config = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "hidden_act": (self.nearly and get("hidden_activation")) or self.wiring.activation,
            "hidden_size": hidden,
            "intermediate_size": need(self._width_key(get)),
            "num_hidden_layers": need("block_count") - ahead,
            "num_attention_heads": heads,
            "num_key_value_heads": _first(get("attention.head_count_kv")) or heads,
            "head_dim": head_dim,
            "max_position_embeddings": get("context_length", 2048),
            self.epsilon: shortest(get(self._epsilon_key, 1e-6)),
            "vocab_size": vocab,
            **self.fixed,
        }
        if ahead:
            config[PREDICTING[0]] = ahead
        for key in self.keys:
            value = get(key.gguf, key.default)
            value = None if value == key.none else value
            config[key.config] = shortest(value) if isinstance(value, float) else value
        if "gguf" in self.windowed:
            config |= self._windows_from_gguf(get, config["num_hidden_layers"])
        if self.experts is not None:
            for name, gguf_key in _expert_keys(self.experts).items():
                if (value := get(gguf_key)) is not None or name not in config:
                    config[name] = value
        return self.back(config | self._both_styles(rope), get)

    def _both_styles(self, rope: dict[str, Any]) -> Config:
        return {} if self.ropes is no_ropes else both_styles(rope)

    def _width_key(self, get: Get) -> str:
        """A model of experts alone may have no other width."""
        other = self.experts is not None and get("feed_forward_length") is None
        return "expert_feed_forward_length" if other else "feed_forward_length"

    def _windows_from_gguf(self, get: Get, layers: int) -> Config:
        window, pattern = get("attention.sliding_window"), get("attention.sliding_window_pattern")
        found: Config = {"sliding_window": window or None}
        if not window:
            found["layer_types"] = [FULL] * layers
        elif pattern is not None and not isinstance(pattern, int):
            found["layer_types"] = [SLIDING if sliding else FULL for sliding in pattern]
        elif pattern is not None:
            found["sliding_window_pattern"] = pattern
        return found

    def mlx_config(self, config: Config) -> Config:
        """mlx-lm reads ``rope_theta`` and ``rope_scaling`` only (0.32.2), so both styles are
        written; its defaults differ from transformers', so nothing is left to them."""
        rope, _ = self._rope(config)
        values = rope_values(rope)
        made = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
        made |= {k: v for k, v in self.fixed.items() if k not in made}
        if "mlx" not in self.windowed:
            made.pop("layer_types", None)  # it runs every layer with full attention
        if self.unties:
            made["tie_word_embeddings"] = False
        if (window := self.window(config, "mlx")) is not None:
            made["max_position_embeddings"] = window
        if self.wiring.partial:
            made["partial_rotary_factor"] = values["partial_rotary_factor"] = rope.fraction
        made |= self._both_styles(values) | self.mlx(config)
        if self.within is None:
            return made
        whole = {key: made[key] for key in _OF_THE_WHOLE if key in made}
        return {"model_type": self.within[1], **whole, "text_config": made}

    def window(self, config: Config, runtime: str) -> int | None:
        """The smallest sliding window of any layer, if the model's context is longer and the
        runtime attends to all of it."""
        if runtime in self.windowed:
            return None
        window = min((w for w in self.windows(config) if w), default=None)
        return window if window is not None and window < _context(config) else None

    def objections(self, config: Config, runtime: str) -> list[str]:
        """Why llama.cpp ("gguf") or mlx-lm ("mlx") would compute something else."""
        if runtime in self.lacks:
            lacking = f"{NAMES[runtime]} does not have this architecture ({self.model_type})"
            return [self.unlike.get(runtime, lacking)]
        rope, heads = self._rope(config)
        found = list(self.check(config, runtime))
        name = activation_name(config, self.wiring)
        computed = {ACTIVATIONS[own] for own in (self.wiring.activation, *self.nearly)}
        if ACTIVATIONS.get(name) not in computed:
            found.append(f"hidden_act {name[:40]!r} is not {self.wiring.activation}")
        if rope.dims(heads.size) != heads.size and not self.wiring.partial:
            found.append("partial rotary embeddings are not part of this architecture")
        tied = config["tie_word_embeddings"]
        if self.tied.get(runtime, tied) != tied:
            kind = "untied" if self.tied[runtime] else "tied"
            found.append(f"{kind} embeddings are not part of this architecture in {NAMES[runtime]}")
        if rope.type == LONG and not self.longrope:
            found.append("longrope is not part of this architecture")
        full = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
        if runtime == "gguf" and not full and not self.head_dim_free:
            found.append(f"llama.cpp's {self.arch} needs heads that add up to the hidden size")
        told = replace(rope, truncate=rope.truncate or self.rounds_ramp)
        return found + rope_objections(
            told, runtime, self.arch, self.freq_factors, runtime in self.yarn_told
        )

    def all_notes(self, config: Config, runtime: str) -> list[str]:
        found = list(self.notes(config, runtime))
        rope, _ = self._rope(config)
        if self.rounds_ramp and rope.type == "yarn" and not rope.truncate:
            found.append(
                f"{NAMES[runtime]} rounds the ends of yarn's ramp, as in every file of this "
                "architecture, where the model does not (truncate: false)"
            )
        return found


def _one_or_all(values: Sequence[int]) -> gv.GgufValue:
    """A number of all layers alike, or one for each."""
    return gv.u32(values[0]) if len(set(values)) == 1 else gv.array("u32", list(values))


def _first(value: Any) -> Any:
    """What is said of all layers, or of the first that has any."""
    alone = value is None or isinstance(value, (str, int, float)) or not len(value)
    return value if alone else next((int(one) for one in value if one), 0)


def _expert_keys(experts: Experts) -> dict[str, str]:
    """GGUF's keys by the config's."""
    keys = {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        experts.width: "expert_feed_forward_length",
    }
    if experts.shared_width and experts.shared_gate:
        keys[experts.shared_width] = "expert_shared_feed_forward_length"
    return keys


def under(config: Config, keys: Mapping[str, str]) -> Config:
    """The config with what stands under other ``keys`` under those that are read here."""
    return config | {to: config[key] for key, to in keys.items() if config.get(key) is not None}


def mirrored(config: Config, keys: Mapping[str, str]) -> Config:
    """The config with what an architecture has under keys of its own under ours as well, and the
    other way round: ``keys`` are ours by its."""
    found = {}
    for own, key in keys.items():
        value = config.get(own)
        found[own] = found[key] = config.get(key) if value is None else value
    return config | found


#: GELU, exact or its approximation by tanh, where runtimes have one of both: they differ by 5e-4.
GELUS = ("gelu", "gelu_new")
#: GPT-2's keys, which others have as well, and ours.
GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
}


def plain_rope(config: Config, runtime: str) -> list[str]:
    """An objection where a runtime has no scaled rotary embeddings for an architecture."""
    kind = rope_settings(config).type
    model_type = config["model_type"]
    return [] if kind == "default" else [f"{runtime}'s {model_type} has no {kind} rope scaling"]


def longrope_objections(config: Config) -> list[str]:
    """An objection where mlx-lm would scale cosine and sine otherwise."""
    rope = rope_settings(config)
    if rope.type != LONG:
        return []
    ratio = config["max_position_embeddings"] / rope.original_max_position
    scale = 1 + math.log(max(ratio, 1.0)) / math.log(rope.original_max_position)
    if math.isclose(rope.attention_factor, math.sqrt(scale), rel_tol=1e-6):
        return []
    return ["mlx-lm cannot be told this longrope attention_factor"]


def longrope_notes(config: Config, runtime: str) -> list[str]:
    rope = rope_settings(config)
    if runtime == "gguf" or rope.type != LONG or rope.short_factor == rope.long_factor:
        return []
    return [
        "mlx-lm always rotates by the factors of long contexts: up to "
        f"{rope.original_max_position} tokens it differs from the model"
    ]


def experts_everywhere(experts: Experts, config: Config, runtime: str) -> list[str]:
    """An objection where a runtime has no dense layers between those with experts."""
    if not experts.dense_layers(config):
        return []
    name = NAMES[runtime]
    return [f"{name} has experts in every layer of a {config['model_type']}, this model has not"]


#: What a config says of the whole model, however many parts it has.
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


def _context(config: Config, window: int | None = None) -> int:
    context: int = config.get("max_position_embeddings") or 2048
    return context if window is None else min(context, window)
