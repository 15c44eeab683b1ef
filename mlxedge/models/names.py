"""The tensors of a decoder in Hugging Face, GGUF and MLX, by how its blocks are wired."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlxedge.models.experts import ROUTER, ROUTER_BIAS, SHARED, SHARED_GATE, STACKS, Experts
from mlxedge.models.spec import Config, Name, RowOrder
from mlxedge.models.wiring import PRE_NORM, Wiring

_BLOCK = "model.layers.{i}."
#: Whether a tensor is there: always, never, or as the config key of that name says.
Given = bool | str


def names(
    wiring: Wiring = PRE_NORM, *, rope_rows: bool = False, qkv_bias: Given = False,
    o_bias: Given = False, mlp_bias: Given = False, norm_bias: Given = False,
    experts: Experts | None = None, block: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    called: Mapping[str, str] | None = None,
    mlx_called: Mapping[str, str] | None = None, learned_positions: bool = False,
) -> tuple[Name, ...]:  # fmt: skip
    """The tensors of a decoder. ``rope_rows``: Q and K are interleaved in GGUF. With ``experts``,
    files call the module that holds them ``block``, and gate, up and down of one expert ``parts``.
    ``called`` are modules that files call otherwise, those of a layer without its prefix, which
    is ``model.layers`` there; ``mlx_called`` those of MLX folders, if they are others.
    ``learned_positions``: each has a row of a table."""
    wide, narrow = ("intermediate", "hidden"), ("hidden", "intermediate")
    top: list[tuple[Any, ...]] = [
        ("model.embed_tokens.weight", "token_embd.weight", ("vocab", "hidden")),
        ("lm_head.weight", "output.weight", ("vocab", "hidden"), "same", _untied),
    ]
    if learned_positions:
        hf = "model.embed_positions.weight"
        top.append((hf, "position_embd.weight", ("positions", "hidden")))
    layer = [*_attention(wiring, rope_rows, qkv_bias)]
    layer.append(("self_attn.o_proj.weight", "attn_output.weight", ("hidden", "q")))
    if o_bias:
        layer.append(
            ("self_attn.o_proj.bias", "attn_output.bias", ("hidden",), "same", _given(o_bias))
        )
    if experts is None or experts.sparse:
        dense = ("same", _always, experts.dense_layers) if experts else ()
        if wiring.mlp == "fused":
            layer.append(("mlp.gate_up_proj.weight", "ffn_up.weight", ("gate_up", "hidden")))
        elif wiring.mlp == "gated":
            layer.append(("mlp.gate_proj.weight", "ffn_gate.weight", wide, *dense))
        if wiring.mlp in ("gated", "plain"):
            layer.append(("mlp.up_proj.weight", "ffn_up.weight", wide, *dense))
        if wiring.mlp != "none":
            layer.append(("mlp.down_proj.weight", "ffn_down.weight", narrow, *dense))
    if mlp_bias:
        given = _given(mlp_bias)
        kinds = [("up", "intermediate"), ("down", "hidden")]
        if wiring.mlp == "gated":
            kinds.append(("gate", "intermediate"))
        for part, width in kinds:
            layer.append((f"mlp.{part}_proj.bias", f"ffn_{part}.bias", (width,), "same", given))
    norms = [] if wiring.bare_norm else [*_norms(wiring)]
    made = [
        *(Name(*entry) for entry in top),
        *(() if wiring.bare_norm else _norm("model.norm", "output_norm", wiring, norm_bias)),
        *(
            _norm("model.embed_norm", "token_embd_norm", wiring, norm_bias)
            if wiring.embedding_norm
            else ()
        ),
        *(Name(_BLOCK + hf, "blk.{i}." + gguf, *rest) for hf, gguf, *rest in layer),
        *(
            n
            for hf, gguf in norms
            for n in _norm(_BLOCK + hf, f"blk.{{i}}.{gguf}", wiring, norm_bias)
        ),
        *_head_norms(wiring),
        *(_expert_names(experts, block, parts) if experts else ()),
    ]
    return tuple(_called(name, called or {}, mlx_called) for name in made)


def in_layers(
    made: Sequence[Name], module: str, layers: Callable[[Config], Collection[int]]
) -> tuple[Name, ...]:
    """Those of a ``module`` of a block are in some layers only."""
    within = f"{_BLOCK}{module}."
    return tuple(replace(n, layers=layers) if n.hf.startswith(within) else n for n in made)


def _attention(wiring: Wiring, rope_rows: bool, bias: Given) -> Iterator[tuple[Any, ...]]:
    orders: tuple[RowOrder, ...] = ("rope_q", "rope_k") if rope_rows else ("same", "same")
    parts: list[tuple[str, str, str, RowOrder]] = [
        ("q_proj", "attn_q", "q", orders[0]),
        ("k_proj", "attn_k", "kv", orders[1]),
        ("v_proj", "attn_v", "kv", "same"),
    ]
    if wiring.qkv_fused:
        parts = [("qkv_proj", "attn_qkv", "qkv", "same")]
    for hf, gguf, rows, order in parts:
        yield f"self_attn.{hf}.weight", f"{gguf}.weight", (rows, "hidden"), order
        if bias:
            yield f"self_attn.{hf}.bias", f"{gguf}.bias", (rows,), order, _given(bias)


def _norms(wiring: Wiring) -> Iterator[tuple[str, str]]:
    for module, gguf in (
        (wiring.attention_norm, "attn_norm"),
        (wiring.attention_out_norm, "post_attention_norm"),
        (wiring.mlp_norm, "ffn_norm"),
        (wiring.mlp_out_norm, "post_ffw_norm"),
    ):
        if module is not None:
            yield module, gguf


def _norm(hf: str, gguf: str, wiring: Wiring, bias: Given) -> Iterator[Name]:
    yield Name(f"{hf}.weight", f"{gguf}.weight", ("hidden",), offset=float(wiring.unit_norm))
    if bias:
        yield Name(f"{hf}.bias", f"{gguf}.bias", ("hidden",), present=_given(bias))


def _head_norms(wiring: Wiring) -> Iterator[Name]:
    if wiring.head_norm is None:
        return
    offset = float(wiring.unit_norm)
    for part, width in (("q", "q"), ("k", "kv")):
        shape = (width if wiring.head_norm == "width" else "head",)
        hf = f"{_BLOCK}self_attn.{part}_norm.weight"
        yield Name(hf, f"blk.{{i}}.attn_{part}_norm.weight", shape, offset=offset)


def _called(name: Name, called: Mapping[str, str], mlx: Mapping[str, str] | None) -> Name:
    """With the names that files have for it."""
    stored = _other(name.hf, called)
    other = stored if mlx is None else _other(name.hf, mlx)
    return replace(name, stored=stored or name.stored, mlx=other or name.mlx)


def _other(hf: str, called: Mapping[str, str]) -> str | None:
    module, _, leaf = hf.rpartition(".")
    home = f"{called.get('model.layers', 'model.layers')}.{{i}}."
    inner = module.removeprefix(_BLOCK)
    own = called.get(inner, inner)
    other = f"{home}{own}.{leaf}" if module.startswith(_BLOCK) else f"{own}.{leaf}"
    return None if other == hf else other


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
    if experts.bias:
        gguf = "blk.{i}.exp_probs_b.bias"
        yield Name(f"{_BLOCK}{ROUTER_BIAS}", gguf, ("experts",), layers=layers, exact=True)
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
    if not experts.shared_gate:
        return
    gguf = "blk.{i}.ffn_gate_inp_shexp.weight"
    yield Name(f"{_BLOCK}{SHARED_GATE}.weight", gguf, ("one", "hidden"), layers=layers)


def _given(bias: Given) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(bias)) if isinstance(bias, str) else bias


def _always(config: Config) -> bool:
    return True


def _untied(config: Config) -> bool:
    return not config["tie_word_embeddings"]
