"""The tensors of an MLX folder, as mlx-lm 0.32 writes and loads it.

A quantized matrix ``X`` is stored as ``X.weight`` (u32 codes), ``X.scales`` and, if affine,
``X.biases``; which one is quantized and how is decided as in ``mlx_lm.utils.load_model``: by the
entry for its path in config.json's ``quantization``, else by whether ``X.scales`` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.encodings import MLX_FLOAT, PLAIN, Affine, MlxFloat
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.errors import CorruptFileError, UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor, Tensors
from mlxedge.sources.files import shown

if TYPE_CHECKING:
    from mlxedge.ops import Parts
    from mlxedge.sources.folder import Weights
    from mlxedge.sources.safetensors import Entry

#: What ``mx.quantize`` takes where a config leaves the group size or the bits open.
_DEFAULT_BITS = 4
_AFFINE_GROUP = 64


def is_mlx(config: dict[str, Any], weights: Weights) -> bool:
    """Whether mlx-lm wrote the folder: its config says how it is quantized, or its files say so."""
    return "quantization" in config or any(
        file.metadata.get("format") == "mlx" for file in weights.files
    )


def mlx_tensors(folder: Path, config: dict[str, Any], weights: Weights) -> Tensors:
    """The folder's tensors; scales and biases are parts of their matrix, not tensors.

    Raises CorruptFileError if codes, scales and config contradict each other.
    """
    rules = config.get("quantization") or {}
    if not isinstance(rules, dict):
        raise CorruptFileError(folder / "config.json", "quantization is not an object")
    tensors = {}
    for name in weights.home:
        path, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases") and f"{path}.weight" in weights.home:
            continue
        rule = _rule(folder, rules, path, weights) if leaf == "weight" else None
        if rule is None:
            tensors[name] = weights.home[name].source_tensor(name)
        else:
            tensors[name] = _quantized(folder, name, path, rule, weights)
    return Tensors(tensors)


def _rule(
    folder: Path, rules: dict[str, Any], path: str, weights: Weights
) -> dict[str, Any] | None:
    """How the module at ``path`` is quantized, or ``None`` if it is not."""
    has_scales = f"{path}.scales" in weights.home
    rule = rules.get(path, has_scales and bool(rules))
    if bool(rule) != has_scales:
        raise CorruptFileError(
            folder / "config.json",
            f"quantization says {str(rule)[:60]} for {shown(path)}, which has "
            f"{'scales' if has_scales else 'no scales'}",
        )
    if isinstance(rule, dict):
        return rule
    return rules if rule else None


def _quantized(
    folder: Path, name: str, path: str, rule: dict[str, Any], weights: Weights
) -> SourceTensor:
    encoding = _encoding(folder, path, rule, weights)
    files = {part: weights.home[f"{path}.{part}"] for part in _part_names(encoding, path, weights)}
    entries = {part: file.entries[f"{path}.{part}"] for part, file in files.items()}
    shape = _logical_shape(entries["weight"], encoding)
    if not encoding.fits(shape):
        raise CorruptFileError(
            files["weight"].path,
            f"{shown(name)} has {shape[-1]} columns, not a multiple of {encoding.block}",
            entries["weight"].offset,
        )
    expected = encoding.parts(shape)
    for part, entry in entries.items():
        want = expected[part]
        if (entry.dtype, entry.shape) != (want.dtype, want.shape):
            raise CorruptFileError(
                files[part].path,
                f"{shown(entry.name)} is {entry.dtype} {list(entry.shape)}, but {encoding} weights "
                f"of shape {list(shape)} need {want.dtype} {list(want.shape)}",
                entry.offset,
            )

    def reader(parts: Iterable[str]) -> Callable[[int, int], Parts]:
        chosen = {part: files[part] for part in parts}

        def read(start: int, stop: int) -> Parts:
            return {p: file.read_rows(f"{path}.{p}", start, stop) for p, file in chosen.items()}

        return read

    scales = reader(part for part in files if part != "weight")
    return SourceTensor(name, shape, encoding, reader(files), scales)


def _encoding(folder: Path, path: str, rule: dict[str, Any], weights: Weights) -> Affine | MlxFloat:
    mode = str(rule.get("mode", "affine"))
    if mode in MLX_FLOAT:
        return MLX_FLOAT[mode]
    if mode != "affine":
        raise UnsupportedEncodingError(f"{folder}: {shown(path)} has the unknown MLX mode {mode!r}")
    bits, group = rule.get("bits") or _DEFAULT_BITS, rule.get("group_size") or _AFFINE_GROUP
    if not (type(bits) is type(group) is int and bits in AFFINE_BITS and group in AFFINE_GROUPS):
        raise CorruptFileError(
            folder / "config.json",
            f"MLX has no affine {bits!r} bits in groups of {group!r} ({shown(path)})",
        )
    scales = weights.home[f"{path}.scales"].entries[f"{path}.scales"]
    if scales.dtype not in PLAIN:
        raise CorruptFileError(
            weights.home[scales.name].path, f"{shown(scales.name)} is {scales.dtype}", scales.offset
        )
    return Affine(bits, group, scales.dtype)


def _part_names(encoding: Affine | MlxFloat, path: str, weights: Weights) -> list[str]:
    names = list(encoding.parts((1, encoding.block)))
    for part in names:
        if f"{path}.{part}" not in weights.home:
            raise CorruptFileError(
                weights.home[f"{path}.weight"].path, f"{encoding} {shown(path)} has no {part}"
            )
    return names


def _logical_shape(codes: Entry, encoding: Affine | MlxFloat) -> tuple[int, ...]:
    """The weights' shape by that of their codes; the parts are then checked against it."""
    width = codes.shape[-1] if codes.shape else 0
    return (*codes.shape[:-1], width * 32 // encoding.bits)
