"""What the language models of Qwen3.5 share, with and without experts."""

from __future__ import annotations

from mlxedge import gguf_values as gv
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import delta_nets as nets
from mlxedge.models.dense import Dense, Get
from mlxedge.models.experts import Experts
from mlxedge.models.rope import rope_settings
from mlxedge.models.spec import Config, ModelSpec

#: How many pairs of dimensions turn by time, height and width, and by nothing.
_SECTIONS = "rope.dimension_sections"
_DEFAULT_SECTIONS = [11, 11, 10]


def _sections(config: Config) -> list[int]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = rope.get("mrope_section") or _DEFAULT_SECTIONS
    if not isinstance(given, list) or any(type(n) is not int or n < 0 for n in given):
        raise UnsupportedModelError(f"mrope_section is {str(given)[:40]!r}, not a list of numbers")
    return [*given, 0, 0, 0, 0][:4]


def _every_pair_turns(config: Config) -> bool:
    """Whether llama.cpp gives each pair one of the three positions: pairs take turns, each of the
    three as often as its section says, in rounds of all (ggml's ``ggml_mrope_cache_init``)."""
    sections = _sections(config)
    pairs = rope_settings(config).dims(config["head_dim"]) // 2
    place = (pair % max(1, sum(sections)) for pair in range(pairs))
    return all(p < 3 * sections[p % 3] for p in place)


def _gguf(config: Config) -> gv.Metadata:
    return nets.gguf(config) | {_SECTIONS: gv.array("i32", _sections(config))}


def _back(config: Config, get: Get) -> Config:
    rope = config["rope_parameters"]
    if (sections := get(_SECTIONS)) is not None:
        rope = rope | {"mrope_section": [int(s) for s in sections][:3], "mrope_interleaved": True}
    if config.get("moe_intermediate_size") is not None:
        config = config | {"norm_topk_prob": True}
    return nets.back(config | {"rope_parameters": rope}, get)


def qwen3_5(
    model_type: str, architecture: str, arch: str, whole: str, experts: Experts | None = None
) -> ModelSpec:
    """``whole`` is the type of the model that sees as well, as which mlx-lm knows this part."""
    shared = nets.check(experts)

    def adopt(config: Config) -> Config:
        """A width that no layer has, for readers that ask for one."""
        if experts is None:
            return config
        width = config.get("moe_intermediate_size", 512)
        return {"intermediate_size": width, "moe_intermediate_size": width,
                "shared_expert_intermediate_size": 512} | config  # fmt: skip

    def settle(config: Config) -> Config:
        config = nets.settle(config)
        _sections(config)
        return config | ({"norm_topk_prob": True} if experts else {})

    def check(config: Config, runtime: str) -> list[str]:
        found = shared(config, runtime)
        if runtime == "gguf" and not _every_pair_turns(config):
            found.append("llama.cpp needs an mrope_section that covers what rotates")
        return found

    return Dense(
        model_type=model_type,
        architecture=architecture,
        arch=arch,
        names=nets.delta_names(experts),
        wiring=nets.WIRING,
        fixed={"attention_bias": False},
        defaults=nets.DEFAULTS,
        experts=experts,
        mixers=nets.mixers,
        recasts=(*nets.MLX, *nets.TILED, *(nets.stacked_in_one() if experts else ())),
        drops_predicting=True,
        within=("language_model.", whole),
        adopts=adopt,
        settles=settle,
        mlx=nets.mlx,
        gguf=_gguf,
        check=check,
        back=_back,
    ).spec()
