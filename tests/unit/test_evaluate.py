"""Perplexity and divergence: the formulas against slow ones, the chunks, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from oracles.tiny import SENTENCES, write_tiny_llama
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.cli import main
from mlxedge.errors import BadWeightsError, TokenizerError, UsageError
from mlxedge.evaluate import (
    Evaluation,
    compare_logits,
    evaluate,
    mean_and_error,
    negative_log_likelihood,
)
from mlxedge.texts import HELDOUT


def slow_log_softmax(row: np.ndarray) -> list[float]:
    """In exact sums of doubles, one number at a time."""
    values = [float(v) for v in row]
    top = max(values)
    total = math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - top - total for v in values]


def slow_divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    return math.fsum(
        math.exp(p) * (p - q)
        for p, q in zip(slow_log_softmax(reference), slow_log_softmax(logits), strict=True)
    )


def logs(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32)


@pytest.fixture
def random_logits() -> Callable[[int, int, float], np.ndarray]:
    rng = np.random.default_rng(7)
    return lambda rows, vocab, scale: rng.normal(0, scale, (rows, vocab)).astype(np.float32)


def test_what_a_hand_computes() -> None:
    reference, logits = logs([0.5, 0.5], [0.9, 0.1]), logs([0.75, 0.25], [0.1, 0.9])
    nll = negative_log_likelihood(reference, np.array([0, 1]))
    np.testing.assert_allclose(nll, [math.log(2), math.log(10)], rtol=1e-6)
    kl, same = compare_logits(reference, logits)
    expected = [0.5 * math.log(4 / 3), 0.8 * math.log(9)]
    np.testing.assert_allclose(kl, expected, rtol=1e-6)
    # Equal ones: the first counts.
    assert same.tolist() == [True, False]


@pytest.mark.parametrize(("vocab", "scale"), [(3, 1.0), (513, 4.0), (513, 300.0), (100_003, 3.0)])
def test_the_formulas(
    random_logits: Callable[[int, int, float], np.ndarray], vocab: int, scale: float
) -> None:
    """100,003 tokens go two rows at a time, and the third alone."""
    reference = random_logits(5, vocab, scale)
    logits = reference + random_logits(5, vocab, 0.05 * scale)
    targets = np.arange(5) * 7 % vocab
    nll = negative_log_likelihood(logits, targets)
    kl, same = compare_logits(reference, logits)
    expected = [-slow_log_softmax(row)[t] for row, t in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(nll, expected, rtol=1e-12, atol=1e-12)
    pairs = list(zip(reference, logits, strict=True))
    np.testing.assert_allclose(kl, [slow_divergence(p, q) for p, q in pairs], 1e-9, 1e-12)
    assert same.tolist() == [int(p.argmax()) == int(q.argmax()) for p, q in pairs]
    assert (kl >= -1e-12).all()
    with ThreadPoolExecutor(3) as pool:
        assert (negative_log_likelihood(logits, targets, pool) == nll).all()
        assert (compare_logits(reference, logits, pool)[0] == kl).all()


def test_a_constant_changes_nothing(
    random_logits: Callable[[int, int, float], np.ndarray],
) -> None:
    """Powers of two, so that adding it rounds nothing away."""
    reference = np.round(random_logits(4, 50, 3.0) * 256) / 256
    logits = np.round(random_logits(4, 50, 3.0) * 256) / 256
    kl, _ = compare_logits(reference, logits)
    moved, _ = compare_logits(reference + np.float32(2048), logits - np.float32(1024))
    np.testing.assert_allclose(moved, kl, rtol=1e-9)
    itself, same = compare_logits(reference, reference)
    assert itself.tolist() == [0.0] * 4
    assert same.all()


def test_the_error_is_that_of_the_mean() -> None:
    values = np.array([1.0, 4.0, 4.0, 7.5, 9.0])
    found = mean_and_error(values)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 5**0.5)


@pytest.fixture(scope="module")
def home(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized, and again with a tokenizer that puts BOS before a text."""
    home = tmp_path_factory.mktemp("evaluate")
    mlxedge.convert(tiny, ["gguf:q8_0", "mlx:4bit"], home)
    shutil.copytree(tiny, home / "bos")
    settings = json.loads((home / "bos" / "tokenizer_config.json").read_text())
    (home / "bos" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"add_bos_token": True})
    )
    return home


