"""Mixtures of experts: what an architecture declares of them, and what a config says.

The canonical names are those of Qwen: a router ``mlp.gate``, the stacks ``mlp.experts.gate_proj``,
``up_proj`` and ``down_proj`` of ``[experts, rows, cols]``, and, where there is one, a
``mlp.shared_expert`` that every token goes through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlxedge.errors import UnsupportedModelError

#: How a router's logits become scores: softmax over all experts, sigmoid of each, or softmax over
#: the chosen ones alone.
Score = Literal["softmax", "sigmoid", "softmax_top"]

#: The modules within a layer.
ROUTER, SHARED_GATE = "mlp.gate", "mlp.shared_expert_gate"
STACKS = tuple(f"mlp.experts.{part}_proj" for part in ("gate", "up", "down"))
ROUTER_BIAS = f"{ROUTER}.e_score_correction_bias"
SHARED = tuple(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down"))

_COUNT = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class ExpertShape:
    """Of one model: ``used`` of ``count`` experts of ``width`` serve a token in ``layers``;
    ``shared_width`` is that of the shared expert, 0 for none. ``normalise``: the chosen scores are
    divided by their sum, then multiplied by ``scale``; ``bias``: what is added to scores for the
    choice alone is a tensor. ``shared_gate``: a sigmoid tells how much the shared expert counts.
    The choice is among the ``top_groups`` of ``groups`` whose ``group_best`` best add up to most.
    ``beside``: they work beside a dense MLP (``mlxedge.models.beside``)."""

    count: int
    used: int
    width: int
    shared_width: int
    layers: frozenset[int]
    score: Score
    normalise: bool
    scale: float = 1.0
    bias: bool = False
    shared_gate: bool = True
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    #: Where the gate is clamped, as in gpt-oss: its steepness alpha, and the limit.
    clamped: tuple[float, float] | None = None
    beside: bool = False


@dataclass(frozen=True)
class Experts:
    """What an architecture has: the config key of an expert's width, that of the shared expert's,
    and how the router scores. ``sparse`` tells whether ``decoder_sparse_step`` and
    ``mlp_only_layers`` make some layers dense; ``normalise`` is a config key or always so,
    ``scale`` one or none. ``plain_router``: mlx-lm has no quantized router. ``groups`` are the
    config keys of their number and of how many are chosen from, ``group_best`` as in the shape.
    ``score_key`` is the config key of the score, where models differ. ``biases``: the router
    and all matrices of experts have one; ``clamped``: the config keys of a clamped gate's steepness
    and limit. ``published`` names an encoding that experts keep, if a source has them in it and
    nothing else is asked for. ``some``: a config may have none; ``given`` is the config key that
    tells whether a model has experts at all, where not all do; ``beside`` as in the shape."""

    width: str = "moe_intermediate_size"
    shared_width: str | None = None
    sparse: bool = True
    score: Score = "softmax"
    score_key: str | None = None
    normalise: str | bool = "norm_topk_prob"
    scale: str | None = None
    bias: bool = False
    shared_gate: bool = True
    plain_router: bool = False
    some: bool = False
    groups: tuple[str, str] | None = None
    group_best: int = 2
    biases: bool = False
    clamped: tuple[str, str] | None = None
    published: str | None = None
    given: str | None = None
    beside: bool = False

    def present(self, config: dict[str, Any]) -> bool:
        """Whether a model has experts."""
        return self.given is None or bool(config.get(self.given))

    def settle(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config`` with the keys spelled out that are read here and by the runtimes.

        Raises UnsupportedModelError where they make no sense.
        """
        config = dict(config)
        if not self.present(config):
            return config
        count = next((config[key] for key in _COUNT if config.get(key) is not None), None)
        config |= dict.fromkeys(_COUNT, count)
        if self.sparse:
            config.setdefault("decoder_sparse_step", 1)
            config["mlp_only_layers"] = config.get("mlp_only_layers") or []
        if isinstance(self.normalise, str):
            config[self.normalise] = bool(config.get(self.normalise))
        if self.some and not count:
            layers = list(range(config["num_hidden_layers"]))
            none = dict.fromkeys((*_COUNT, "num_experts_per_tok"), 0)
            return config | none | {"mlp_only_layers": layers}
        keys = ["num_experts", "num_experts_per_tok", self.width]
        keys += ["decoder_sparse_step"] if self.sparse else []
        wrong = [k for k in keys if type(config.get(k)) is not int or not 0 < config[k] < 1 << 24]
        if self.shared_width and not (
            type(shared := config.get(self.shared_width)) is int and 0 <= shared < 1 << 24
        ):
            wrong.append(self.shared_width)
        if wrong:
            given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
            raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")
        if config["num_experts_per_tok"] > config["num_experts"]:
            raise UnsupportedModelError(
                f"num_experts_per_tok ({config['num_experts_per_tok']}) exceeds num_experts "
                f"({config['num_experts']})"
            )
        self._check_groups(config)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
            raise UnsupportedModelError("the config's mlp_only_layers is not a list of layers")
        return config

    def _check_groups(self, config: dict[str, Any]) -> None:
        if self.groups is None:
            return
        groups, top = (config.get(key, 0) for key in self.groups)
        count, used = config["num_experts"], config["num_experts_per_tok"]
        known = type(groups) is int and type(top) is int and 0 < top <= groups
        if not known or count % groups or count // groups * top < used:
            raise UnsupportedModelError(
                f"{used} of {count} experts cannot be chosen from {str(top)[:40]} of "
                f"{str(groups)[:40]} groups ({', '.join(self.groups)})"
            )
        if groups > 1 and count // groups < self.group_best:
            raise UnsupportedModelError(
                f"groups of {count // groups} experts have no {self.group_best} best"
            )

    def layers(self, config: dict[str, Any]) -> frozenset[int]:
        """The layers that have experts."""
        layers = range(config["num_hidden_layers"])
        if not self.sparse:
            return frozenset(layers)
        step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
        return frozenset(i for i in layers if i not in dense and (i + 1) % step == 0)

    def dense_layers(self, config: dict[str, Any]) -> frozenset[int]:
        """The others."""
        return frozenset(range(config["num_hidden_layers"])) - self.layers(config)

    def shape(self, config: dict[str, Any]) -> ExpertShape:
        """Of a config that was settled."""
        return ExpertShape(
            count=config["num_experts"],
            used=config["num_experts_per_tok"],
            width=config[self.width],
            shared_width=config[self.shared_width] if self.shared_width else 0,
            layers=self.layers(config),
            score=config[self.score_key] if self.score_key else self.score,
            normalise=(
                config[self.normalise] if isinstance(self.normalise, str) else self.normalise
            ),
            scale=float(config[self.scale]) if self.scale else 1.0,
            bias=self.bias,
            shared_gate=self.shared_gate,
            groups=config[self.groups[0]] if self.groups else 1,
            top_groups=config[self.groups[1]] if self.groups else 1,
            group_best=self.group_best,
            clamped=self._clamped(config),
            beside=self.beside,
        )

    def _clamped(self, config: dict[str, Any]) -> tuple[float, float] | None:
        if self.clamped is None:
            return None
        alpha, limit = (float(config[key]) for key in self.clamped)
        return alpha, limit

    def sizes(self, config: dict[str, Any]) -> dict[str, int]:
        """What the words of a tensor's shape stand for."""
        shape = self.shape(config)
        return {
            "experts": shape.count,
            "expert": shape.width,
            "shared": shape.shared_width,
        }
