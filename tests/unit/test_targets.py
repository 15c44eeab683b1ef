import pytest

from mlxedge.errors import UsageError
from mlxedge.targets import Target, known_targets, parse_target


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("mlx:4bit", Target("mlx", "4bit", 4, 64), "m-mlx-4bit"),
        ("MLX:4bit-g64", Target("mlx", "4bit", 4, 64), "m-mlx-4bit"),
        ("mlx:3bit-g32", Target("mlx", "3bit-g32", 3, 32), "m-mlx-3bit-g32"),
        ("mlx:nvfp4", Target("mlx", "nvfp4"), "m-mlx-nvfp4"),
        ("mlx:bf16", Target("mlx", "bf16"), "m-mlx-bf16"),
        ("gguf:Q4_K_M", Target("gguf", "q4_k_m"), "m-Q4_K_M.gguf"),
        ("gguf:q5_k", Target("gguf", "q5_k_m"), "m-Q5_K_M.gguf"),
        ("gguf:mxfp4_moe", Target("gguf", "mxfp4_moe"), "m-MXFP4_MOE.gguf"),
        ("hf:f16", Target("hf", "f16"), "m-hf-f16"),
    ],
)
def test_parse(text: str, expected: Target, name: str) -> None:
    assert parse_target(text) == expected
    assert expected.default_name("m") == name


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("4bit", "FORMAT:RECIPE"),
        ("mlx:", "FORMAT:RECIPE"),
        ("mlx:7bit", "2, 3, 4, 5, 6, 8"),
        ("mlx:4bit-g16", "32, 64, 128"),
        ("mlx:q4_k", "mxfp4"),
        ("gguf:q4", "q4_k_m"),
        ("hf:q8_0", "bf16"),
        ("onnx:int4", "mlx, gguf or hf"),
    ],
)
def test_a_wrong_target_says_what_is_right(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        parse_target(text)


def test_every_known_target_parses() -> None:
    for text in known_targets():
        assert parse_target(text).spec == text
