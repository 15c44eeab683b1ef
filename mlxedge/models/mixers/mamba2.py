"""The mixer of Mamba-2 (arXiv 2405.21060): a convolution, a selective scan by heads, a gated norm.

One matrix gives the gate, what goes through the convolution (the channels of all heads, then B and
C of all groups) and the time steps. After ``Mamba2Mixer`` in transformers' modeling_mamba2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.errors import UnsupportedModelError
from mlxedge.models.mixers.attention import STATE_BYTES
from mlxedge.models.recasts import Reshape
from mlxedge.models.spaces import KERNEL, RATES, in_gguf, namer, rates, whole_numbers
from mlxedge.models.spec import Config, Name

if TYPE_CHECKING:
    from mlxedge.models.graph import Graph
    from mlxedge.models.shape import Shape

_IN, _OUT = ("mamba.in_proj",), ("mamba.out_proj",)
#: What architectures call their settings in turn, by the name here; the value is the default.
_COUNTS = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
#: What transformers writes around a number that JSON does not have.
_FLOAT = "__float__"


@dataclass(frozen=True)
class Mamba2:
    """``heads`` of ``head_dim`` channels with states of ``size``, ``groups`` of them with the same
    B and C and a norm of their own; convolutions of ``width`` positions; time steps within
    ``limits``."""

    heads: int
    head_dim: int
    groups: int
    size: int
    width: int
    limits: tuple[float, float]

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.groups * self.size


def _column(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1)


#: GGUF has numbers of heads as columns, and the norm's weights by group.
RECASTS = (
    *KERNEL,
    in_gguf("A_log", "ssm_a", RATES, Reshape(_column)),
    in_gguf("D", "ssm_d", Reshape(_column)),
    in_gguf(
        "norm.weight", "ssm_norm.weight", Reshape(rows=lambda config: config["mamba_n_groups"])
    ),
)


def names(layers: Callable[[Config], Collection[int]] | None = None) -> tuple[Name, ...]:
    """Its tensors in those layers, or in all. Those that GGUF has in another form have a name of
    their own for the place."""
    own = namer(layers)
    return (
        own("in_proj.weight", "ssm_in.weight", "ssm_in", "hidden"),
        own("in_proj.bias", "ssm_in.bias", "ssm_in", key="mamba_proj_bias"),
        own("conv1d.weight", "ssm_conv1d.kernel", "ssm_conv", "one", "ssm_width"),
        own("conv1d.bias", "ssm_conv1d.bias", "ssm_conv", key="mamba_conv_bias"),
        own("dt_bias", "ssm_dt.bias", "ssm_heads", exact=True),
        own("A_log", "ssm_a.log", "ssm_heads", exact=True),
        own("D", "ssm_d.vector", "ssm_heads"),
        own("norm.weight", "ssm_norm.vector", "ssm_inner"),
        own("out_proj.weight", "ssm_out.weight", "hidden", "ssm_inner"),
        own("out_proj.bias", "ssm_out.bias", "hidden", key="mamba_proj_bias"),
    )


def adopt(config: Config, called: Mapping[str, str], defaults: Mapping[str, Any]) -> Config:
    """``config`` with the keys that are read here, which are granitemoehybrid's: those that an
    architecture calls otherwise (``called``), and ``defaults`` by the names here.

    Raises UnsupportedModelError for what makes no sense.
    """
    made = dict(config)
    for key, default in defaults.items():
        given = made.get(called.get(key, key))
        made[key] = default if given is None else given
    inner = None
    whole_numbers(made, 1, "mamba_n_heads", *({"mamba_expand"} & defaults.keys()))
    if "mamba_expand" in defaults:
        inner = made["mamba_expand"] * made["hidden_size"]
    if made["mamba_d_head"] == "auto" and inner is not None:
        made["mamba_d_head"] = inner // made["mamba_n_heads"]
    whole_numbers(made, 1, *_COUNTS)
    heads, groups = made["mamba_n_heads"], made["mamba_n_groups"]
    channels = heads * made["mamba_d_head"]
    if heads % groups or inner not in (None, channels):
        raise UnsupportedModelError(
            f"{heads} heads of {made['mamba_d_head']} in {groups} groups are not the "
            f"{inner or channels} channels of a state space"
        )
    made["time_step_limit"] = _limits(made.get("time_step_limit"))
    return made


def _limits(given: Any) -> list[float]:
    """Two numbers; JSON has no infinity."""
    if given is None:
        return [0.0, float("inf")]
    try:
        low, high = (float(v[_FLOAT] if isinstance(v, Mapping) else v) for v in given)
    except (TypeError, ValueError, KeyError):
        raise UnsupportedModelError(
            f"time_step_limit is {str(given)[:60]!r}, not two numbers"
        ) from None
    if not low <= high:
        raise UnsupportedModelError(f"time_step_limit is {low:g} to {high:g}")
    return [low, high]


def settings(config: Mapping[str, Any]) -> Mamba2:
    heads, head_dim, groups, size, width = (config[key] for key in _COUNTS)
    low, high = config["time_step_limit"]
    return Mamba2(heads, head_dim, groups, size, width, (low, high))


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    own = settings(config)
    return {
        "ssm_heads": own.heads,
        "ssm_inner": own.inner,
        "ssm_conv": own.convolved,
        "ssm_in": own.inner + own.convolved + own.heads,
        "ssm_width": own.width,
    }


def metadata(config: Mapping[str, Any]) -> dict[str, int]:
    """GGUF's, without the architecture."""
    own = settings(config)
    return {
        "ssm.conv_kernel": own.width,
        "ssm.inner_size": own.inner,
        "ssm.state_size": own.size,
        "ssm.time_step_rank": own.heads,
        "ssm.group_count": own.groups,
    }


