"""What to tell of weights that are quantized already and are quantized a second time: that costs
quality, and often for nothing. A recipe means what it means in llama.cpp, whatever the source is:
nothing is changed here, but the note says which option or which target would keep the codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlxedge.encodings import GGML, PLAIN, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS, MLX_FLOAT
from mlxedge.ops import load_reference
from mlxedge.plan import OutputPlan, PlannedTensor, keeps_codes
from mlxedge.recipes.llama_cpp_mixes import RECIPES

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor

_Pair = tuple[PlannedTensor, "SourceTensor"]
_ENDS = ("token_embd.weight", "output.weight")


def requantized_notes(output: OutputPlan, checkpoint: Checkpoint) -> list[str]:
    """A note where codes of the source are not kept, with what would keep them."""
    sources = {**checkpoint.tensors, **output.sources}
    pairs = [(t, sources[t.source]) for t in output.tensors]
    again = [(t, s) for t, s in pairs if t.kept == "requantized"]
    kinds = sorted({s.encoding.name for _, s in again if not s.decoded})
    if any(s.decoded for _, s in again):
        kinds.append(checkpoint.quantized or "decoded")
    if not kinds:
        return []
    coded = [(t, s) for t, s in again if s.encoding.family != "plain" and t.reason != "as told"]
    advice = (
        _by_option(output, pairs, coded, checkpoint.cache is None)
        or _by_target(output, coded, len(again))
        or _merged(checkpoint, len(again))
        or "docs/conversion.md says which targets keep its codes"
    )
    every = sum(t.kept is not None for t, _ in pairs)
    what = "it" if len(again) == every else f"{len(again)} of its {every} quantized tensors"
    return [
        f"the source is quantized already ({', '.join(kinds)}), and this target quantizes {what} a "
        f"second time; {advice}"
    ]


def _by_option(
    output: OutputPlan, pairs: list[_Pair], coded: list[_Pair], may_read: bool
) -> str | None:
    """How to keep codes that the recipe's main type holds, where its mix wants another type."""
    if output.target.format != "gguf":
        return None
    name = RECIPES[output.target.recipe][0]
    base = GGML.get(name)
    if base is None:
        return None
    saved = [t for t, s in coded if t.encoding != base and _keeps(s, base, may_read)]
    if not saved:
        return None
    floats = any(t.kept is None and len(t.shape) > 1 and t.encoding != base for t, _ in pairs)
    kinds = sorted({re.sub(r"^blk\.\d+\.|\.weight$", "", t.name) for t in saved})
    option = f"--tensor '{'|'.join(kinds)}={name}'" if floats else "--pure"
    types = ", ".join(sorted({t.encoding.name for t in saved}))
    what = saved[0].name if len(saved) == 1 else f"{len(saved)} tensors ({', '.join(kinds)})"
    return f"{what}: {types} by the recipe's mix, and {option} would keep the codes as {name}"


def _by_target(output: OutputPlan, coded: list[_Pair], again: int) -> str | None:
    """Another target of the same format that would keep the codes of most weights; ``again``
    tensors are quantized a second time."""
    weights = sum(s.size for _, s in coded)
    best: tuple[int, float, str, int] | None = None
    for text, encoding in _targets(output.target.format):
        kept = [s.size for _, s in coded if _keeps(s, encoding, may_read=False)]
        found = (-sum(kept), encoding.bits_per_weight, text, len(kept))
        if 2 * sum(kept) > weights and (best is None or found < best):
            best = found
    if best is None:
        return None
    pure = output.target.format == "gguf" and any(t.name in _ENDS for t, _ in coded)
    what = "its codes" if best[3] == again else f"the codes of {best[3]} of these {again} tensors"
    return f"{best[2]}{' with --pure' if pure else ''} would keep {what}"


def _merged(checkpoint: Checkpoint, again: int) -> str | None:
    if checkpoint.adapter and again <= checkpoint.adapter["tensors"]:
        return "what an adapter changes has no codes to keep"
    return None


def _targets(form: str) -> Iterator[tuple[str, Encoding]]:
    """Every target of a format, and what it makes of most matrices."""
    if form == "gguf":
        for recipe, (name, _) in RECIPES.items():
            if name not in PLAIN:
                yield f"gguf:{recipe}", GGML[name]
        return
    for bits in AFFINE_BITS:
        for group in AFFINE_GROUPS:
            yield (
                f"mlx:{bits}bit" + ("" if group == 64 else f"-g{group}"),
                Affine(bits, group, "f16"),
            )
    for name, small in MLX_FLOAT.items():
        yield f"mlx:{name}", small


def _keeps(source: SourceTensor, encoding: Encoding, may_read: bool) -> bool:
    """Whether the codes would be kept; without reading scales, whether they would be whatever
    those are."""
    if not encoding.fits(source.shape):
        return False
    if may_read or source.encoding == encoding:
        return source.encoding == encoding or keeps_codes(source, encoding) is not None
    return load_reference().fidelity(source.encoding, encoding) is not None