@pytest.mark.parametrize("name", ["tiny-llama-Q8_0.gguf", "tiny-llama-mlx-4bit", "bos"])
def test_chunks_and_statistics(home: Path, tiny: Path, name: str) -> None:
    """The whole of it again, token by token, from the logits of each chunk."""
    path, reference = home / name, home / "bos" if name == "bos" else tiny
    events: list[tuple[int, int, str]] = []
    found = evaluate(
        [path], against=reference, text=SENTENCES, context=33, chunks=4, threads=2,
        progress=lambda *event: events.append(event),
    )  # fmt: skip
    nll: list[float] = []
    base: list[float] = []
    kl: list[float] = []
    same: list[bool] = []
    with mlxedge.load(path, engine="numpy") as ours, mlxedge.load(reference, engine="numpy") as ref:
        tokens = ours.tokenizer.encode(SENTENCES)
        assert (tokens[0] == ours.tokenizer.bos_id) == found.bos == (name == "bos")
        assert (found.tokens, found.chunks, found.scored) == (len(tokens), 4, 64)
        for chunk in range(4):
            piece = tokens[33 * chunk : 33 * chunk + 33]
            fed = [tokens[0], *piece[1:]] if found.bos else piece
            q, p = ours.logits(fed), ref.logits(fed)
            # 33 tokens: positions 16 to 31 predict 17 to 32.
            for at in range(16, 32):
                nll.append(-slow_log_softmax(q[at])[piece[at + 1]])
                base.append(-slow_log_softmax(p[at])[piece[at + 1]])
                kl.append(slow_divergence(p[at], q[at]))
                same.append(int(p[at].argmax()) == int(q[at].argmax()))
    (score,) = found.models
    assert found.reference is not None
    assert score.divergence is not None
    assert found.reference.divergence is None
    close = {"rel": 1e-4, "abs": 1e-7}
    assert score.nll.value == pytest.approx(statistics.fmean(nll), **close)
    assert score.perplexity.value == pytest.approx(math.exp(statistics.fmean(nll)), **close)
    error = statistics.stdev(nll) / 8
    assert score.perplexity.error == pytest.approx(score.perplexity.value * error, **close)
    assert found.reference.nll.value == pytest.approx(statistics.fmean(base), **close)
    divergence, ordered = score.divergence, sorted(kl)
    assert divergence.mean.value == pytest.approx(statistics.fmean(kl), rel=1e-3, abs=1e-9)
    assert divergence.mean.error == pytest.approx(statistics.stdev(kl) / 8, rel=1e-3, abs=1e-9)
    assert divergence.median == pytest.approx(statistics.median(kl), rel=1e-3, abs=1e-9)
    # 0.99 × 63 = 62.37: between the last two.
    p99 = 0.63 * ordered[-2] + 0.37 * ordered[-1]
    assert divergence.p99 == pytest.approx(p99, rel=1e-3, abs=1e-9)
    assert divergence.maximum == pytest.approx(ordered[-1], rel=1e-3, abs=1e-9)
    assert divergence.same_top.value == statistics.fmean(same)
    ratios = [a - b for a, b in zip(nll, base, strict=True)]
    assert divergence.log_ratio.value == pytest.approx(statistics.fmean(ratios), abs=1e-5)
    assert divergence.log_ratio.error == pytest.approx(statistics.stdev(ratios) / 8, abs=1e-5)
    assert events[0] == (0, 4, found.reference.name)
    assert events[-1] == (4, 4, "")


def test_a_model_against_itself(tiny: Path) -> None:
    found = evaluate([tiny], against=tiny, text=SENTENCES, context=64)
    assert found.reference is not None
    (score,) = found.models
    assert score.perplexity == found.reference.perplexity
    divergence = score.divergence
    assert divergence is not None
    assert (divergence.mean.value, divergence.mean.error, divergence.maximum) == (0, 0, 0)
    assert (divergence.same_top.value, divergence.same_top.error) == (1, 0)
    assert divergence.log_ratio.value == 0


@pytest.mark.parametrize("name", ["tiny-llama-Q8_0.gguf", "bos"])
def test_layer_by_layer_gives_the_same(home: Path, tiny: Path, name: str) -> None:
    path, reference = home / name, home / "bos" if name == "bos" else tiny
    whole, by_layer = (
        evaluate([path], against=reference, text=SENTENCES, context=40, chunks=3, by_layer=choice)
        for choice in (False, True)
    )
    assert by_layer == whole


