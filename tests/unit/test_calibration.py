"""Calibration: what is run, what is counted, what is kept of a run that was killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.tiny import SENTENCES, write_tiny_llama

import mlxedge
from mlxedge.calibration import run as calibration_run
from mlxedge.calibration.collect import as_calibration, calibrate, collect, input_groups
from mlxedge.calibration.imatrix import read_imatrix
from mlxedge.calibration.run import CalibrationReport, calibrate_to_file
from mlxedge.calibration.statistics import FEWEST_TOKENS, Calibration, Statistics
from mlxedge.calibration.store import (
    hessian_folder,
    layer_file,
    model_fingerprint,
    read_hessians,
    read_layer,
)
from mlxedge.calibration.texts import default_texts, default_tokens, read_text, sample
from mlxedge.errors import (
    BadWeightsError,
    CorruptFileError,
    DiskFullError,
    OutputError,
    OutputExistsError,
    SourceNotFoundError,
    TokenizerError,
    UsageError,
)
from mlxedge.models.llama import SPEC
from mlxedge.ops import Parts
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.checkpoint import Checkpoint, SourceTensor, Tensors
from mlxedge.texts import HELDOUT
from mlxedge.tokenizer import load as load_tokenizer

SETTINGS: dict[str, Any] = {"text": SENTENCES, "tokens": 96, "context": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("calibration") / "tiny", layers=3, tied=False)


def opened(folder: Path) -> Checkpoint:
    return prepare(open_source(folder))[1]


def run(model: Path, out: Path, **settings: Any) -> CalibrationReport:
    with open_source(model) as checkpoint:
        return calibrate_to_file(checkpoint, out, **(SETTINGS | settings))


# What is known of a matrix


def test_importance_is_the_mean_square() -> None:
    one = Statistics(np.array([[8.0, 0.0, 2.0]], np.float32), np.array([4]))
    np.testing.assert_array_equal(one.importance(), np.array([[2.0, 0.0, 0.5]], np.float32))


def test_an_expert_that_few_tokens_reached_is_judged_by_all() -> None:
    counts = np.array([FEWEST_TOKENS, FEWEST_TOKENS - 1, 0])
    sums = np.array([[64.0, 32.0], [31.0, 31.0], [0.0, 0.0]], np.float32)
    found = Statistics(sums, counts).importance()
    assert found.dtype == np.float32
    everyone = sums.sum(0) / counts.sum()
    np.testing.assert_allclose(found, [[2.0, 1.0], everyone, everyone], rtol=1e-6)


def test_without_tokens_nothing_is_known() -> None:
    nothing = Statistics(np.zeros((2, 3), np.float32), np.zeros(2, np.int64))
    np.testing.assert_array_equal(nothing.importance(), np.ones((2, 3)))
    many = Statistics(np.ones((2, 3), np.float32), np.array([64, 64]))
    one = Statistics(np.ones((1, 3), np.float32), np.array([2]))
    made = Calibration({"a": nothing, "b": many, "c": one}, ("t",), None, 8, 4)
    assert made.importance("a") is None
    assert made.importance("unknown") is None
    assert [made.importance(n).shape for n in "bc"] == [(2, 3), (3,)]  # type: ignore[union-attr]


# What is run


@pytest.mark.parametrize(
    ("weights", "tokens"),
    [(1, 2048), (10**9, 2048), (10**9 + 1, 1024), (3 * 10**9, 512), (7 * 10**10, 256)],
)
def test_about_the_same_work_for_any_size(weights: int, tokens: int) -> None:
    assert default_tokens(weights) == tokens


def test_the_default_text(model: Path) -> None:
    ((name, text),) = default_texts().items()
    assert name == "pydoc_data.topics"
    assert len(text) > 300_000
    checkpoint = opened(model)
    taken = sample(checkpoint)
    assert (taken.text, taken.ids.shape, taken.bos) == (name, (4, 512), False)
    assert checkpoint.tokenizer is not None
    tokens = load_tokenizer(checkpoint.tokenizer).encode(text, False, False)
    np.testing.assert_array_equal(taken.ids.reshape(-1), tokens[:2048])


def test_hessians_see_texts_of_several_kinds(model: Path) -> None:
    taken = sample(opened(model), varied=True)
    names, texts = zip(*default_texts(varied=True).items(), strict=True)
    assert len(names) == 4
    assert (taken.text, taken.ids.shape) == (", ".join(names), (16, 512))
    checkpoint = opened(model)
    assert checkpoint.tokenizer is not None
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    for i, text in enumerate(texts):
        tokens = tokenizer.encode(text, False, False)
        np.testing.assert_array_equal(taken.ids[i::4].reshape(-1), tokens[:2048])
    # What the short ones lack, the first makes up for.
    more = sample(opened(model), varied=True, tokens=60_000)
    assert more.tokens == 60_000 // 512 * 512
    everything = sample(opened(model), varied=True, tokens="all")
    assert more.tokens < everything.tokens <= everything.available
    with pytest.raises(UsageError, match="give a longer text, or fewer tokens"):
        sample(opened(model), varied=True, tokens=10_000_000)


def test_a_tokenizer_of_another_model(model: Path) -> None:
    checkpoint = opened(model)
    small = replace(checkpoint, config=checkpoint.config | {"vocab_size": 300})
    with pytest.raises(TokenizerError, match="another model's"):
        sample(small, SENTENCES, context=32)


def test_a_python_without_the_default_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="this Python came without"):
        default_texts()


def test_every_chunk_begins_with_bos(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "bos")
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    plain, led = (sample(opened(f), SENTENCES, tokens=96, context=32) for f in (model, folder))
    assert led.bos
    assert led.ids[:, 0].tolist() == [0, 0, 0]
    # The first BOS stands before the text, the others in place of a token.
    stream = [0, *plain.ids.reshape(-1)[:95].tolist()]
    for start in (32, 64):
        stream[start] = 0
    assert led.ids.reshape(-1).tolist() == stream


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "Too short a text."}, "tokens, and 32 are asked for: give a longer text"),
        ({"tokens": 100_000}, "and 100000 are asked for: give a longer text, or fewer tokens"),
        ({"tokens": 20}, "20 tokens are less than one chunk of 32"),
        ({"context": 8}, "a context of 8 tokens is too short"),
        ({"context": 4096, "tokens": 5000}, "more than the model's 2048"),
    ],
)
def test_refuses_figures_that_make_no_sense(
    model: Path, settings: dict[str, Any], message: str
) -> None:
    given = SETTINGS | settings
    with pytest.raises(UsageError, match=message):
        sample(opened(model), given.pop("text"), **given)


def test_takes_as_much_as_there_is(model: Path) -> None:
    everything = sample(opened(model), SENTENCES, tokens="all", context=32)
    assert everything.tokens == everything.available // 32 * 32 > 96
    default = sample(opened(model), SENTENCES, context=32)
    np.testing.assert_array_equal(default.ids, everything.ids)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "Something before. " + text,
        lambda text: text[1000:-1000],
    ],
    ids=["as it is", "other line ends", "longer", "a part"],
)
def test_never_the_text_that_is_measured_with(model: Path, change: Callable[[str], str]) -> None:
    text = change(HELDOUT.read_text("utf-8"))
    with pytest.raises(UsageError, match="measures with"):
        sample(opened(model), text, tokens=96, context=32)


def test_a_text_that_is_none(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "text"
    for content, message in ((b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_text(file)
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        sample(replace(opened(model), tokenizer=None), SENTENCES)


# What is counted


def test_collects_in_order_whatever_the_threads(model: Path) -> None:
    checkpoint = opened(model)
    taken = sample(checkpoint, **SETTINGS)
    first, second = (
        list(collect(checkpoint, taken, hessians=True, threads=threads)) for threads in (1, 3)
    )
    assert [one.names for one in first] == input_groups(checkpoint)
    assert first[-1].names == ("lm_head.weight",)
    for one, other in zip(first, second, strict=True):
        assert one.statistics.total == other.statistics.total == 96
        np.testing.assert_array_equal(one.statistics.sums, other.statistics.sums)
        np.testing.assert_array_equal(one.hessians[0], other.hessians[0])


def test_only_the_hessians_that_are_wanted(model: Path) -> None:
    checkpoint = opened(model)
    taken = sample(checkpoint, **SETTINGS)
    found = collect(checkpoint, taken, hessians=lambda names: "q_proj" in names[0])
    for one in found:
        assert (one.hessians is not None) == ("q_proj" in one.names[0])


def test_a_hessian_of_many_columns_is_made_in_stripes(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(model)
    taken = sample(checkpoint, **SETTINGS)
    expected = [one.hessians[0] for one in collect(checkpoint, taken, hessians=True)]
    monkeypatch.setattr("mlxedge.calibration.collect._STRIPE", 100)
    for one, hessian in zip(collect(checkpoint, taken, hessians=True), expected, strict=True):
        assert one.hessians is not None
        np.testing.assert_array_equal(one.hessians[0], one.hessians[0].T)
        np.testing.assert_allclose(one.hessians[0], hessian, rtol=1e-4, atol=1e-5)


def test_weights_out_of_range_name_their_layer(model: Path, tmp_path: Path) -> None:
    checkpoint = opened(model)
    name = "model.layers.1.post_attention_layernorm.weight"
    huge = {"weight": np.full((1, 256), 3e30, np.float32)}

    def read(start: int, stop: int) -> Parts:
        return huge

    tensors = {**checkpoint.tensors, name: replace(checkpoint.tensors[name], read_rows=read)}
    broken = replace(checkpoint, tensors=Tensors(tensors))
    out = tmp_path / "out.gguf"
    with pytest.raises(BadWeightsError, match="the activations of layer 1 are not finite"):
        calibrate_to_file(broken, out, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


# What is written


def test_writes_what_was_collected(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "imatrix.gguf"
    report = run(model, out)
    assert (report.path, report.hessians, report.tokens, report.resumed) == (out, None, 96, 0)
    assert list(out.parent.iterdir()) == [out]
    expected = calibrate(opened(model), sample(opened(model), **SETTINGS))
    found = read_imatrix(out, SPEC)
    assert set(found.tensors) == set(expected.tensors)
    assert (found.text_sha256, found.tokens, found.context) == (report.text_sha256, 96, 32)
    for name, statistics in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].sums, statistics.sums)
        assert found.tensors[name].counts.tolist() == [96]


def test_hessians_come_back_as_they_were(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    report = run(model, out, hessians=True)
    assert report.hessians == hessian_folder(out)
    checkpoint = opened(model)
    expected = collect(checkpoint, sample(checkpoint, **SETTINGS), hessians=True)
    found = read_hessians(hessian_folder(out), checkpoint)
    for ours, one in zip(found, expected, strict=True):
        assert ours.names == one.names
        np.testing.assert_array_equal(ours.statistics.sums, one.statistics.sums)
        np.testing.assert_array_equal(ours.hessians[0], one.hessians[0])


def test_hessians_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    run(model, out, hessians=True)
    other = write_tiny_llama(tmp_path / "other", layers=3, tied=False, seed=1)
    with pytest.raises(UsageError, match="of another model"):
        next(read_hessians(hessian_folder(out), opened(other)))


def test_hessians_serve_the_same_weights_in_another_file(model: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "imatrix.gguf", tmp_path / "copy.gguf"
    run(model, out, hessians=True)
    mlxedge.convert(model, "gguf:f32", copy)
    assert len(list(read_hessians(hessian_folder(out), opened(copy)))) == 13


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e6, "rms_norm_eps": 3e-6},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.3}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
    "yarn": {
        "model_type": "qwen3",
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.1, "original_max_position_embeddings": 512,
        },
    },
    "window": {"model_type": "mistral", "sliding_window": 512},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_a_model_is_the_same_in_any_file(tmp_path: Path, rope: str) -> None:
    source = write_tiny_llama(tmp_path / "source", head_dim=32, dtype="bf16", **ROPES[rope])
    plain: dict[str, Any] = {"quality": "reference", "calibrate": False}
    mlxedge.convert(source, ["gguf:f32", "mlx:bf16", "hf:bf16"], tmp_path / "out", **plain)
    made = {model_fingerprint(opened(f), 256) for f in [source, *models_in(tmp_path / "out")]}
    assert len(made) == 1


def models_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix != ".json"]
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10001.0},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rms_norm_eps": 2e-5},
        {"head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"model_type": "mistral", "sliding_window": 128},
    ],
    ids=str,
)
def test_settings_tell_models_apart(model: Path, change: dict[str, Any]) -> None:
    checkpoint = opened(model)
    other = replace(checkpoint, config=checkpoint.config | change)
    assert model_fingerprint(other, 256) != model_fingerprint(checkpoint, 256)
    # As far as the window is wide, attention is the same.
    same = model_fingerprint(other, 96) == model_fingerprint(checkpoint, 96)
    assert same == ("sliding_window" in change)


def test_damaged_hessians(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    run(model, out, hessians=True)
    folder = hessian_folder(out)
    with pytest.raises(SourceNotFoundError):
        next(read_hessians(tmp_path / "nothing", opened(model)))
    file = folder / layer_file(1)
    data = file.read_bytes()
    renamed, newer = data.replace(b"0.sums", b"9.sums"), data.replace(b"tics-2", b"tics-9")
    for broken in (data[:-4], renamed, newer):
        file.write_bytes(broken)
        with pytest.raises(CorruptFileError, match="layer-00001"):
            list(read_hessians(folder, opened(model)))
    nan = np.full(4, np.nan, "<f4").tobytes()
    file.write_bytes(data[:-16] + nan)
    with pytest.raises(CorruptFileError, match="not finite"):
        list(read_hessians(folder, opened(model)))
    file.write_bytes((folder / layer_file(2)).read_bytes())
    with pytest.raises(CorruptFileError, match="not what should be here"):
        list(read_hessians(folder, opened(model)))
    file.unlink()
    with pytest.raises(CorruptFileError, match="missing"):
        list(read_hessians(folder, opened(model)))
    file = folder / layer_file(0)
    file.write_bytes(file.read_bytes().replace(b'"context"', b'"konkext"'))
    with pytest.raises(CorruptFileError, match="no context"):
        list(read_hessians(folder, opened(model)))


# What a run leaves that ends early


def stop_at(layer: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, name: str) -> None:
        if name == f"layer {layer}":
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("hessians", [False, True])
def test_goes_on_after_the_last_finished_layer(model: Path, tmp_path: Path, hessians: bool) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    run(model, whole, hessians=hessians)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, hessians=hessians, progress=stop_at(2))
    assert not out.exists()
    checkpoint = opened(model)
    read: list[str] = []

    def spy(tensor: SourceTensor) -> SourceTensor:
        def rows(start: int, stop: int) -> Parts:
            if stop - start == tensor.rows > 1:
                read.append(tensor.name)
            return tensor.read_rows(start, stop)

        return replace(tensor, read_rows=rows)

    spied = Tensors({n: spy(t) for n, t in checkpoint.tensors.items()})
    again = replace(checkpoint, tensors=spied)
    report = calibrate_to_file(again, out, hessians=hessians, **SETTINGS)
    assert report.resumed == 2
    assert {name.split(".")[2] for name in read} == {"2"}
    assert out.read_bytes() == whole.read_bytes()
    if hessians:
        for file in hessian_folder(whole).iterdir():
            assert (hessian_folder(out) / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / ".out.gguf.partial").exists()


@pytest.mark.parametrize(
    "change", [{"tokens": 64}, {"text": SENTENCES[5:]}, {"hessians": True}, {"context": 48}]
)
def test_another_run_starts_clean(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, progress=stop_at(2))
    assert run(model, out, **change).resumed == 0
    run(model, whole, **change)
    assert out.read_bytes() == whole.read_bytes()


def test_another_model_starts_clean(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, progress=stop_at(2))
    other = write_tiny_llama(tmp_path / "other", layers=3, tied=False, seed=1)
    assert run(other, out).resumed == 0


def test_another_version_starts_clean(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(model, out, progress=stop_at(2))
    monkeypatch.setattr(calibration_run, "VERSION", "0.0")
    assert run(model, out).resumed == 0


KILLED = """
import os, signal, sys
from mlxedge.calibration.run import calibrate_to_file
from mlxedge.sources import open_source
def progress(done, total, name):
    if name == "layer 2":
        os.kill(os.getpid(), signal.SIGKILL)
