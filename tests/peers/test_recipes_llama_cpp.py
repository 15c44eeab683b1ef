"""Every GGUF recipe against ``llama_model_quantize``: the same types and the same bytes."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.gguf_models import write_gguf_model
from oracles.llama_quantize import Options, Refused, quantize, types
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.encodings import F32, GGML, PLAIN, Encoding
from mlxedge.errors import UsageError
from mlxedge.fallback import OPS
from mlxedge.outputs.gguf_file import type_id
from mlxedge.recipes.llama_cpp import Choice, Shape, check_importance, choose
from mlxedge.recipes.llama_cpp_mixes import RECIPES, SHAPE_FALLBACK
from mlxedge.recipes.overrides import parse_overrides
from mlxedge.sources.gguf import read_gguf

QUANTIZED = [r for r in RECIPES if r not in PLAIN]
#: Those that need no importance matrix.
UNINFORMED = [
    "q4_0", "q4_1", "q8_0", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s",
    "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4_moe",
]  # fmt: skip
#: Recipes that between them make every type but IQ1_M, where this build of ggml breaks ties in
#: another way than that of tests/ops.
BYTES = {
    0: sorted({RECIPES[r][0]: r for r in QUANTIZED if r != "iq1_m"}.values()),
    8: ["q4_k_m", "q5_0", "iq2_xs", "iq4_nl", "mxfp4_moe"],
}
#: Layers enough for every third one to differ; 288 columns divide by 32 and not by 256.
MODELS = {
    "llama": {"layers": 9},
    "untied": {"layers": 4, "tied": False, "heads": 8, "kv_heads": 2},
    "narrow": {"layers": 3, "hidden": 288, "intermediate": 544, "heads": 9, "kv_heads": 3},
    "qwen2": {"layers": 4, "model_type": "qwen2"},
    "qwen3": {"layers": 4, "model_type": "qwen3", "head_dim": 128},
}
#: Shapes alone: query heads per key head, ties, experts, rows that no block divides, the 70B rule.
SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {"layers": 1},
    "no sharing": {"layers": 16, "heads": 4, "kv_heads": 4},
    "four to one": {"layers": 16, "heads": 8, "kv_heads": 2},
    "eight to one, tied": {"layers": 33, "heads": 8, "kv_heads": 1, "tied": True},
    "288 wide": {"layers": 8, "hidden": 288, "intermediate": 544, "heads": 9, "kv_heads": 3},
    "288 wide, tied": {"layers": 8, "hidden": 288, "heads": 9, "kv_heads": 3, "tied": True},
    "70B llama": {"layers": 80, "heads": 8, "kv_heads": 1, "is_70b": True},
    "65B llama": {"layers": 80, "heads": 4, "kv_heads": 4},
    "72B qwen2": {"layers": 80, "heads": 4, "kv_heads": 4, "arch": "qwen2", "is_70b": True},
    "two experts": {"layers": 16, "experts": 2},
    "four experts": {"layers": 16, "experts": 4, "heads": 4, "kv_heads": 4},
    "eight experts": {"layers": 32, "experts": 8},
    "eight experts, shared": {"layers": 17, "experts": 8, "heads": 8, "kv_heads": 2, "tied": True},
}


def test_the_recipes_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Every number that it takes, but for types that GGML does not list here."""
    write_gguf_model(tmp_path / "m.gguf", seed=None)
    taken = set()
    for number in range(64):
        with contextlib.suppress(Refused):
            types(tmp_path / "m.gguf", number)
            taken.add(number)
    unlisted = {40, 41}  # Q1_0, Q2_0
    assert taken - unlisted == {number for _, number in RECIPES.values()}


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", SHAPES)
def test_types_equal_llama_cpps(name: str, imatrix: bool, tmp_path: Path) -> None:
    settings = dict(SHAPES[name])
    is_70b = settings.pop("is_70b", False)
    path = tmp_path / "m.gguf"
    shapes = write_gguf_model(path, seed=None, **settings)
    gqa = settings.get("heads", 4) // settings.get("kv_heads", 2)
    shape = Shape(settings["layers"], gqa, settings.get("experts", 0), is_70b)
    options = Options(imatrix={"none": np.ones(1)} if imatrix else None)
    for recipe, (_, number) in RECIPES.items():
        ours = choose(recipe, shapes.items(), shape, has_imatrix=imatrix)
        if recipe in PLAIN:
            # The dry run of a float recipe leaves what it copies out of the quantizer.
            expected = {n: "f32" if len(d) < 2 or "gate_inp" in n else recipe
                        for n, d in shapes.items()}  # fmt: skip
        else:
            expected = types(path, number, options)
        assert kinds(ours) == expected, recipe


#: Recipe, tensor rules, head, embedding, pure.
OVERRIDES: list[tuple[str, list[str], str | None, str | None, bool]] = [
    ("q4_k_m", ["ffn_down=q8_0"], None, None, False),
    ("q4_k_m", ["attn_v=Q5_K", r"blk\.[0-3]\..*=f16"], None, None, False),
    ("q4_k_m", [r"blk\.(1|2)\.ffn_down\.weight=q4_k", "ffn=q5_0"], None, None, False),
    ("q4_k_m", ["norm=q8_0", "weight=q6_k"], None, None, False),
    ("q4_k_m", [], "q8_0", None, False),
    ("q4_k_m", [], None, "q8_0", False),
    ("q4_k_m", ["token_embd=q4_0", "output=q5_0"], "f16", None, False),
    ("q4_k_m", ["token_embd=q4_0"], None, "bf16", False),
    ("q2_k", [], "q5_k", "q3_k", True),
    ("q3_k_l", [], None, None, True),
    ("iq4_xs", ["attn=q6_k"], None, None, True),
    ("iq3_xxs", ["ATTN_K=iq4_nl"], "q5_k", "q4_k", False),
    ("mxfp4_moe", ["ffn_up=mxfp4"], None, None, False),
]


