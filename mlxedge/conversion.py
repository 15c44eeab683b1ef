"""The main job: one read of the source, every output.

``convert`` opens the source, plans, and runs the plan; ``plan_conversion`` and ``run_plan`` are the
two halves for callers that show the plan first.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlxedge.encodings import PLAIN
from mlxedge.errors import (
    DiskFullError,
    UnsupportedModelError,
    UsageError,
)
from mlxedge.guidance import Guidance, plan_guidance
from mlxedge.outputs.gguf import plan_gguf
from mlxedge.outputs.hf_dir import plan_hf
from mlxedge.outputs.mlx_dir import plan_mlx
from mlxedge.outputs.requantized import requantized_notes
from mlxedge.outputs.staging import check_target, partial_dir
from mlxedge.plan import OutputPlan, Plan, encodings_made
from mlxedge.prepare import check_weights, prepare
from mlxedge.recipes.overrides import NONE, Overrides
from mlxedge.record import recorded_fingerprint
from mlxedge.targets import Target, parse_target

if TYPE_CHECKING:
    from mlxedge.models.spec import Config, ModelSpec
    from mlxedge.ops import Quality
    from mlxedge.pipeline import ProgressHook
    from mlxedge.report import Report
    from mlxedge.sources.block_cache import BlockCache
    from mlxedge.sources.checkpoint import Checkpoint

#: Weights handled at once by a thread; bounds memory (4 bytes each, a few copies).
CHUNK_WEIGHTS = {"numpy": 1 << 19, "mlx": 1 << 24}
_CONFIG_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def convert(
    source: str | Path | Checkpoint,
    to: str | Sequence[str],
    out: str | Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    allow_nan: bool = False,
    threads: int | None = None,
    pre: str | None = None,
    quality: Quality = "fast",
    calibrate: str | Path | Literal[False] | None = None,
    overrides: Overrides = NONE,
    stream: bool = False,
    adapter: str | Path | None = None,
    progress: ProgressHook | None = None,
    calibrating: ProgressHook | None = None,
) -> Report:
    """Convert ``source`` to every target in ``to``.

    ``source`` is a Hub id (``org/name`` or ``org/name@revision``), a Hugging Face or MLX folder, a
    GGUF file, or an open Checkpoint. ``to`` are targets such as "mlx:4bit" and "gguf:q4_k_m"
    (``mlxedge.targets``). ``out`` is the file or folder to write for a single target, else the
    parent. ``dtype`` ("f32", "f16", "bf16") is that of MLX scales and unquantized MLX tensors, by
    default the source's. ``pre`` names the GGUF pre-tokenizer where it is not known.

    ``quality`` is one of ``mlxedge.ops.Quality``. For "fast" and "best" the model is run on a
    short text; ``calibrate`` names another (UTF-8), an imatrix file or what ``mlxedge calibrate``
    wrote, and ``False`` leaves it out, which makes the quality "reference". ``overrides``
    (``mlxedge.recipes.overrides``) are types for single tensors. ``stream`` reads the weights of a
    Hub repository as they are wanted (``mlxedge.open_source``) instead of downloading them first,
    and calibrates on the way; what is written is the same. ``adapter`` is the folder or the Hub
    id of a LoRA that is merged first (``mlxedge.sources.adapter``). ``progress`` is told of the
    weights, ``calibrating`` of the model's run before or between them.

    Raises MlxedgeError and its kind; nothing is left at a final path unless it is complete.
    """
    from mlxedge.pipeline import run_plan
    from mlxedge.sources import open_source
    from mlxedge.sources.adapter import find_adapter, with_adapter

    targets = [parse_target(t) for t in ([to] if isinstance(to, str) else to)]
    with contextlib.ExitStack() as stack:
        opened = source
        if isinstance(opened, (str, Path)):
            opened = stack.enter_context(open_source(opened, stream=stream))
        elif stream:
            raise UsageError("an open checkpoint cannot be streamed: open it with stream=True")
        if adapter is not None:
            opened = stack.enter_context(with_adapter(opened, find_adapter(adapter)))
        plan, checkpoint = plan_conversion(
            opened,
            targets,
            Path(out),
            backend=backend,
            dtype=dtype,
            force=force,
            allow_nan=allow_nan,
            pre=pre,
            quality=quality,
            calibrate=calibrate,
            overrides=overrides,
        )
        return run_plan(
            plan,
            checkpoint,
            backend=backend,
            force=force,
            allow_nan=allow_nan,
            threads=threads,
            progress=progress,
            calibrating=calibrating,
        )


def plan_conversion(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    out: Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    allow_nan: bool = False,
    pre: str | None = None,
    quality: Quality = "fast",
    calibrate: str | Path | Literal[False] | None = None,
    overrides: Overrides = NONE,
) -> tuple[Plan, Checkpoint]:
    """Plan without writing anything.

    Returns the plan and the checkpoint that it reads: the given one without the tensors that carry
    nothing (buffers, the second copy of a tied head). Raises UnsupportedModelError where the
    runtime of a target cannot compute this model, OutputExistsError, DiskFullError.
    """
    from mlxedge.ops import QUALITIES, default_backend, load_ops

    if not targets:
        raise UsageError("no target: name at least one, for example --to mlx:4bit")
    repeated = {t.spec for t in targets if targets.count(t) > 1}
    if repeated:
        raise UsageError(f"target given twice: {', '.join(sorted(repeated))}")
    for what, given, known in (
        ("backend", backend, tuple(CHUNK_WEIGHTS)),
        ("dtype", dtype, tuple(_CONFIG_DTYPE.values())),
        ("quality", quality, QUALITIES),
    ):
        if given is not None and given not in known:
            raise UsageError(f"unknown {what} {given!r}: choose from {', '.join(known)}")
    spec, checkpoint = prepare(checkpoint)
    config = checkpoint.config
    for target in targets:
        check_runtime(spec, config, target)
    check_weights(spec, checkpoint)
    overrides.check_targets(targets)
    if all(t.recipe in PLAIN for t in targets) and not overrides:
        guidance = Guidance(quality)
    else:
        guidance = plan_guidance(checkpoint, spec, quality, calibrate)

    paths = _paths(checkpoint.name, targets, out)
    for path in paths:
        _check_apart(path, checkpoint)
    dtype = dtype or source_dtype(checkpoint)
    outputs: list[OutputPlan] = []
    for target, path in zip(targets, paths, strict=True):
        if target.format == "gguf":
            outputs.append(
                plan_gguf(
                    checkpoint,
                    spec,
                    config,
                    target,
                    path,
                    pre=pre,
                    overrides=overrides,
                    imatrix=guidance.calibrates,
                    known=guidance.known,
                    about_imatrix=guidance.about_imatrix,
                )
            )
        elif target.format == "mlx":
            outputs.append(
                plan_mlx(
                    checkpoint,
                    spec,
                    config,
                    target,
                    path,
                    dtype=dtype,
                    overrides=overrides,
                )
            )
        else:
            outputs.append(plan_hf(checkpoint, spec, config, target, path))
    encoded = encodings_made(tensor for output in outputs for tensor in output.tensors)
    plan = Plan(
        guidance=guidance.needed_for(encoded),
        name=checkpoint.name,
        source=describe_source(checkpoint),
        outputs=outputs,
        chunk_weights=CHUNK_WEIGHTS[backend or default_backend()],
        parallel=load_ops(backend).parallel,
    )
    for output in plan.outputs:
        output.notes += checkpoint.notes
        output.notes += [*overrides.unused(output.target), *requantized_notes(output, checkpoint)]
    _find_finished(plan, backend or default_backend(), allow_nan)
    for output in plan.outputs:
        if not output.finished:
            check_target(output.path, force)
    _check_disk(plan, checkpoint.cache)
    return plan, checkpoint


def _find_finished(plan: Plan, backend: str, allow_nan: bool) -> None:
    """Mark outputs that an interrupted run of this very plan published before it stopped.

    There was such a run if one of the others was left half-written; else an output that exists is
    one that the user has to decide about.
    """
    if any(partial_dir(output.path).exists() for output in plan.outputs):
        for output in plan.outputs:
            made = output.path.exists() and not partial_dir(output.path).exists()
            mark = plan.fingerprint(output, backend, allow_nan)
            output.finished = made and recorded_fingerprint(output.path) == mark


def check_runtime(spec: ModelSpec, config: Config, target: Target) -> None:
    """Raise UnsupportedModelError where the runtime of a target would compute something else."""
    if target.format != "hf" and (why := spec.objections(config, target.format)):
        raise UnsupportedModelError(f"{target.spec}: {'; '.join(why)}")


def source_dtype(checkpoint: Checkpoint) -> str:
    """ "f32", "f16" or "bf16": what config.json says, else what most plain tensors are."""
    for key in ("dtype", "torch_dtype"):
        if (named := _CONFIG_DTYPE.get(str(checkpoint.config.get(key)))) is not None:
            return named
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.encoding.family == "plain":
            name = tensor.encoding.name
            sizes[name] = sizes.get(name, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name], default="bf16")


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies a source: its kind and place, and size and time of each weight file, or its
    hash where it is read over the network."""
    origin = checkpoint.origin
    files: list[dict[str, Any]] = []
    for path in origin.files:
        if listed := origin.listed.get(path):
            sha256 = listed.sha256
            files.append(
                {"name": path.name, "bytes": listed.size, "sha256": sha256, "checked": False}
            )
            continue
        stat = path.stat()
        files.append({"name": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns})
    described: dict[str, Any] = {"kind": origin.kind, "path": str(origin.path), "files": files}
    if checkpoint.quantized:
        described["quantized"] = checkpoint.quantized
    if checkpoint.adapter:
        described["adapter"] = checkpoint.adapter
    if origin.repo:
        described |= {"repo": origin.repo, "revision": origin.revision}
    return described


