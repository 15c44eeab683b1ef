"""The search for Q3_K, Q6_K and IQ4_XS: the same bytes on both backends, and their worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import ggml
from oracles.hard_weights import KINDS, hard_weights

from mlxedge.accel import OPS as MLX
from mlxedge.accel import fast_k_signed as on_mlx
from mlxedge.encodings import GGML
from mlxedge.fallback import OPS
from mlxedge.fallback import fast_k_signed as on_numpy

NAMES = ("q3_k", "q6_k", "iq4_xs")
LEVELS = {
    "q3_k": np.arange(-4, 4),
    "q6_k": np.arange(-32, 32),
    "iq4_xs": np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]),
}

each = pytest.mark.parametrize("name", NAMES)


def encode(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    return OPS.encode(x, GGML[name], importance, quality="fast")["weight"]


def decode(name: str, data: np.ndarray) -> np.ndarray:
    return OPS.decode({"weight": data}, GGML[name])


def some_weights(rows: int = 24, cols: int = 768, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights with outliers, and importance that a few columns dominate."""
    rng = np.random.default_rng(seed)
    x = 0.05 * rng.standard_t(4, (rows, cols))
    importance = np.exp(2.0 * rng.normal(size=cols))
    return x.astype(np.float32), importance.astype(np.float32)


