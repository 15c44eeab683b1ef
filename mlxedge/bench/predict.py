"""Will it run there, and how fast? An answer before anything is downloaded.

Memory is that of the weights, of keys and values at a length of context (f16, as llama.cpp and
mlx-lm keep them), and of what a runtime needs beside them. A decode step reads the weights that
serve a token and the keys and values once, so its speed is at most memory bandwidth over these
bytes; what share of that is reached is taken from published results on the same chip, or on chips
of its kind. ``docs/predict.md`` has the error of that against the published rows, which
:func:`reference_errors` computes: each row predicted from the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.bench.chips import REFERENCE_WEIGHT_BYTES, Chip, chips, find_chips
from mlxedge.errors import UsageError
from mlxedge.models.recasts import WORLDS

if TYPE_CHECKING:
    from mlxedge.models.shape import Shape
    from mlxedge.models.spec import ModelSpec
    from mlxedge.plan import OutputPlan
    from mlxedge.sources.checkpoint import Checkpoint
    from mlxedge.targets import Target

#: The build that most published rows are of: those of others are left out of what is learnt.
BUILD = "llama.cpp 8e672ef"
#: About the median error of a row that the others of its kind predict, by which ranges are wider.
_MARGIN = 0.07
#: What a runtime takes beside weights and cache: buffers of activations, the program itself.
_RUNTIME_BYTES = 5 * 10**8
#: The share of its memory that a Mac lets its GPU have, up to so many bytes and beyond.
_GPU_SHARES = ((36 * 2**30, 2 / 3), (1 << 62, 3 / 4))
#: Below this many bytes a token, what a step costs beside reading shows: published rows tell
#: nothing of that.
SMALL_BYTES = 10**9
_KINDS = ("Pro", "Max", "Ultra")
_EXPERTS = re.compile(r"\.experts\.")
#: Tables of which a token reads a row.
_TABLES = ("model.embed_tokens_per_layer.weight", "model.embed_positions.weight")


@dataclass(frozen=True)
class Work:
    """What one form of a model takes: ``weight_bytes``, those that a token reads
    (``bytes_per_token``), and those of keys and values and states at a context, which ``cache``
    tells, or ``None`` where it is not known of this architecture."""

    name: str
    bits_per_weight: float
    weight_bytes: int
    bytes_per_token: int
    cache: Callable[[int], int] | None
    longest_context: int


@dataclass(frozen=True)
class Prediction:
    """Of one form of a model on one chip. ``low`` and ``high`` are decode speeds in tokens per
    second at the end of ``context``, ``basis`` what they are learnt from. ``available_bytes`` is
    what a Mac of that memory lets its GPU have, ``None`` if the memory is not told."""

    work: Work
    context: int
    cache_bytes: int | None
    total_bytes: int
    available_bytes: int | None
    low: float | None
    high: float | None
    basis: str

    @property
    def fits(self) -> bool | None:
        return None if self.available_bytes is None else self.total_bytes <= self.available_bytes


def predict(
    work: Work,
    context: int,
    *,
    chip: str | None = None,
    gpu_cores: int | None = None,
    memory_bytes: int | None = None,
) -> Prediction:
    """Raises UsageError for a chip that is not known, and a context longer than the model's."""
    if not 0 < context <= work.longest_context:
        raise UsageError(f"the model has a context of {work.longest_context} tokens, not {context}")
    cache = work.cache(context) if work.cache else None
    total = work.weight_bytes + (cache or 0) + _RUNTIME_BYTES
    available = None if memory_bytes is None else gpu_bytes(memory_bytes)
    low = high = None
    basis = "no chip is told"
    if chip is not None:
        rows = find_chips(chip, gpu_cores)
        if not rows:
            same = [str(row.gpu_cores) for row in find_chips(chip)]
            if same:
                raise UsageError(
                    f"{chip} is known with {' or '.join(same)} GPU cores, not with {gpu_cores}"
                )
            raise UsageError(f"no chip {chip!r} is known: {', '.join(known_chips())}")
        read = work.bytes_per_token + (cache or 0)
        ranges = [decode_range(row, read) for row in rows]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        basis = "; ".join(dict.fromkeys(r[2] for r in ranges))
    return Prediction(work, context, cache, total, available, low, high, basis)


def gpu_bytes(memory_bytes: int) -> int:
    """About what macOS lets the GPU have of a memory of so many bytes, unless the user raised the
    limit (iogpu.wired_limit_mb)."""
    share = next(share for most, share in _GPU_SHARES if memory_bytes <= most)
    return int(memory_bytes * share)


def known_chips() -> list[str]:
    return list(dict.fromkeys(chip.name for chip in chips()))


def decode_range(chip: Chip, bytes_read: float) -> tuple[float, float, str]:
    """The lowest and highest speed (tokens/s) at the shares of the roofline that chips of this kind
    reach, and in words where these are from."""
    shares = [share_of(row) for row in _kin(chip)]
    low, high = _widened(shares)
    top = chip.bandwidth_gb_s * 1e9 / bytes_read
    basis = (
        f"{chip.name}: {chip.bandwidth_gb_s:.0f} GB/s, of which {_kind(chip)} reach "
        f"{min(shares):.0%} to {max(shares):.0%} with Llama-2-7B Q4_0 ({len(shares)} published "
        f"results of {BUILD}), and {_MARGIN:.0%} either way for the error of that"
    )
    return low * top, high * top, basis


def _widened(shares: Sequence[float]) -> tuple[float, float]:
    return min(shares) * (1 - _MARGIN), max(shares) * (1 + _MARGIN)


