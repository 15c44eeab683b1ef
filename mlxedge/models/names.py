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
    stacks: str = "switch_mlp", apart: bool = True,
    called: Mapping[str, str] | None = None,
    mlx_called: Mapping[str, str] | None = None, learned_positions: bool = False,
) -> tuple[Name, ...]:  # fmt: skip
    """The tensors of a decoder. ``rope_rows``: Q and K are interleaved in GGUF. With ``experts``,
    files call the module that holds them ``block``, and gate, up and down of one expert ``parts``,
    if each is a tensor of its own there (``apart``); mlx-lm calls the module of all ``stacks``.
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
        *(_SINKS if wiring.sinks else ()),
        *(_expert_names(experts, block, parts if apart else None, stacks) if experts else ()),
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


_SINKS = (Name(f"{_BLOCK}self_attn.sinks", "blk.{i}.attn_sinks.weight", ("heads",)),)


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


def _expert_names(
    experts: Experts, block: str, parts: Sequence[str] | None, stacks: str
) -> Iterator[Name]:
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
    if experts.biases:
        gguf = "blk.{i}.ffn_gate_inp.bias"
        yield Name(f"{_BLOCK}{ROUTER}.bias", gguf, ("experts",), layers=layers)
    for number, (stack, kind, shape) in enumerate(
        zip(STACKS, ("gate", "up", "down"), shapes, strict=True)
    ):
        one = f"{_BLOCK}{block}.experts.{{e}}.{parts[number]}" if parts else None
        both = f"{_BLOCK}{stack}", f"blk.{{i}}.ffn_{kind}_exps"
        mlx = f"{_BLOCK}{block}.{stacks}.{kind}_proj"
        for leaf, dims in (("weight", shape), ("bias", shape[:1]))[: 1 + experts.biases]:
            hf, gguf = (f"{module}.{leaf}" for module in both)
            stored = one and f"{one}.{leaf}"
            size = ("experts", *dims)
            yield Name(hf, gguf, size, layers=layers, stored=stored, mlx=f"{mlx}.{leaf}")
    width = experts.shared_width
    if width is None:
        return

    def shared(config: Config) -> bool:
        return bool(config[width])

    for module, kind, (rows, cols) in zip(SHARED, ("gate", "up", "down"), shapes, strict=True):
        wide = tuple("shared" if word == "expert" else word for word in (rows, cols))
        gguf = f"blk.{{i}}.ffn_{kind}_shexp.weight"
        yield Name(f"{_BLOCK}{module}.weight", gguf, wide, present=shared, layers=layers)
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
