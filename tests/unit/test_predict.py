"""Predictions before a download: sizes that a conversion then has, and speeds with their basis."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from oracles.checkpoints import SAVED, write_checkpoint
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.bench.chips import REFERENCE_WEIGHT_BYTES, chips, find_chips
from mlxedge.bench.predict import (
    BUILD,
    Work,
    decode_range,
    gpu_bytes,
    predict,
    reference_errors,
    share_of,
    tokens_read,
    works,
)
from mlxedge.cli import main
from mlxedge.errors import UsageError
from mlxedge.models import spec_for
from mlxedge.models.mixers import load_mixer
from mlxedge.models.shape import shape_of
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf
from mlxedge.targets import parse_target

DOCS = Path(__file__).resolve().parents[2] / "docs" / "predict.md"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def work(**changes: Any) -> Work:
    given: dict[str, Any] = {
        "name": "w",
        "bits_per_weight": 4.5,
        "weight_bytes": 4 * 10**9,
        "bytes_per_token": 4 * 10**9,
        "cache": lambda context: 1000 * context,
        "longest_context": 8192,
    }
    return Work(**given | changes)


def test_sizes_are_those_that_a_conversion_has(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", "qwen3_moe")
    targets = ["gguf:q4_k_m", "gguf:q8_0", "mlx:4bit", "mlx:8bit"]
    with open_source(folder) as checkpoint:
        found = works(checkpoint, [parse_target(t) for t in targets])
    mlxedge.convert(folder, targets, tmp_path / "out")
    for one in found:
        kind, _, recipe = one.name.partition(":")
        if kind == "gguf":
            made = next((tmp_path / "out").glob(f"*-{recipe.upper()}.gguf"))
            tensors = read_gguf(made).tensors
            assert one.weight_bytes == sum(t.nbytes for t in tensors)
        else:
            made = next((tmp_path / "out").glob(f"*-{kind}-{recipe}")) / "model.safetensors"
            header = int.from_bytes(made.read_bytes()[:8], "little")
            assert one.weight_bytes == made.stat().st_size - 8 - header


def test_what_a_token_reads(tmp_path: Path) -> None:
    """Not the table, and of eight experts the three that serve it; a tied table is the head."""
    folder = write_checkpoint(tmp_path / "moe", "qwen3_moe")
    with open_source(folder) as checkpoint:
        (one,) = works(checkpoint, [])
        sizes = {name: t.nbytes for name, t in checkpoint.tensors.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    table = sizes["model.embed_tokens.weight"]
    assert one.weight_bytes == sum(sizes.values())
    assert one.bytes_per_token == one.weight_bytes - table - experts * 5 // 8
    tied = write_tiny_llama(tmp_path / "tied")
    with open_source(tied) as checkpoint:
        (one,) = works(checkpoint, [])
    assert one.bytes_per_token == one.weight_bytes


def test_keys_and_values(tmp_path: Path) -> None:
    """2 layers · keys and values · 2 heads · 64 · f16; windows keep no more than they see."""
    with open_source(write_tiny_llama(tmp_path / "tiny")) as checkpoint:
        (one,) = works(checkpoint, [])
    assert one.cache is not None
    assert one.cache(1000) == 2 * 2 * 2 * 64 * 2 * 1000
    folder = write_checkpoint(
        tmp_path / "gemma", "gemma2", sliding_window=32, head_dim=48, query_pre_attn_scalar=48
    )
    with open_source(folder) as checkpoint:
        (one,) = works(checkpoint, [])
    assert one.cache is not None
    assert one.cache(200) == 2 * 2 * 48 * 2 * (200 + 32)


def test_every_mixer_says_what_it_keeps() -> None:
    import pkgutil

    from mlxedge.models import mixers

    for module in pkgutil.iter_modules(mixers.__path__):
        mixer = load_mixer(module.name)
        if hasattr(mixer, "record"):
            assert callable(mixer.cache_bytes), module.name


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2", "lfm2", "gemma4_text", "falcon_h1"])
def test_the_cache_is_the_one_that_is_kept_here(name: str, tmp_path: Path) -> None:
    """Which has keys and values in f32, all of the context whatever the windows, and its states
    padded to whole vectors."""
    from mlxedge.models.decoder import Decoder
    from mlxedge.prepare import prepare

    folder = tmp_path / "model"
    made = write_tiny_llama(folder) if name == "llama" else write_checkpoint(folder, **SAVED[name])
    with open_source(made) as checkpoint:
        _, ready = prepare(checkpoint)
        decoder = Decoder(ready, 1)
        shape = replace(shape_of(ready.config), windows=(0,) * decoder.shape.layers)
    cache = decoder.cache()
    cache.reserve(256)
    parts = [load_mixer(n).cache_bytes(shape, i, 256) for i, n in enumerate(shape.mixers)]
    nothing = [load_mixer(n).cache_bytes(shape, i, 0) for i, n in enumerate(shape.mixers)]
    ours = 2 * (sum(parts) - sum(nothing)) + sum(nothing)
    assert ours <= cache.nbytes <= 1.35 * ours
    decoder.close()


def test_memory_and_whether_it_fits() -> None:
    found = predict(work(), 4096, memory_bytes=8 << 30)
    assert found.total_bytes == 4 * 10**9 + 4_096_000 + 5 * 10**8
    assert found.fits
    assert not predict(work(), 4096, memory_bytes=4 << 30).fits
    assert predict(work(), 4096).fits is None
    assert gpu_bytes(16 << 30) == int((16 << 30) * 2 / 3)
    assert gpu_bytes(128 << 30) == (128 << 30) * 3 // 4
    with pytest.raises(UsageError, match="context of 8192 tokens, not 9000"):
        predict(work(), 9000)


def test_speed_grows_with_bandwidth_and_falls_with_bytes() -> None:
    small, large = (predict(work(), n, chip="M2 Max", gpu_cores=38) for n in (1, 8192))
    assert small.low is not None
    assert large.low is not None
    assert small.low > large.low
    base = predict(work(), 1, chip="apple m2")
    assert base.high is not None
    assert base.high < small.low
    assert "100 GB/s" in base.basis
    assert BUILD in base.basis
    with pytest.raises(UsageError, match="no chip 'M9' is known: M1, M1 Pro"):
        predict(work(), 1, chip="M9")
    with pytest.raises(UsageError, match="M2 is known with 8 or 10 GPU cores, not with 11"):
        predict(work(), 1, chip="M2", gpu_cores=11)


@pytest.mark.parametrize("chip", [c for c in chips() if c.build == BUILD], ids=str)
def test_a_published_result_lies_in_its_own_range(chip: Any) -> None:
    low, high, _ = decode_range(chip, REFERENCE_WEIGHT_BYTES)
    assert low <= chip.decode <= high
    assert 0.3 < share_of(chip) < 0.9


def test_the_published_error_is_what_the_docs_say() -> None:
    """Every row of the table in docs/predict.md, and the sentence above it."""
    found = reference_errors()
    assert len(found) == len(chips())
    text = DOCS.read_text(encoding="utf-8")
    for row in found:
        line = (
            f"| {row.chip.name} | {row.chip.gpu_cores} | {row.chip.decode:.1f} | "
            f"{row.low:.1f} to {row.high:.1f} | {row.error:+.0%} |"
        )
        assert line in text, line
    errors = sorted(abs(row.error) for row in found)
    inside = sum(row.inside for row in found)
    median = (errors[len(errors) // 2] + errors[(len(errors) - 1) // 2]) / 2
    said = (
        f"{inside} of {len(found)} lie in the range that the others of their kind give; the middle "
        f"of it is off by {median:.1%} in the median and by {errors[-1]:.0%} at most"
    )
    assert said in " ".join(text.split())


def test_from_the_command_line(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    done = run(
        folder, "--to", "mlx:4bit", "--to", "gguf:q8_0", "--chip", "M4 Max", "--memory", "36GB"
    )
    assert done.exit_code == 0, done.stderr
    header, first, second, basis, memory, small = done.stdout.splitlines()
    assert header.split() == ["form", "bits", "weights", "cache", "in", "all", "fits", "tokens/s"]
    assert first.startswith("mlx:4bit")
    assert second.startswith("gguf:q8_0")
    assert "410 GB/s" in basis
    assert "546 GB/s" in basis  # two sizes of this chip
    assert "25.8 GB" in memory
    assert "stay below the range" in small
    told = json.loads(run(folder, "--chip", "M4", "--json", "-c", 100).stdout)[0]
    assert told["context"] == 100
    assert told["fits"] is None
    assert told["decode_tokens_per_second"][0] < told["decode_tokens_per_second"][1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--chip", "M2", "-c", "5000"], "has a context of 2048 tokens"),
        (["--chip", "Threadripper"], "no chip 'Threadripper' is known"),
        (["--memory", "lots"], "not a size of memory"),
        (["--memory", "0GB"], "not a size of memory"),
        (["--to", "mlx:9bit"], "mlx:9bit"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: list[str], problem: str) -> None:
    done = run(write_tiny_llama(tmp_path / "tiny"), *arguments)
    assert done.exit_code == 2
    assert problem in done.stderr


def test_find_chips_is_not_fooled_by_cores() -> None:
    assert find_chips("M2", 10) != find_chips("M2", 8)


def test_what_a_token_reads_is_told_by_canonical_names(tmp_path: Path) -> None:
    """Of experts those that serve it, whatever a world joins; of tables a row."""
    folder = write_checkpoint(tmp_path / "tiny", **SAVED["gemma4_text-experts"])
    with mlxedge.open_source(folder) as checkpoint:
        spec, opened = prepare(checkpoint)
    assert spec.experts is not None
    experts = spec.experts.shape(opened.config)
    for name in (
        "model.layers.0.mlp.experts.gate_proj.weight",
        "gguf:blk.0.ffn_gate_up_exps.weight",
        "stored:model.layers.0.experts.gate_up_proj",
    ):
        assert tokens_read({name: 800}, spec, opened.config) == round(
            800 * experts.used / experts.count
        )
    tables = {"model.embed_tokens.weight": 10, "model.embed_tokens_per_layer.weight": 1000}
    assert tokens_read(tables, spec_for({"model_type": "gemma3n_text"}), {}) == 10
