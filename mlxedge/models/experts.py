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
    choice alone is a tensor. ``shared_gate``: a sigmoid tells how much the shared expert counts."""

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


@dataclass(frozen=True)
class Experts:
    """What an architecture has: the config key of an expert's width, that of the shared expert's,
    and how the router scores. ``sparse`` tells whether ``decoder_sparse_step`` and
    ``mlp_only_layers`` make some layers dense; ``normalise`` is a config key or always so,
    ``scale`` one or none. ``plain_router``: mlx-lm has no quantized router. ``some``: a config may
    have none."""

    width: str = "moe_intermediate_size"
    shared_width: str | None = None
    sparse: bool = True
    score: Score = "softmax"
    normalise: str | bool = "norm_topk_prob"
    scale: str | None = None
    bias: bool = False
    shared_gate: bool = True
    plain_router: bool = False
    some: bool = False

    def settle(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config`` with the keys spelled out that are read here and by the runtimes.

        Raises UnsupportedModelError where they make no sense.
        """
        config = dict(config)
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
        keys += [self.shared_width] if self.shared_width else []
        keys += ["decoder_sparse_step"] if self.sparse else []
        wrong = [k for k in keys if type(config.get(k)) is not int or not 0 < config[k] < 1 << 24]
        if wrong:
            given = ", ".join(f"{key} ({str(config.get(key, 'absent'))[:40]!r})" for key in wrong)
            raise UnsupportedModelError(f"the config needs positive whole numbers for {given}")
        if config["num_experts_per_tok"] > config["num_experts"]:
            raise UnsupportedModelError(
                f"num_experts_per_tok ({config['num_experts_per_tok']}) exceeds num_experts "
                f"({config['num_experts']})"
            )
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
            raise UnsupportedModelError("the config's mlp_only_layers is not a list of layers")
        return config

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
            score=self.score,
            normalise=(
                config[self.normalise] if isinstance(self.normalise, str) else self.normalise
            ),
            scale=float(config[self.scale]) if self.scale else 1.0,
            bias=self.bias,
            shared_gate=self.shared_gate,
        )

    def sizes(self, config: dict[str, Any]) -> dict[str, int]:
        """What the words of a tensor's shape stand for."""
        shape = self.shape(config)
        return {
            "experts": shape.count,
            "expert": shape.width,
            "shared": shape.shared_width,
        }
