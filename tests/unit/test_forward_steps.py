"""Steps of a forward pass that few architectures have, and that a position is what it is however
many went before it in the same pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import PARTIAL, SAVED, write_checkpoint

from mlxedge.errors import UsageError
from mlxedge.models.decoder import Decoder
from mlxedge.ops import load_forward
from mlxedge.prepare import prepare
from mlxedge.sources import open_source

TOKENS = np.random.default_rng(3).integers(3, 512, 70)
CHECKPOINTS = {name: SAVED[name] for name in ("ministral3", "apertus", "phi", "stablelm-parallel")}
CHECKPOINTS["olmo"] = PARTIAL["olmo-clipped-tied"][0]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_passes_of_any_length_give_the_same(name: str, threads: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", **CHECKPOINTS[name])
    with open_source(folder) as opened:
        model = Decoder(prepare(opened)[1], threads)
        whole = model.run(TOKENS, 0, model.cache(), len(TOKENS))
        cache, found = model.cache(), []
        for start, stop in ((0, 1), (1, 30), (30, 31), (31, 64), (64, 70)):
            found.append(model.run(TOKENS[start:stop], start, cache, stop - start))
        model.close()
    error = np.abs(np.concatenate(found) - whole).max()
    assert error <= 1e-5 * np.abs(whole).max()


def test_a_temperature_needs_a_span() -> None:
    tape = load_forward().Tape()
    with pytest.raises(UsageError, match="every 0 positions"):
        tape.temper(tape.buffer(16), 0.1, 0)
