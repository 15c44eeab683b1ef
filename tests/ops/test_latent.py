"""The step of latent attention against plain NumPy, and the whole of it beside its definition."""

from __future__ import annotations

import numpy as np
import pytest

from mlxedge.encodings import PLAIN
from mlxedge.errors import UsageError
from mlxedge.fallback.forward import Buffer, Matrix, Product, Runner, Tape, Team

F32 = PLAIN["f32"]


def unfolded(
    kv: np.ndarray, rotary: np.ndarray, heads: int, plain: int
) -> tuple[np.ndarray, np.ndarray]:
    """The slow definition: keys ``[n, heads, plain + turned]`` and values ``[n, heads, value]``."""
    pieces = kv.reshape(len(kv), heads, -1)
    shared = np.repeat(rotary[:, None], heads, axis=1)
    return np.concatenate([pieces[..., :plain], shared], axis=-1), pieces[..., plain:]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize(
    ("heads", "plain", "turned", "value"), [(4, 32, 16, 40), (3, 5, 2, 7), (1, 0, 8, 16)]
)
def test_keys_and_values_are_unfolded(
    heads: int, plain: int, turned: int, value: int, count: int, threads: int
) -> None:
    rng = np.random.default_rng(1)
    widths = heads * (plain + value), turned, heads * (plain + turned), heads * value
    tape = Tape()
    hidden, result = tape.buffer(widths[0] + turned), tape.buffer(widths[2] + widths[3])
    kv, rotary, keys, values = (tape.buffer(width) for width in widths)
    tape.head()

    def rows(out: Buffer, first: int) -> Product:
        picked = np.eye(hidden.width, dtype=np.float32)[first : first + out.width]
        return Product(Matrix({"weight": picked}, F32, *picked.shape), out)

    def onto(x: Buffer, first: int) -> Product:
        placed = np.zeros((result.width, x.width), np.float32)
        placed[first : first + x.width] = np.eye(x.width)
        return Product(Matrix({"weight": placed}, F32, *placed.shape), spare, add_to=result)

    spare = tape.buffer(result.width)
    tape.linear(hidden, [rows(kv, 0), rows(rotary, kv.width)])
    tape.unfold(kv, rotary, keys, values, heads)
    nothing = np.zeros((result.width, hidden.width), np.float32)
    tape.linear(hidden, [Product(Matrix({"weight": nothing}, F32, *nothing.shape), result)])
    tape.linear(keys, [onto(keys, 0)])
    tape.linear(values, [onto(values, keys.width)])
    x = rng.normal(size=(count, hidden.width)).astype(np.float32)
    team = Team(threads)
    try:
        runner = Runner(tape, team, hidden, result, [(np.ones(1), 1.0)], rows=64)
        found = runner.project(x)
    finally:
        team.close()
    expected = unfolded(x[:, : kv.width], x[:, kv.width :], heads, plain)
    np.testing.assert_array_equal(
        found, np.concatenate([part.reshape(count, -1) for part in expected], axis=1)
    )


def test_widths_that_do_not_add_up_are_refused() -> None:
    tape = Tape()
    kv, rotary, keys, values = (tape.buffer(width) for width in (40, 2, 28, 20))
    tape.unfold(kv, rotary, keys, values, 4)
    for wrong in (3, 5):
        with pytest.raises(UsageError, match="are not made of 40"):
            tape.unfold(kv, rotary, keys, values, wrong)
    with pytest.raises(UsageError, match="not made of 28"):
        tape.unfold(keys, rotary, kv, values, 4)