@pytest.mark.parametrize("case", range(len(OVERRIDES)))
@pytest.mark.parametrize("name", ["no sharing", "eight to one, tied", "288 wide", "eight experts"])
def test_overridden_types_equal_llama_cpps(case: int, name: str, tmp_path: Path) -> None:
    recipe, rules, output, embedding, pure = OVERRIDES[case]
    settings = SHAPES[name]
    path = tmp_path / "m.gguf"
    shapes = write_gguf_model(path, seed=None, **settings)
    gqa = settings.get("heads", 4) // settings.get("kv_heads", 2)
    number: dict[str, Encoding] = {**GGML, **PLAIN}
    options = Options(
        tensors=[
            (pattern.lower(), type_id(number[kind.lower()]))
            for pattern, _, kind in (rule.partition("=") for rule in rules)
        ],
        output=type_id(number[output]) if output else None,
        embedding=type_id(number[embedding]) if embedding else None,
        pure=pure,
    )
    overrides = parse_overrides(rules, output=output, embedding=embedding, pure=pure)
    ours = choose(
        recipe,
        shapes.items(),
        Shape(settings["layers"], gqa, settings.get("experts", 0)),
        overrides=overrides,
    )
    expected = types(path, RECIPES[recipe][1], options)
    for head in {"output.weight", "token_embd.weight"} & set(shapes):
        if shapes[head][-1] % GGML.get(expected[head], F32).block:
            expected[head] = SHAPE_FALLBACK[expected[head]]  # llama.cpp would fail at work
    assert kinds(ours) == expected


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_needs_an_imatrix_where_llama_cpp_does(recipe: str, tmp_path: Path) -> None:
    settings = {"layers": 2, "hidden": 256, "intermediate": 256, "vocab": 259}
    shapes = write_gguf_model(tmp_path / "m.gguf", **settings)  # type: ignore[arg-type]
    choices = choose(recipe, shapes.items(), Shape(2, 2))
    number, made = RECIPES[recipe][1], tmp_path / "q.gguf"
    if recipe in UNINFORMED or recipe in ("iq3_s", "iq3_m"):
        quantize(tmp_path / "m.gguf", made, number)
        check_importance(recipe, choices, set())
        return
    with pytest.raises(Refused, match="requires an imatrix"):
        quantize(tmp_path / "m.gguf", made, number)
    with pytest.raises(UsageError, match="importance matrix"):
        check_importance(recipe, choices, set())
    known = {n for n in shapes if n not in ("blk.1.attn_q.weight", "token_embd.weight")}
    with pytest.raises(UsageError, match=r"blk\.1\.attn_q\.weight would be"):
        check_importance(recipe, choices, known)
    check_importance(recipe, choices, set(shapes) - {"token_embd.weight", "output.weight"})


@pytest.mark.parametrize("model", MODELS)
def test_types_and_bytes_equal_llama_cpps(model: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / model, **MODELS[model])  # type: ignore[arg-type]
    convert = functools.partial(mlxedge.convert, quality="reference", calibrate=False)
    convert(folder, ["gguf:f32", *(f"gguf:{r}" for r in UNINFORMED)], tmp_path)
    for recipe in UNINFORMED:
        peer = tmp_path / "peer.gguf"
        quantize(tmp_path / f"{model}-F32.gguf", peer, RECIPES[recipe][1])
        assert tensors(tmp_path / f"{model}-{recipe.upper()}.gguf") == tensors(peer), recipe


@pytest.mark.parametrize(("experts", "recipe"), [(n, r) for n in BYTES for r in BYTES[n]])
def test_bytes_with_an_imatrix_equal_llama_cpps(experts: int, recipe: str, tmp_path: Path) -> None:
    path, made = tmp_path / "m.gguf", tmp_path / "q.gguf"
    shapes = write_gguf_model(path, experts=experts, vocab=260)
    rng = np.random.default_rng(1)
    imatrix = {
        name: rng.exponential(size=(*dims[:-2], dims[-1])).astype(np.float32)
        for name, dims in shapes.items()
        if len(dims) > 1
    }
    quantize(path, made, RECIPES[recipe][1], options=Options(imatrix=imatrix))
    choices = choose(recipe, shapes.items(), Shape(1, 2, experts), has_imatrix=True)
    source = tensors(path)
    for name, (kind, theirs) in tensors(made).items():
        encoding = choices[name].encoding
        assert encoding.name == kind, name
        if name not in imatrix:
            continue
        stack = imatrix[name].reshape(-1, shapes[name][-1])
        weights = np.frombuffer(source[name][1], "<f4").reshape(len(stack), -1, stack.shape[1])
        ours = [
            OPS.encode(matrix, encoding, importance)["weight"].tobytes()
            for matrix, importance in zip(weights, stack, strict=True)
        ]
        assert b"".join(ours) == theirs, (name, kind)


def kinds(choices: dict[str, Choice]) -> dict[str, str]:
    return {name: choice.encoding.name for name, choice in choices.items()}


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {
        t.name: (t.encoding.name, data[t.offset : t.offset + t.nbytes])
        for t in read_gguf(path).tensors
    }