with open_source(sys.argv[1]) as checkpoint:
    calibrate_to_file(checkpoint, sys.argv[2], text=sys.argv[3], tokens=96, context=32,
                      progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on(model: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    command = [sys.executable, "-c", KILLED, str(model), str(out), SENTENCES]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert run(model, out).resumed == 2
    run(model, whole)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("failing", [1, 4])
def test_a_full_disk_is_one_error_and_costs_a_layer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each layer is synced twice: its statistics, and the hidden states after it."""
    out = tmp_path / "out.gguf"
    calls = 0
    real = os.fsync

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(calibration_run.os, "fsync", fsync)
    with pytest.raises(DiskFullError, match="the disk is full"):
        run(model, out)
    assert not out.exists()
    monkeypatch.undo()
    assert run(model, out).resumed == (failing - 1) // 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_a_kill_between_the_two_last_names(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    real = Path.replace

    def replace_unless_last(path: Path, target: Any) -> Path:
        if target == out:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace_unless_last)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, hessians=True)
    assert hessian_folder(out).is_dir()
    assert not out.exists()
    monkeypatch.undo()
    assert run(model, out, hessians=True).resumed == 3
    assert len(read_imatrix(out, SPEC).tensors) == 22
    assert len(list(read_hessians(hessian_folder(out), opened(model)))) == 13


def test_nothing_is_replaced_unasked(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        run(model, out)
    assert out.read_text() == "mine"
    run(model, out, force=True)
    hessian_folder(out).mkdir()
    (hessian_folder(out) / "layer-00000.safetensors").write_text("mine, too")
    out.unlink()
    with pytest.raises(OutputExistsError, match="hessians exists"):
        run(model, out, hessians=True)
    run(model, out, hessians=True, force=True)
    assert read_layer(hessian_folder(out) / layer_file(0))[0][0].statistics.total == 96


def test_outputs_that_cannot_be(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        run(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        run(model, tmp_path / "file" / "out.gguf")


def test_two_runs_of_one_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    held, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int, name: str) -> None:
        held.set()
        go_on.wait(60)

    first = threading.Thread(target=run, args=(model, out), kwargs={"progress": wait})
    first.start()
    try:
        assert held.wait(60)
        with pytest.raises(OutputError, match="being written by another run"):
            run(model, out)
    finally:
        go_on.set()
        first.join()
    assert out.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_the_folder_goes_before_its_lock(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Or another run could begin in it meanwhile."""
    left: list[list[str]] = []
    real = calibration_run.lock_partial

    def locked(folder: Path, output: Path) -> Any:
        lock = real(folder, output)
        release = lock.release

        def spy(force: bool = False) -> None:
            left.append([path.name for path in tmp_path.iterdir()])
            release(force)

        monkeypatch.setattr(lock, "release", spy)
        return lock

    def stop(done: int, total: int, name: str) -> None:
        raise BadWeightsError(name)

    monkeypatch.setattr(calibration_run, "lock_partial", locked)
    if fails:
        with pytest.raises(BadWeightsError):
            run(model, tmp_path / "out.gguf", progress=stop)
    else:
        run(model, tmp_path / "out.gguf")
    assert left == [[] if fails else ["out.gguf"]]


def test_what_was_collected_may_be_asked_by_name(model: Path) -> None:
    checkpoint = opened(model)
    taken = sample(checkpoint, **SETTINGS)
    made = as_calibration(collect(checkpoint, taken), taken)
    q, k = (made.importance(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qk")
    assert q is not None
    np.testing.assert_array_equal(q, k)
    assert made.importance("model.norm.weight") is None
