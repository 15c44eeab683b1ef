"""Models that keep states: however a prompt is cut, and from a cache, it is the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from oracles.architectures_recurrent import SAVED
from oracles.checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file

import mlxedge
from mlxedge.errors import UsageError
from mlxedge.generate import Model

TOKENS = [int(t) for t in np.random.default_rng(4).integers(3, 512, 60)]
#: One of each kind of layers.
NAMES = [name for name in SAVED if "-" not in name]


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(home / "model", **SAVED[request.param])


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with mlxedge.load(folder, engine="numpy", threads=2) as loaded:
        yield loaded


def test_pieces_of_any_length(model: Model) -> None:
    truth = model.logits(TOKENS)
    session, start = model.session(), 0
    for piece in (1, 3, 1, 2, 30, 1, 5, 17):
        start += piece
        found = session.feed(TOKENS[start - piece : start])
        assert np.abs(found - truth[start - 1]).max() <= 2e-5 * np.abs(truth).max()
    assert start == len(TOKENS)
    # A cache that held another sequence begins anew.
    session.reset()
    found = session.feed(TOKENS[:9])
    assert np.abs(found - truth[8]).max() <= 2e-5 * np.abs(truth).max()


def test_threads_change_nothing(folder: Path, model: Model) -> None:
    with mlxedge.load(folder, engine="numpy", threads=1) as alone:
        np.testing.assert_array_equal(alone.logits(TOKENS), model.logits(TOKENS))


def test_sessions_agree_with_mlx_lm(folder: Path, model: Model) -> None:
    """Two turns, one that goes back, and a new start; mlx-lm runs a token ahead."""

    def talk(model: Model) -> list[list[int]]:
        session, tokens, turns = model.session(), list(TOKENS), []
        for _ in range(2):
            stream = model.stream(tokens, max_tokens=6, session=session)
            turns.append([c.token for c in stream])
            tokens += [*turns[-1], 17, 18]
        for shorter in ([*TOKENS[:20], 9], [5, 6, 7]):
            stream = model.stream(shorter, max_tokens=4, session=session)
            turns.append([c.token for c in stream])
        session.reset()
        turns.append([int(session.feed(TOKENS[:7]).argmax())])
        return turns

    source = folder
    if "falcon_h1" in folder.parent.name:
        with pytest.raises(UsageError, match="right from an MLX folder only: convert"):
            mlxedge.load(folder, engine="mlx")
        source = folder.parent / "mlx"
        mlxedge.convert(folder, "mlx:f32", source)
    with mlxedge.load(source, engine="mlx") as theirs:
        assert talk(theirs) == talk(model)


def test_a_stream_goes_on_as_all_at_once(model: Model) -> None:
    said = [c.token for c in model.stream(TOKENS, max_tokens=8)]
    logits = model.logits([*TOKENS, *said])
    assert said == logits[len(TOKENS) - 1 : -1].argmax(-1).tolist()


def test_all_within_a_module(tmp_path: Path) -> None:
    """As the files of Codestral Mamba have it."""
    plain = write_checkpoint(tmp_path / "plain", "mamba2")
    within = write_checkpoint(tmp_path / "within", "mamba2")
    weights = load_file(within / "model.safetensors")
    save_file({f"model.{name}": w for name, w in weights.items()}, within / "model.safetensors")
    found = [mlxedge.load(folder, engine="numpy").logits(TOKENS) for folder in (plain, within)]
    np.testing.assert_array_equal(*found)