def back(get: Callable[[str], Any]) -> Config:
    """The other way, without expansion."""
    heads = int(get("ssm.time_step_rank"))
    return {
        "mamba_d_conv": get("ssm.conv_kernel"),
        "mamba_d_state": get("ssm.state_size"),
        "mamba_n_heads": heads,
        "mamba_n_groups": get("ssm.group_count"),
        "mamba_d_head": int(get("ssm.inner_size")) // heads,
    }


def objections(config: Mapping[str, Any], runtime: str, *, own_norms: bool = False) -> list[str]:
    """What the runtimes do not have of it. ``own_norms``: mlx-lm has a norm for each group."""
    own, found = settings(config), []
    if runtime == "gguf" and own.limits != (0.0, float("inf")):
        found.append("llama.cpp does not limit time steps (time_step_limit)")
    if runtime == "gguf" and config["mamba_proj_bias"]:
        found.append("llama.cpp has no biases around a state space")
    if runtime == "gguf" and not config["mamba_conv_bias"]:
        found.append("llama.cpp needs biases of the convolution")
    if runtime == "mlx" and own.groups != 1 and not own_norms:
        found.append("mlx-lm has one norm for all groups of a state space, this model one for each")
    if own.width < 2:
        found.append("the runtimes need convolutions of more than one position")
    return found


def groups(shape: Shape, layer: int) -> list[tuple[str, ...]]:
    return [_IN, _OUT]


def cache_bytes(shape: Shape, layer: int, context: int) -> int:
    return state_bytes(shape.mixing["mamba2"])


def state_bytes(own: Mamba2) -> int:
    """What the convolution and the scan keep."""
    return (own.convolved * (own.width - 1) + own.inner * own.size) * STATE_BYTES


def record(graph: Graph, layer: int, names: list[tuple[str, ...]], x: Any) -> Any:
    own = graph.shape.mixing["mamba2"]
    gate, both, dt = projected(graph, own)
    graph.linear(x, names[0], [gate, both, dt])
    return scan(graph, layer, own)


def projected(graph: Graph, own: Mamba2) -> list[Any]:
    """The buffers of what the first matrix gives: the gate, what is convolved, the time steps."""
    return graph.buffers("mamba2 projected", [own.inner, own.convolved, own.heads])


def scan(graph: Graph, layer: int, own: Mamba2) -> Any:
    """Record the steps from what is ``projected`` up to what the last matrix sees."""
    tape, weights = graph.tape, graph.weights
    module = f"model.layers.{layer}.mamba."
    gate, both, dt = projected(graph, own)
    decay, y = graph.buffers("mamba2", [own.heads, own.inner])
    kernel = weights.vector(f"{module}conv1d.weight").reshape(own.convolved, own.width)
    tape.causal_conv(both, both, kernel, bias=weights.optional(f"{module}conv1d.bias"))
    a = rates(weights.vector(f"{module}A_log"))
    bias, d = weights.vector(f"{module}dt_bias"), weights.vector(f"{module}D")
    tape.time_steps(dt, bias, a=a, decay=decay, limits=own.limits)
    sizes = {"head_dim": own.head_dim, "groups": own.groups, "size": own.size}
    tape.scan(both, dt, decay, y, **sizes, d=d)
    tape.gate(gate, y)
    weight = weights.optional(f"{module}norm.weight")
    if weight is not None:
        tape.group_norm(gate, weight, graph.shape.epsilon, own.groups)
    return gate