def importances(cols: int) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(cols)
    random = np.exp(2.0 * rng.normal(size=cols))
    return {
        "none": None,
        "zeros in places": random * (rng.random(cols) < 0.6),
        "whole sub-blocks of zeros": np.repeat(rng.random(cols // 16) < 0.5, 16) * random,
        "all zeros": np.zeros(cols),
        "of all sizes": 10.0 ** rng.uniform(-44, 38, cols),
    }


def steps(name: str, data: np.ndarray) -> np.ndarray:
    """What a level counts, as stored: float32 ``[blocks, sub-blocks]``."""
    blocks = data.reshape(-1, GGML[name].block_bytes)
    at = {"q3_k": 108, "q6_k": 208, "iq4_xs": 0}[name]
    d = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
    if name == "q6_k":
        return d * blocks[:, 192:208].view(np.int8).astype(np.float32)
    if name == "q3_k":
        packed, j = blocks[:, 96:108].astype(int), np.arange(16)
        low, high = packed[:, j % 8] >> 4 * (j // 8), packed[:, 8 + j % 4] >> 2 * (j // 4)
    else:
        packed, j = blocks[:, 2:8].astype(int), np.arange(8)
        low, high = packed[:, 2 + j // 2] >> 4 * (j % 2), packed[:, j // 4] >> 2 * (j % 4)
    return d * ((low & 15 | (high & 3) << 4) - 32).astype(np.float32)


@each
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_on_hard_weights(name: str, kind: str) -> None:
    x = hard_weights(kind, "f32")
    for what, importance in importances(x.shape[1]).items():
        if importance is not None:
            importance = importance.astype(np.float32)
        ours = encode(name, x, importance)
        theirs = MLX.encode(x, GGML[name], importance, quality="fast")["weight"]
        assert np.array_equal(ours, theirs), what
        assert np.isfinite(decode(name, ours)).all(), what


finite = {"width": 32, "allow_nan": False, "allow_infinity": False}


@each
@settings(max_examples=15, deadline=None)
@given(
    x=arrays(np.float32, (1, 512), elements=st.floats(**finite)),
    importance=arrays(np.float32, 512, elements=st.floats(0.0, 2.0**100, width=32)),
)
def test_backends_agree_on_anything(name: str, x: np.ndarray, importance: np.ndarray) -> None:
    ours = encode(name, x, importance)
    theirs = MLX.encode(x, GGML[name], importance, quality="fast")["weight"]
    assert np.array_equal(ours, theirs)
    assert np.isfinite(decode(name, ours)).all()


@pytest.mark.parametrize("name", ["q3_k", "iq4_xs"])
def test_fused_stages_give_the_same_bytes(name: str) -> None:
    x, importance = some_weights(rows=4)
    fused = on_mlx.search(x, GGML[name], importance, compiled=True)["weight"]
    assert np.array_equal(fused, encode(name, x, importance))


@each
def test_pieces_of_a_tensor_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, importance = some_weights(rows=5)
    monkeypatch.setattr(on_mlx, "AT_ONCE", 4)
    made = on_mlx.search(x, GGML[name], importance)["weight"]
    assert np.array_equal(made, encode(name, x, importance))


@each
@pytest.mark.parametrize("weighed", [True, False])
def test_less_error_than_the_rule_of_ggml(name: str, weighed: bool) -> None:
    x, importance = some_weights(rows=48)
    importance = importance if weighed else np.ones_like(importance)

    def error(data: np.ndarray) -> float:
        return float((importance * (decode(name, data).astype(np.float64) - x) ** 2).sum())

    reference = OPS.encode(x, GGML[name], importance)["weight"]
    most = 0.95 if weighed else 0.99
    assert error(encode(name, x, importance)) < most * error(reference)


@each
def test_codes_are_the_best_for_the_stored_scales(name: str) -> None:
    x, importance = some_weights()
    importance[100:400] = 0.0
    data = encode(name, x, importance)
    stored = steps(name, data)
    weights = x.reshape(*stored.shape, -1).astype(np.float64)
    distances = np.abs(weights[..., None] - stored[..., None, None] * LEVELS[name])
    made = np.abs(weights - decode(name, data).reshape(weights.shape))
    assert (made <= distances.min(-1) * (1 + 1e-5) + 1e-9).all()
    assert (made < np.abs(weights)).mean() > 0.6


@each
def test_numbers_are_those_that_ggml_reads(name: str) -> None:
    x, importance = some_weights()
    data = encode(name, x, importance)
    assert np.array_equal(ggml.dequantize(name, data, x.size), decode(name, data).ravel())


@each
def test_importance_counts(name: str) -> None:
    x, importance = some_weights()
    alike, weighed = (decode(name, encode(name, x, i)) for i in (None, importance))
    most = importance > np.quantile(importance, 0.9)
    assert ((weighed - x)[:, most] ** 2).sum() < 0.8 * ((alike - x)[:, most] ** 2).sum()


@each
def test_blocks_without_importance_count_all_columns(name: str) -> None:
    x, importance = some_weights()
    importance[256:512] = 0.0
    size = GGML[name].block_bytes
    made, alike = encode(name, x, importance), encode(name, x)
    assert np.array_equal(made[:, size : 2 * size], alike[:, size : 2 * size])
    assert not np.array_equal(made[:, :size], alike[:, :size])


@each
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_only_ratios_of_importance_count(name: str, factor: float) -> None:
    x, importance = some_weights()
    scaled = encode(name, x, importance * np.float32(factor))
    assert np.array_equal(scaled, encode(name, x, importance))


@each
@pytest.mark.parametrize("operations", [OPS, MLX], ids=["numpy", "mlx"])
def test_rows_are_independent(name: str, operations: object) -> None:
    x, importance = some_weights(rows=7)
    whole = operations.encode(x, GGML[name], importance, quality="fast")["weight"]  # type: ignore[attr-defined]
    part = operations.encode(x[2:5], GGML[name], importance, quality="fast")["weight"]  # type: ignore[attr-defined]
    assert np.array_equal(whole[2:5], part)


@each
def test_tiny_weights_are_kept_where_the_format_can(name: str) -> None:
    x = np.random.default_rng(3).normal(size=(4, 256)).astype(np.float32)
    x *= np.float32({"q3_k": 2e-7, "q6_k": 4e-7, "iq4_xs": 3e-6}[name])
    made = decode(name, encode(name, x))
    assert ((made - x) ** 2).sum() < 0.3 * (x**2).sum()


@each
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_survived(name: str, value: float) -> None:
    x, importance = some_weights(rows=3)
    x[1, 300] = value
    for operations in (OPS, MLX):
        made = operations.encode(x, GGML[name], importance, quality="fast")["weight"]
        assert np.array_equal(made[0], encode(name, x[:1], importance)[0])


@each
def test_inputs_are_left_as_they_are(name: str) -> None:
    x, importance = some_weights(rows=2)
    before = x.copy(), importance.copy()
    on_numpy.search(x, GGML[name], importance)
    x[0, 0] += 0.0  # still writable
    assert np.array_equal(x, before[0])
    assert np.array_equal(importance, before[1])
