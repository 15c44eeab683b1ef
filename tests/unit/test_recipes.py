"""llama.cpp's mixes, against figures of its own snapshots."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from oracles.tiny import write_tiny_llama

from mlxedge.conversion import plan_conversion
from mlxedge.encodings import F16, F32, GGML
from mlxedge.errors import UsageError
from mlxedge.outputs.gguf import plan_gguf
from mlxedge.prepare import prepare
from mlxedge.recipes.llama_cpp import RECIPES, Shape, choose
from mlxedge.sources import open_source
from mlxedge.targets import GGUF_RECIPES, parse_target


def tensors(layers: int, cols: int = 512, tied: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    made = [("token_embd.weight", (300, cols)), ("output_norm.weight", (cols,))]
    if not tied:
        made.append(("output.weight", (300, cols)))
    for i in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            made.append((f"blk.{i}.{part}.weight", (cols, cols)))
        made.append((f"blk.{i}.attn_norm.weight", (cols,)))
    return made


def kinds(
    recipe: str, part: str, layers: int = 16, *, has_imatrix: bool = False, **shape: int
) -> list[str]:
    made = Shape(layers=layers, gqa=shape.pop("gqa", 2), **shape)
    chosen = choose(recipe, tensors(layers), made, has_imatrix=has_imatrix)
    return [chosen[f"blk.{i}.{part}.weight"].encoding.name for i in range(layers)]


def test_every_target_has_a_recipe() -> None:
    assert set(GGUF_RECIPES) == set(RECIPES)


def test_q4_k_m_gives_more_bits_to_the_ends_and_every_third() -> None:
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    expected = ["q6_k" if i in more else "q4_k" for i in range(16)]
    assert kinds("q4_k_m", "attn_v") == expected
    assert kinds("q4_k_m", "ffn_down") == expected
    assert set(kinds("q4_k_m", "attn_q")) == {"q4_k"}


@pytest.mark.parametrize(
    ("recipe", "part", "expected"),
    [
        ("q2_k", "attn_v", ["q3_k"] * 16),
        ("q2_k", "attn_output", ["q3_k"] * 16),
        ("q3_k_m", "attn_v", ["q5_k"] * 2 + ["q4_k"] * 14),
        ("q3_k_m", "ffn_down", ["q5_k"] + ["q4_k"] * 15),
        ("q3_k_l", "attn_output", ["q5_k"] * 16),
        ("q4_k_s", "attn_v", ["q5_k"] * 4 + ["q4_k"] * 12),
        ("q4_k_s", "ffn_down", ["q5_k"] * 2 + ["q4_k"] * 14),
        ("q5_k_s", "attn_v", ["q5_k"] * 16),
        ("q6_k", "ffn_down", ["q6_k"] * 16),
        ("q2_k_s", "ffn_down", ["q4_k"] * 2 + ["q2_k"] * 14),
        ("iq4_xs", "ffn_down", ["q5_k"] * 2 + ["iq4_xs"] * 14),
        ("iq3_xs", "ffn_up", ["iq3_s"] * 2 + ["iq3_xxs"] * 12 + ["iq3_s"] * 2),
        ("iq3_xs", "attn_q", ["iq3_xxs"] * 16),
        ("iq3_xxs", "attn_v", ["iq3_s"] * 16),
        ("iq3_xxs", "ffn_down", ["q4_k"] * 2 + ["q3_k"] * 14),
        ("iq2_m", "attn_output", ["iq3_s"] * 16),
        ("iq1_s", "attn_output", ["iq2_xxs"] * 16),
        ("iq1_s", "ffn_down", ["q2_k"] * 2 + ["iq1_s"] * 14),
        ("mxfp4_moe", "ffn_up", ["q8_0"] * 16),
    ],
)
def test_mixes(recipe: str, part: str, expected: list[str]) -> None:
    assert kinds(recipe, part) == expected


@pytest.mark.parametrize(
    ("recipe", "part", "expected"),
    [
        ("q4_0", "ffn_down", ["q4_1"] * 2 + ["q4_0"] * 14),
        ("q5_0", "ffn_down", ["q5_1"] * 2 + ["q5_0"] * 14),
        ("iq4_xs", "ffn_down", ["iq4_xs"] * 16),
        ("iq3_xxs", "ffn_down", ["iq3_xxs"] * 16),
        ("iq3_xxs", "attn_v", ["iq3_xxs"] * 16),
        ("q4_k_m", "attn_v", None),
    ],
)
def test_mixes_with_an_imatrix(recipe: str, part: str, expected: list[str] | None) -> None:
    assert kinds(recipe, part, has_imatrix=True) == (expected or kinds(recipe, part))


def test_wide_groups_and_70b() -> None:
    assert kinds("q2_k", "attn_v", gqa=4) == ["q4_k"] * 16
    assert set(kinds("q3_k_s", "attn_v", is_70b=True)) == {"q5_k"}


def test_the_head_gets_six_bits() -> None:
    shape = Shape(layers=2, gqa=1)
    untied = choose("q4_k_m", tensors(2), shape)
    assert untied["output.weight"].encoding is GGML["q6_k"]
    assert untied["token_embd.weight"].encoding is GGML["q4_k"]
    assert (
        choose("q4_k_m", tensors(2, tied=True), shape)["token_embd.weight"].encoding.name == "q6_k"
    )
    assert choose("q8_0", tensors(2), shape)["output.weight"].encoding.name == "q8_0"


@pytest.mark.parametrize(
    ("recipe", "cols", "expected"),
    [
        ("q4_k_s", 576, "q5_0"),
        ("q5_k_s", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        ("q2_k", 576, "q4_0"),
        ("q3_k_s", 576, "q4_0"),
        ("q4_0", 576, "q4_0"),
        ("q4_0", 100, "f16"),
        ("q4_k_s", 100, "f16"),
        ("iq3_s", 576, "iq4_nl"),
        ("iq4_nl", 576, "iq4_nl"),
        ("tq2_0", 576, "q4_0"),
        ("iq1_s", 100, "f16"),
    ],
)
def test_rows_that_do_not_divide(recipe: str, cols: int, expected: str) -> None:
    choice = choose(recipe, tensors(1, cols), Shape(layers=1, gqa=1))["blk.0.ffn_up.weight"]
    assert choice.encoding.name == expected
    assert (choice.reason is not None) == (choice.encoding.name != RECIPES[recipe][0])


def test_norms_stay_f32_and_floats_stay_floats() -> None:
    chosen = choose("f16", tensors(1, 100), Shape(layers=1, gqa=1))
    assert chosen["output_norm.weight"].encoding is F32
    assert chosen["blk.0.ffn_up.weight"].encoding is F16


def test_what_an_imatrix_must_cover(tiny: Path, tmp_path: Path) -> None:
    with open_source(tiny) as source:
        spec, checkpoint = prepare(source)
        plan = functools.partial(
            plan_gguf, checkpoint, spec, checkpoint.config, parse_target("gguf:iq2_xs"),
            tmp_path / "m.gguf",
        )  # fmt: skip
        head = "model.embed_tokens.weight"
        some = {name for name in checkpoint.tensors if "layers.0" in name}
        with pytest.raises(UsageError, match=r"blk\.0\.attn_k\.weight and \d+ more tensors"):
            plan()
        with pytest.raises(UsageError, match=r"blk\.1\.attn_k\.weight and \d+ more tensors"):
            plan(imatrix=True, known=some)
        with pytest.raises(UsageError, match="importance matrix"):
            plan(known=set(checkpoint.tensors))
        whole = plan(imatrix=True, known=set(checkpoint.tensors) - {head})
        assert whole.tensors == plan(imatrix=True).tensors


@pytest.mark.parametrize(
    ("target", "hidden", "notes"),
    [
        (
            "gguf:iq2_xs",
            192,
            ["100% of the weights get a larger type, since rows of 192 and 384 do not divide into "
             "the blocks of the usual one: 5.05 bits per weight instead of 2.78"],
        ),
        ("gguf:iq2_xs", 256, []),
        ("gguf:q4_0", 192, []),
    ],
)  # fmt: skip
def test_a_recipe_that_grows_says_so(
    tmp_path: Path, target: str, hidden: int, notes: list[str]
) -> None:
    model = write_tiny_llama(tmp_path / "m", hidden=hidden, intermediate=2 * hidden)
    with open_source(model) as source:
        plan, _ = plan_conversion(source, [parse_target(target)], tmp_path / "m.gguf")
    assert plan.outputs[0].notes == notes
