"""The engine that hands a folder to mlx-lm, against mlxedge's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import SAVED, write_checkpoint
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.errors import BackendError, UsageError
from mlxedge.generate import Model, Sampling

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TOKENS = [int(t) for t in np.random.default_rng(4).integers(3, 512, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the style of transformers 5, which mlx-lm alone would misread."""
    home = tmp_path_factory.mktemp("mlx-engine")
    return write_tiny_llama(home / "tiny", rope=LLAMA3, layers=1)


@pytest.fixture(scope="module")
def models(folder: Path) -> Iterator[tuple[Model, Model]]:
    with (
        mlxedge.load(folder, engine="mlx") as theirs,
        mlxedge.load(folder, engine="numpy") as ours,
    ):
        yield theirs, ours


def test_logits_agree(models: tuple[Model, Model]) -> None:
    theirs, ours = (m.logits(TOKENS) for m in models)
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() <= 1e-3 * np.abs(ours).max()


def test_a_folder_of_a_whole_model_is_run(tmp_path: Path) -> None:
    """mlx-lm has Gemma 3n only within the model that sees and hears, and its cache to share keys
    and values."""
    source = write_checkpoint(tmp_path / "tiny", **SAVED["gemma3n_text-shared"])
    mlxedge.convert(source, "mlx:f32", tmp_path / "made")
    with (
        mlxedge.load(tmp_path / "made", engine="mlx") as theirs,
        mlxedge.load(tmp_path / "made", engine="numpy") as ours,
    ):
        assert theirs.context_length == ours.context_length
        logits = ours.logits(TOKENS)
        assert np.abs(theirs.logits(TOKENS) - logits).max() <= 1e-4 * np.abs(logits).max()


def test_greedy_tokens_and_sessions_agree(models: tuple[Model, Model]) -> None:
    """Two turns; mlx-lm runs a token ahead, which must not show."""

    def talk(model: Model) -> list[list[int]]:
        session, tokens, turns = model.session(), list(TOKENS), []
        for _ in range(2):
            stream = model.stream(tokens, max_tokens=6, session=session)
            turns.append([c.token for c in stream])
            tokens += [*turns[-1], 17, 18]
        assert stream.stats.reused_tokens == len(TOKENS) + 5
        stream = model.stream([*TOKENS[:20], 9], max_tokens=3, session=session)
        turns.append([c.token for c in stream])
        assert stream.stats.reused_tokens == 20
        return turns

    theirs, ours = (talk(m) for m in models)
    assert theirs == ours


def test_feeding_after_a_stream(models: tuple[Model, Model]) -> None:
    theirs, ours = models
    session = theirs.session()
    said = [c.token for c in theirs.stream(TOKENS, max_tokens=4, session=session)]
    found = session.feed([5])
    truth = ours.logits([*TOKENS, *said, 5])[-1]
    assert np.abs(found - truth).max() <= 1e-3 * np.abs(truth).max()


def test_sampling_repeats_with_a_seed(models: tuple[Model, Model]) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, seed=seed)
        return [c.token for c in models[0].stream(TOKENS, max_tokens=5, sampling=sampling)]

    assert draw(1) == draw(1) != draw(2)


def test_a_gguf_file_is_not_for_mlx(folder: Path, tmp_path: Path) -> None:
    mlxedge.convert(folder, "gguf:q8_0", tmp_path / "tiny.gguf")
    with pytest.raises(UsageError, match="convert it first"):
        mlxedge.load(tmp_path / "tiny.gguf", engine="mlx")
    with mlxedge.load(tmp_path / "tiny.gguf") as model:
        assert model.engine == "numpy"


def test_a_folder_that_mlx_lm_refuses(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny", layers=1)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 600'))
    with pytest.raises(BackendError, match="mlx-lm cannot load"):
        mlxedge.load(folder, engine="mlx")