def share_of(row: Chip) -> float:
    """Of the roofline."""
    return row.decode * REFERENCE_WEIGHT_BYTES / (row.bandwidth_gb_s * 1e9)


def _kin(chip: Chip) -> list[Chip]:
    """Published rows of the chip itself and of its kind: base, Pro, Max, Ultra."""
    return [row for row in chips() if row.build == BUILD and _kind(row) == _kind(chip)]


def _kind(chip: Chip) -> str:
    kind = chip.name.rpartition(" ")[2]
    return f"{kind} chips" if kind in _KINDS else "base chips"


@dataclass(frozen=True)
class ReferenceError:
    """A published row, and what the others of its kind predict for it (tokens/s)."""

    chip: Chip
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    @property
    def error(self) -> float:
        """Of the middle of the range, relative to what was measured."""
        return self.middle / self.chip.decode - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.chip.decode <= self.high


def reference_errors() -> list[ReferenceError]:
    """Each published row, predicted from the others of its kind, other sizes of the same chip left
    out as well."""
    found = []
    for chip in chips():
        others = [share_of(row) for row in _kin(chip) if row.name != chip.name]
        top = chip.bandwidth_gb_s * 1e9 / REFERENCE_WEIGHT_BYTES
        low, high = _widened(others)
        found.append(ReferenceError(chip, low * top, high * top))
    return found


def works(checkpoint: Checkpoint, targets: Sequence[Target]) -> list[Work]:
    """An opened model as it is, or as each of ``targets`` would have it; only headers are read.

    Raises what planning a conversion does.
    """
    from mlxedge.errors import UnsupportedModelError
    from mlxedge.models.shape import shape_of
    from mlxedge.prepare import check_weights, prepare

    spec, checkpoint = prepare(checkpoint)
    check_weights(spec, checkpoint)
    try:
        shape = shape_of(checkpoint.config)
    except UnsupportedModelError:
        shape = None
    cache = _cache(shape)
    longest = int(checkpoint.config.get("max_position_embeddings") or 2048)
    if not targets:
        sizes = {name: t.nbytes for name, t in checkpoint.tensors.items()}
        return [_work("as it is", checkpoint, sizes, spec, cache, longest)]
    found = []
    for target in targets:
        plan = _plan(spec, checkpoint, target)
        sizes = {t.source: t.nbytes for t in plan.tensors}
        found.append(_work(target.spec, checkpoint, sizes, spec, cache, longest))
    return found


def _plan(spec: ModelSpec, checkpoint: Checkpoint, target: Target) -> OutputPlan:
    from dataclasses import replace

    from mlxedge.conversion import check_runtime, source_dtype
    from mlxedge.outputs.gguf import plan_gguf
    from mlxedge.outputs.hf_dir import plan_hf
    from mlxedge.outputs.mlx_dir import plan_mlx

    config = checkpoint.config
    check_runtime(spec, config, target)
    # Tokenizers add nothing that counts, and may need a name by hand.
    bare = replace(checkpoint, tokenizer=None)
    out = Path("prediction")
    if target.format == "gguf":
        return plan_gguf(bare, spec, config, target, out, imatrix=True)
    if target.format == "mlx":
        return plan_mlx(bare, spec, config, target, out, dtype=source_dtype(checkpoint))
    return plan_hf(bare, spec, config, target, out)


def _work(
    name: str,
    checkpoint: Checkpoint,
    sizes: dict[str, int],
    spec: ModelSpec,
    cache: Callable[[int], int] | None,
    longest: int,
) -> Work:
    total = sum(sizes.values())
    weights = sum(tensor.size for tensor in checkpoint.tensors.values())
    read = tokens_read(sizes, spec, checkpoint.config)
    return Work(name, 8 * total / max(1, weights), total, read, cache, longest)


def tokens_read(sizes: dict[str, int], spec: ModelSpec, config: dict[str, Any]) -> int:
    """Bytes that one decode step reads of tensors of these ``sizes``, by canonical name, or the
    name in a world with that before it ("gguf:blk.0.ffn_gate_up_exps.weight"): all but tables of
    embeddings, unless one is the head as well, and of experts those that serve a token."""
    experts = spec.experts.shape(config) if spec.experts else None
    made_of = {name: _canonical(name, spec) for name in sizes}
    tables = list(_TABLES)
    if "lm_head.weight" in {name for names in made_of.values() for name in names}:
        tables.append("model.embed_tokens.weight")
    total = 0.0
    for name, nbytes in sizes.items():
        if any(own in tables for own in made_of[name]):
            continue
        for_some = experts and any(_EXPERTS.search(own) for own in made_of[name])
        total += nbytes * (experts.used / experts.count if experts and for_some else 1.0)
    return round(total)


def _canonical(name: str, spec: ModelSpec) -> tuple[str, ...]:
    """What a tensor to be written is made of."""
    world, _, own = name.partition(":")
    found = spec.recast_of(world, own) if world in WORLDS.values() else None  # type: ignore[arg-type]
    return (name,) if found is None else tuple(found[0].at(found[1], found[0].canonical))


def _cache(shape: Shape | None) -> Callable[[int], int] | None:
    """Bytes of what all layers keep, by tokens of context."""
    from mlxedge.models.mixers import load_mixer

    if shape is None:
        return None
    kept = shape

    def cache(context: int) -> int:
        return sum(
            load_mixer(name).cache_bytes(kept, layer, context)
            for layer, name in enumerate(kept.mixers)
        )

    return cache


__all__ = [
    "Prediction",
    "Work",
    "decode_range",
    "gpu_bytes",
    "known_chips",
    "predict",
    "reference_errors",
    "works",
]