def _paths(name: str, targets: Sequence[Target], out: Path) -> list[Path]:
    """With one target, ``out`` is the output itself unless it is an existing folder to write into;
    with several it is the parent."""
    if out.suffix.lower() == ".gguf" and (len(targets) > 1 or targets[0].is_folder):
        raise UsageError(f"-o {out}: a .gguf file can hold one gguf: target; give a folder")
    if len(targets) == 1 and not _is_parent(targets[0], out):
        return [out]
    return [out / target.default_name(name) for target in targets]


def _is_parent(target: Target, out: Path) -> bool:
    if target.format == "gguf":
        return out.suffix.lower() != ".gguf"
    return out.is_dir() and not (out / "config.json").exists()


def _check_apart(path: Path, checkpoint: Checkpoint) -> None:
    """Never replace what is being read, nor a folder that holds it."""
    target = path.resolve()
    for read in (checkpoint.origin.path, *checkpoint.origin.files):
        source = read.resolve()
        if target == source or target in source.parents:
            raise UsageError(f"{path} holds the source: choose another -o")


def _on_disk(file: Path) -> int:
    """What a file takes up: a sparse one has more bytes than that."""
    stat = file.stat()
    return min(stat.st_size, getattr(stat, "st_blocks", stat.st_size) * 512)


def _check_disk(plan: Plan, cache: BlockCache | None) -> None:
    """Refuse before the work what would fail after it. A cache gets what the outputs leave."""
    needed: dict[int, tuple[Path, int]] = {}
    for output in plan.outputs:
        if output.finished:
            continue
        parent = output.path.parent
        while not parent.exists():
            parent = parent.parent
        have = sum(_on_disk(f) for f in partial_dir(output.path).glob("data/*"))
        device = parent.stat().st_dev
        _, so_far = needed.get(device, (parent, 0))
        needed[device] = (parent, so_far + max(0, output.nbytes - have))
    if cache is not None:
        device = cache.folder.stat().st_dev
        parent, so_far = needed.get(device, (cache.folder, 0))
        cache.fit((shutil.disk_usage(cache.folder).free - so_far) * 3 // 4)
        needed[device] = (parent, so_far + cache.limit)
        plan.cache_bytes = cache.limit
    for parent, size in needed.values():
        total, _, free = shutil.disk_usage(parent)
        # One of no size at all does not tell, as /proc: writing will.
        if size > free and total:
            raise DiskFullError(
                f"{parent}: the outputs need {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free: "
                "free some space, or choose fewer targets or another -o"
            )
