"""Types that the user names: parsed at the edge, applied by name, refused when they say nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

import mlxedge
from mlxedge.conversion import plan_conversion
from mlxedge.encodings import BF16, GGML, MLX_FLOAT, Affine
from mlxedge.errors import UsageError
from mlxedge.recipes.llama_cpp import Shape, choose
from mlxedge.recipes.overrides import NONE, Overrides, parse_overrides, with_scales
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf
from mlxedge.targets import Target, parse_target

DOWN, UP, VALUE = (f"model.layers.0.{part}_proj" for part in ("mlp.down", "mlp.up", "self_attn.v"))

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

#: The plain rules: what is asked here is which types there are.
convert = functools.partial(mlxedge.convert, quality="reference", calibrate=False)


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.encoding.name for t in read_gguf(path).tensors}


def test_a_type_is_of_the_formats_that_have_it() -> None:
    made = parse_overrides(["a=Q6_K", "b=6bit", "c=bf16", "d=mxfp4", "e=4bit-g32"])
    found = {r.pattern.pattern: (r.type.gguf, r.type.mlx) for r in made.rules}
    assert found == {
        "a": (GGML["q6_k"], None),
        "b": (None, Affine(6, 64)),
        "c": (BF16, BF16),
        "d": (GGML["mxfp4"], MLX_FLOAT["mxfp4"]),
        "e": (None, Affine(4, 32)),
    }
    assert with_scales(Affine(4, 32), "f16") == Affine(4, 32, "f16")
    assert with_scales(BF16, "f16") == BF16


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ffn_down", "write REGEX=TYPE"),
        ("=q4_k", "write REGEX=TYPE"),
        ("ffn_down=", "write REGEX=TYPE"),
        ("ffn_(down=q4_k", "not a regular expression"),
        ("ffn_down=q4_k_m", "unknown type 'q4_k_m': GGUF has f32, .*q4_k, .*MLX has BITSbit"),
        ("ffn_down=7bit", "unknown type"),
        ("ffn_down=4bit-g48", "unknown type"),
        ("ffn_down=nvfp9", "unknown type"),
    ],
)
def test_what_cannot_be_parsed(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_overrides([text])


def test_head_and_embedding_name_their_option() -> None:
    with pytest.raises(UsageError, match="--output-type: unknown type 'q9'"):
        parse_overrides(output="q9")
    with pytest.raises(UsageError, match="--embedding-type: unknown type"):
        parse_overrides(embedding="q9")


def test_the_last_equals_sign_parts_type_and_pattern() -> None:
    rule = parse_overrides([r"ffn_(?=down)=q4_k"]).rules[0]
    assert rule.pattern.search("blk.0.ffn_down.weight")
    assert not rule.pattern.search("blk.0.ffn_up.weight")


def test_nothing_is_false() -> None:
    assert not parse_overrides()
    assert parse_overrides() == NONE
    assert parse_overrides(pure=True)


def test_the_first_rule_that_matches_counts() -> None:
    made = parse_overrides([r"blk\.0\.=q8_0", "down=6bit", "weight=q4_k"])
    assert made.named("blk.0.ffn_down.weight", "gguf") == GGML["q8_0"]
    assert made.named("blk.1.ffn_down.weight", "gguf") == GGML["q4_k"]
    assert made.named("blk.1.ffn_down.weight", "mlx") == Affine(6, 64)
    assert made.named("blk.1.ffn_down.bias", "gguf") is None


def test_head_and_embedding_come_first() -> None:
    made = parse_overrides(["weight=q4_k"], output="q6_k", embedding="q8_0")
    assert made.find("output.weight", "gguf", "output") == GGML["q6_k"]
    assert made.find("token_embd.weight", "gguf", "embedding", tied=True) == GGML["q8_0"]
    assert made.find("output.weight", "mlx", "output") is None
    head = parse_overrides(["embd=q4_k"], output="q6_k")
    assert head.find("token_embd.weight", "gguf", "embedding", tied=True) == GGML["q4_k"]
    assert Overrides(output=head.output).find("t", "gguf", "embedding", tied=True) == GGML["q6_k"]
    assert Overrides(output=head.output).find("t", "gguf", "embedding") is None


def test_the_head_of_a_tied_model_hears_where_llama_quantize_does_not() -> None:
    tensors = [("token_embd.weight", (300, 256)), ("blk.0.ffn_up.weight", (256, 256))]
    for recipe, main in (("q4_k_m", "q4_k"), ("f16", "f16")):
        made = parse_overrides(["up=q5_k"], output="q8_0", pure=True)
        chosen = choose(recipe, tensors, Shape(1, 1), overrides=made)
        assert chosen["token_embd.weight"].encoding.name == "q8_0"
        assert chosen["blk.0.ffn_up.weight"].encoding.name == "q5_k"
        assert chosen["blk.0.ffn_up.weight"].reason == "as told"
        assert choose(recipe, tensors, Shape(1, 1))["blk.0.ffn_up.weight"].encoding.name == main


def test_a_rule_that_is_for_no_target() -> None:
    made = parse_overrides(["down=q6_k"])
    made.check_targets(targets("mlx:4bit", "gguf:q4_0"))
    with pytest.raises(UsageError, match="q6_k is a type of gguf targets, and there is none"):
        made.check_targets(targets("mlx:4bit"))
    with pytest.raises(UsageError, match="--output-type: 6bit is a type of mlx"):
        parse_overrides(output="6bit").check_targets(targets("gguf:q4_0", "hf:bf16"))
    parse_overrides(["x=bf16"], embedding="f16").check_targets(targets("mlx:4bit"))
    with pytest.raises(UsageError, match="of gguf and mlx targets"):
        parse_overrides(["x=bf16"]).check_targets(targets("hf:bf16"))
    for none in ("mlx:4bit", "hf:bf16", "gguf:f16"):
        with pytest.raises(UsageError, match="--pure: only quantized gguf targets mix"):
            parse_overrides(pure=True).check_targets(targets(none))


def test_a_target_says_what_changes_nothing_in_it(tiny: Path, tmp_path: Path) -> None:
    made = parse_overrides(output="q6_k", embedding="bf16", pure=True)
    both = targets("gguf:q4_0", "mlx:4bit", "hf:bf16", "gguf:f16")
    with open_source(tiny) as source:
        plan, _ = plan_conversion(source, both, tmp_path, quality="reference", overrides=made)
    pure = "--pure changes nothing here: this target mixes no types"
    head = "--output-type q6_k changes nothing here: it is a type of gguf targets"
    table = "--embedding-type bf16 changes nothing here: it is a type of gguf and mlx targets"
    assert [o.notes for o in plan.outputs] == [[], [head, pure], [head, table, pure], [pure]]


def targets(*specs: str) -> list[Target]:
    return [parse_target(spec) for spec in specs]


def test_a_rule_that_matches_nothing() -> None:
    names = ["blk.0.ffn_down.weight"]
    with pytest.raises(UsageError, match="no matrix with such a name; its names are like blk"):
        parse_overrides(["down_proj=q6_k"]).unmatched("gguf", names)
    assert parse_overrides(["down_proj=6bit", "ffn=q6_k"]).unmatched("gguf", names) == []
    (note,) = parse_overrides(["down_proj=bf16"]).unmatched("gguf", names)
    assert "--tensor down_proj=bf16" in note


def test_a_gguf_file(tiny: Path, tmp_path: Path) -> None:
    made = parse_overrides(
        ["ffn_down=q8_0", r"blk\.1\.=q5_0"], output="q5_1", embedding="q4_1", pure=True
    )
    convert(tiny, "gguf:q4_0", tmp_path / "m.gguf", overrides=made)
    found = types_of(tmp_path / "m.gguf")
    assert {k: v for k, v in found.items() if v != "f32"} == {
        "token_embd.weight": "q4_1",
        **{
            f"blk.{i}.{part}.weight": "q8_0" if part == "ffn_down" else ("q4_0", "q5_0")[i]
            for i in (0, 1)
            for part in MATRICES
        },
    }


def test_an_mlx_folder(tiny: Path, tmp_path: Path) -> None:
    made = parse_overrides(
        [r"layers\.0.*down=8bit-g32", r"layers\.0.*up=mxfp4", "v_proj=bf16", "norm|o_proj=4bit"],
        output="6bit",
    )
    convert(tiny, "mlx:4bit", tmp_path / "m", overrides=made)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert settings == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        DOWN: {"group_size": 32, "bits": 8, "mode": "affine"},
        UP: {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        VALUE: False,
        VALUE.replace(".0.", ".1."): False,
        "model.embed_tokens": {"group_size": 64, "bits": 6, "mode": "affine"},
    }
    with open_source(tmp_path / "m") as source:
        found = {n: t.encoding for n, t in source.tensors.items() if len(t.shape) > 1}
    assert found[f"{DOWN}.weight"] == Affine(8, 32)
    assert found[f"{UP}.weight"] == MLX_FLOAT["mxfp4"]
    assert found[f"{VALUE}.weight"] == BF16
    assert found["model.embed_tokens.weight"] == Affine(6, 64)
    assert found["model.layers.1.mlp.down_proj.weight"] == Affine(4, 64)


def test_quantized_parts_of_a_plain_mlx_folder(tiny: Path, tmp_path: Path) -> None:
    made = parse_overrides([r"mlp\.down=8bit", "q_proj=f16", "k_proj=bf16"])
    convert(tiny, "mlx:bf16", tmp_path / "m", overrides=made)
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert settings == {**eight, DOWN: eight, DOWN.replace(".0.", ".1."): eight}


def test_both_targets_take_their_own(tiny: Path, tmp_path: Path) -> None:
    made = parse_overrides(["ffn_down=q8_0", "down_proj=8bit"])
    convert(tiny, ["gguf:q4_0", "mlx:4bit"], tmp_path, overrides=made)
    assert types_of(tmp_path / "tiny-llama-Q4_0.gguf")["blk.0.ffn_down.weight"] == "q8_0"
    config = json.loads((tmp_path / "tiny-llama-mlx-4bit" / "config.json").read_text())
    assert config["quantization"][DOWN]["bits"] == 8


@pytest.mark.parametrize(
    ("target", "rule", "problem"),
    [
        ("gguf:q4_0", "down_proj=q8_0", "no matrix with such a name"),
        ("mlx:4bit", "ffn_down=8bit", "no matrix with such a name"),
        ("mlx:4bit", "norm=8bit", "no matrix with such a name"),
        ("gguf:q4_0", "norm=q8_0", "no matrix with such a name"),
        ("mlx:4bit", "down=q8_0", "there is none"),
        ("hf:bf16", "down=bf16", "there is none"),
        ("gguf:q4_0", "ffn_down=iq2_xs", "garbage without an importance matrix"),
        ("gguf:iq2_xs", "ffn_down=q8_0", "garbage without an importance matrix"),
    ],
)
def test_nothing_is_begun(target: str, rule: str, problem: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        convert(tiny, target, tmp_path / "out", overrides=parse_overrides([rule]))
    assert list(tmp_path.iterdir()) == []
