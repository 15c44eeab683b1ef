"""The fallback's encoders of ggml's lattice formats write ggml's bytes, and search for better."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import ggml
from oracles.hard_weights import KINDS, hard_weights

from mlxedge.encodings import GGML
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.fallback import OPS
from mlxedge.fallback.ggml_encode import NEEDS_IMPORTANCE
from mlxedge.fallback.ggml_iq_maps import RUN, RUN_BITS, lattice
from mlxedge.ops import Quality

TYPES = ["iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m"]
UNINFORMED = [name for name in TYPES if name not in NEEDS_IMPORTANCE]
#: On weights beyond about 1e19 ggml aborts: their squares overflow.
TAME = [kind for kind in KINDS if not kind.startswith("huge")]

against_ggml = pytest.mark.skipif(
    not ggml.EXACT, reason="ggml's build for this machine may contract multiply and add"
)


def encode(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return OPS.encode(x, GGML[name], importance)["weight"]


def assert_same(name: str, x: np.ndarray, importance: np.ndarray | None, what: str = "") -> None:
    width = GGML[name].block_bytes
    expected = ggml.quantize(name, x, importance=importance).reshape(-1, width)
    wrong = expected != encode(name, x, importance).reshape(-1, width)
    blocks, where = np.flatnonzero(wrong.any(1)), np.flatnonzero(wrong.any(0))
    assert not blocks.size, f"{name}, {what}: blocks {blocks} of {len(wrong)} differ, bytes {where}"


def importances(cols: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(cols)
    random = rng.random(cols)
    made = {
        "ones": np.ones(cols),
        "random": random,
        "mean squares": rng.normal(size=cols) ** 2 * 10.0 ** rng.uniform(-4, 4, cols),
        "zeros in places": random * (rng.random(cols) < 0.5),
        "whole blocks of zeros": random * np.repeat(rng.random(cols // 32) < 0.5, 32),
        "one column": (np.arange(cols) == 5) * 1.0,
        "spikes": np.where(rng.random(cols) < 0.03, 1e6, 1e-3),
        "all zeros": np.zeros(cols),
        "negative zeros": -np.zeros(cols),
        "tiny": 1e-40 * random,
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


@against_ggml
@pytest.mark.parametrize("what", list(importances(256)))
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_ggml(name: str, what: str) -> None:
    for kind in TAME:
        x = hard_weights(kind, "f32")
        assert_same(name, x, importances(256)[what], f"{kind}, {what}")
    for kind in ("normal", "like a model"):
        x = hard_weights(kind, "f32").reshape(2, 768)
        assert_same(name, x, importances(768)[what], f"{kind}, {what}")


@against_ggml
@pytest.mark.parametrize("name", UNINFORMED)
def test_bytes_equal_ggml_without_importance(name: str) -> None:
    for kind in TAME:
        assert_same(name, hard_weights(kind, "f32"), None, kind)


@against_ggml
@pytest.mark.parametrize("name", TYPES)
def test_of_the_weights_of_a_model(name: str) -> None:
    rng = np.random.default_rng(8)
    x = (0.02 * rng.standard_t(4, size=(5, 4352))).astype(np.float32)
    x[:, 7] *= 50
    x[2, 300:800] = 0
    assert_same(name, x, importances(4352)["mean squares"])


@against_ggml
@pytest.mark.parametrize("blocks", [1, 2, 3, 15, 17, 33])
@pytest.mark.parametrize("name", TYPES)
def test_any_number_of_blocks(name: str, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    for rows, cols in ((1, 256 * blocks), (blocks, 256)):
        x = rng.normal(size=(rows, cols)).astype(np.float32)
        assert_same(name, x, rng.random(cols, np.float32), f"{rows} x {cols}")


@pytest.mark.parametrize("name", sorted(NEEDS_IMPORTANCE))
def test_importance_is_needed_where_ggml_needs_it(name: str) -> None:
    x = np.ones((1, 256), np.float32)
    with pytest.raises(UnsupportedEncodingError, match=f"{name} needs the importance of columns"):
        encode(name, x, None)
    assert encode(name, x, np.ones(256, np.float32)).shape == (1, GGML[name].block_bytes)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TAME])
@pytest.mark.parametrize("name", TYPES)
def test_what_ggml_aborts_on_is_encoded(name: str, kind: str) -> None:
    x = hard_weights(kind, "f32")
    for importance in (np.ones(256, np.float32), np.full(256, 3.4e38, np.float32)):
        assert encode(name, x, importance).shape == (len(x), GGML[name].block_bytes)


def test_importance_too_great_for_ggml_is_encoded() -> None:
    x = hard_weights("normal", "f32")
    for name in TYPES:
        made = encode(name, x, np.full(256, 3.4e38, np.float32))
        assert made.shape == (len(x), GGML[name].block_bytes)


@pytest.mark.parametrize("name", TYPES)
def test_lists_hold_the_points_nearby(name: str) -> None:
    """Of some words, by the definition: all points at the least distances, nearest first."""
    tables, bits = lattice(name), 3 if name.startswith("iq3") else 2
    shifts = bits * np.arange(4 if bits == 3 else 8)
    codes = tables.points.astype(np.int64)[:, None] >> shifts & (1 << bits) - 1
    distances = {"iq3_s": 3, "iq3_xxs": 2, "iq2_s": 1, "iq2_xs": 2, "iq2_xxs": 2}.get(name, 3)
    assert np.array_equal(tables.ids[tables.points], np.arange(len(codes)))
    for word in np.flatnonzero(tables.lists >= 0)[::97]:
        apart = ((codes - (word >> shifts & (1 << bits) - 1)) ** 2).sum(1)
        limit = np.unique(apart)[distances - 1]
        order = np.lexsort((np.arange(len(codes)), apart))
        expected = tables.points[order[: (apart <= limit).sum()]]
        first, runs = tables.lists[word] >> RUN_BITS, tables.lists[word] & (1 << RUN_BITS) - 1
        listed = tables.words[RUN * first : RUN * (first + runs)]
        assert np.array_equal(listed[: len(expected)], expected)
        assert (listed[len(expected) :] == expected[0]).all()
        assert len(listed) - len(expected) < RUN


@pytest.mark.parametrize("name", TYPES)
def test_fast_without_importance_counts_columns_alike(name: str) -> None:
    x = hard_weights("like a model", "f32")
    ones = np.ones(256, np.float32)
    made = OPS.encode(x, GGML[name], None, quality="fast")["weight"]
    assert np.array_equal(made, OPS.encode(x, GGML[name], ones, quality="fast")["weight"])


@pytest.mark.parametrize("name", TYPES)
def test_fast_has_no_greater_error_than_reference(name: str) -> None:
    rng = np.random.default_rng(2)
    x = (0.02 * rng.standard_t(4, size=(8, 512))).astype(np.float32)
    importance = rng.exponential(size=512).astype(np.float32)

    def error(quality: Quality) -> float:
        parts = OPS.encode(x, GGML[name], importance, quality=quality)
        return float((importance * (OPS.decode(parts, GGML[name]) - x) ** 2).sum())

    assert error("fast") <= error("reference")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["iq3_s", "iq3_xxs"])
def test_fast_search_of_hard_weights(name: str, kind: str) -> None:
    """It encodes all, rows on their own, and what it can hold with no more error than ggml."""
    x, rng = hard_weights(kind, "f32"), np.random.default_rng(4)
    importance = rng.exponential(size=256).astype(np.float32)
    made = OPS.encode(x, GGML[name], importance, quality="fast")
    alone = OPS.encode(x[2:3], GGML[name], importance, quality="fast")
    assert np.array_equal(alone["weight"], made["weight"][2:3])
    decoded = OPS.decode(made, GGML[name])
    assert np.isfinite(decoded).all()
    if kind in TAME:
        reference = OPS.decode(OPS.encode(x, GGML[name], importance), GGML[name])
        ours, theirs = ((importance * (d - x) ** 2.0).sum() for d in (decoded, reference))
        assert ours <= 1.02 * theirs