def test_a_model_that_would_fill_the_memory_is_run_by_layer(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxedge.evaluate._physical_memory", lambda: 1e5)
    events: list[str] = []
    evaluate(
        [tiny], text=SENTENCES, context=40, chunks=1,
        progress=lambda done, total, name: events.append(name),
    )  # fmt: skip
    assert any("layer 1" in name for name in events)


def test_the_text_that_ships() -> None:
    text = HELDOUT.read_text(encoding="utf-8")
    assert 100_000 < len(text.encode()) < 200_000
    assert HELDOUT.with_name("README.md").is_file()


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def with_infinity(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][3] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (without_tokenizer, TokenizerError, "has no tokenizer"),
        (with_infinity, BadWeightsError, "the logits of chunk 1 are not finite"),
    ],
)
def test_a_model_that_cannot_be_measured(
    tmp_path: Path, change: Callable[[Path], None], error: type[Exception], problem: str
) -> None:
    folder = write_tiny_llama(tmp_path / "model", layers=1)
    change(folder)
    with pytest.raises(error, match=problem):
        evaluate([folder], text=SENTENCES, context=64, chunks=1)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"models": []}, "nothing to evaluate"),
        ({"context": 7}, "8 tokens at least"),
        ({"chunks": 0}, "one at least"),
        ({"text": "Hello."}, "0 chunks of 64"),
        ({"chunks": 10_000}, "chunks of 64: give a longer text"),
        ({"text": None, "context": 4096}, "has a context of 2048 tokens"),
        ({"by_layer": True, "engine": "mlx"}, "holds models whole"),
        ({"engine": "mlc"}, "unknown engine 'mlc'"),
        ({"against": "bos"}, r"reads the text as other tokens than .*bos \(from token 0"),
        ({"against": "demo"}, "a vocabulary of 512 tokens and .* one of 2048"),
    ],
)
def test_what_is_refused(tiny: Path, home: Path, settings: dict[str, Any], problem: str) -> None:
    from mlxedge.demo import model_path

    given: dict[str, Any] = {"models": [tiny], "text": SENTENCES, "context": 64} | settings
    if name := given.get("against"):
        given["against"] = model_path() if name == "demo" else home / name
    with pytest.raises(UsageError, match=problem):
        evaluate(given.pop("models"), **given)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_the_command(tiny: Path, home: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES, encoding="utf-8")
    quantized = home / "tiny-llama-Q8_0.gguf"
    options = ("--against", tiny, "--text", text, "--context", 64, "--chunks", 3)
    done = run(quantized, *options, "--json")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    expected: Evaluation = evaluate([quantized], against=tiny, text=SENTENCES, context=64, chunks=3)
    (model,) = record["models"]
    assert model["path"] == str(quantized)
    assert model["perplexity"]["value"] == pytest.approx(expected.models[0].perplexity.value)
    assert (record["scored"], record["chunks"], record["bos"]) == (93, 3, False)
    assert record["reference"]["divergence"] is None
    shown = run(quantized, *options)
    assert shown.exit_code == 0, shown.stderr
    heading, reference, line = shown.stdout.splitlines()
    assert heading.split()[:3] == ["model", "weights", "perplexity"]
    assert reference.startswith("tiny-llama ")
    assert line.startswith("tiny-llama-Q8_0.gguf")
    assert f"{model['divergence']['mean']['value']:.6f} ±" in line
    assert "93 tokens scored in 3 chunks of 64\n" in shown.stderr
    alone = run(quantized, "--text", text, "--context", 64)
    assert alone.stdout.splitlines()[0].split() == ["model", "weights", "perplexity"]


def test_models_of_one_name_are_shown_with_their_paths(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES, encoding="utf-8")
    copies = [shutil.copytree(tiny, tmp_path / name / "model") for name in ("one", "two")]
    shown = run(*copies, "--text", text, "--context", 64, "--chunks", 1).stdout
    assert all(str(copy) in shown for copy in copies)


def test_a_text_that_is_none(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"caf\xe9")
    done = run(tiny, "--text", file)
    assert done.exit_code == 2
    assert "is not UTF-8 (byte 3)" in done.stderr
