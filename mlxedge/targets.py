"""``--to``: what a user asks for, parsed once.

mlx:4bit  mlx:4bit-g32  mlx:mxfp4  mlx:bf16    an MLX folder
gguf:q4_k_m  gguf:q8_0  gguf:f16               a GGUF file, by llama.cpp's recipe of that name
hf:bf16                                        a folder that transformers loads
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS, MLX_FLOAT
from mlxedge.encodings.plain import PLAIN
from mlxedge.errors import UsageError

Format = Literal["mlx", "gguf", "hf"]

GGUF_RECIPES = (
    *PLAIN, "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l",
    "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s",
    "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0",
    "mxfp4_moe",
)  # fmt: skip
#: What llama-quantize calls them too.
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_AFFINE = re.compile(r"(\d+)bit(?:-g(\d+))?")


@dataclass(frozen=True)
class Target:
    """One requested output. ``recipe`` is the part after the colon, normalised; for affine MLX
    targets ``bits`` and ``group`` are set."""

    format: Format
    recipe: str
    bits: int | None = None
    group: int | None = None

    @property
    def spec(self) -> str:
        return f"{self.format}:{self.recipe}"

    @property
    def is_folder(self) -> bool:
        return self.format != "gguf"

    def default_name(self, model: str) -> str:
        """The name inside a parent folder: ``NAME-Q4_K_M.gguf``, ``NAME-mlx-4bit``."""
        if self.format == "gguf":
            return f"{model}-{self.recipe.upper()}.gguf"
        return f"{model}-{self.format}-{self.recipe}"


def known_targets() -> list[str]:
    """Every recipe, for help texts."""
    mlx = [f"mlx:{b}bit" for b in AFFINE_BITS] + [f"mlx:{m}" for m in (*MLX_FLOAT, *PLAIN)]
    return [*mlx, *(f"gguf:{r}" for r in GGUF_RECIPES), *(f"hf:{p}" for p in PLAIN)]


def parse_target(text: str) -> Target:
    """Parse a ``--to`` value; raises UsageError that names what is possible."""
    kind, colon, recipe = text.strip().lower().partition(":")
    if not colon or not recipe:
        raise UsageError(
            f"target {text!r}: write FORMAT:RECIPE, for example mlx:4bit or gguf:q4_k_m"
        )
    if kind == "mlx":
        if match := _AFFINE.fullmatch(recipe):
            bits, group = int(match[1]), int(match[2] or 64)
            if bits not in AFFINE_BITS or group not in AFFINE_GROUPS:
                raise UsageError(
                    f"target {text!r}: MLX takes {_list(AFFINE_BITS)} bits "
                    f"and groups of {_list(AFFINE_GROUPS)}"
                )
            name = f"{bits}bit" if group == 64 else f"{bits}bit-g{group}"
            return Target("mlx", name, bits, group)
        if recipe in MLX_FLOAT or recipe in PLAIN:
            return Target("mlx", recipe)
        raise UsageError(
            f"target {text!r}: mlx takes BITSbit[-gGROUP], {_list((*MLX_FLOAT, *PLAIN))}"
        )
    if kind == "gguf":
        recipe = _ALIASES.get(recipe, recipe)
        if recipe in GGUF_RECIPES:
            return Target("gguf", recipe)
        raise UsageError(f"target {text!r}: gguf takes {_list(GGUF_RECIPES)}")
    if kind == "hf":
        if recipe in PLAIN:
            return Target("hf", recipe)
        raise UsageError(f"target {text!r}: hf takes {_list(tuple(PLAIN))}")
    raise UsageError(f"target {text!r}: unknown format {kind!r}: use mlx, gguf or hf")


def _list(items: tuple[object, ...]) -> str:
    return ", ".join(str(i) for i in items)
