"""The search for one stored scale a block: least weighted error, the same bytes on MLX."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import ggml
from oracles.hard_weights import KINDS, hard_weights

from mlxedge.accel import fast_levels as on_mlx
from mlxedge.encodings import GGML, MLX_FLOAT, Encoding
from mlxedge.fallback import OPS, fast_levels
from mlxedge.ops import Parts

HALVES = ("q4_0", "q5_0", "q8_0", "iq4_nl", "tq1_0", "tq2_0")
GGML_NAMES = (*HALVES, "mxfp4")
ENCODINGS: dict[str, Encoding] = {
    **{name: GGML[name] for name in GGML_NAMES},
    **{e.name: e for e in MLX_FLOAT.values()},
}
ON_MLX = [name for name in ENCODINGS if not name.startswith("tq")]
COLS = 768

#: What codes stand for, in units of the scale.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
LEVELS = {
    "q4_0": np.arange(-8.0, 8.0),
    "q5_0": np.arange(-16.0, 16.0),
    "q8_0": np.arange(-127.0, 128.0),
    "iq4_nl": np.array(
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float64
    ),
    "tq1_0": np.arange(-1.0, 2.0),
    "tq2_0": np.arange(-1.0, 2.0),
    "mxfp4": np.concatenate([-_E2M1, _E2M1]),
    "mlx-mxfp4": np.concatenate([-_E2M1, _E2M1]),
    "mlx-nvfp4": np.concatenate([-_E2M1, _E2M1]),
    "mlx-mxfp8": _E4M3[np.isfinite(_E4M3)],
}
#: Where the scale lies in a ggml block.
_SCALE_AT = {"tq1_0": 52, "tq2_0": 64}


def importances(kind: str, cols: int) -> np.ndarray | None:
    rng = np.random.default_rng(5)
    made = {
        "none": lambda: None,
        "spread": lambda: np.exp(rng.normal(size=cols)),
        "half zero": lambda: np.where(rng.random(cols) < 0.5, 0.0, rng.random(cols)),
        "zero": lambda: np.zeros(cols),
        "zero blocks": lambda: np.where(np.arange(cols) // 256 % 2, 0.0, rng.random(cols)),
        "any size": lambda: 10.0 ** rng.uniform(-30, 30, cols),
    }[kind]()
    return None if made is None else np.asarray(made, np.float32)


IMPORTANCES = ("none", "spread", "half zero", "zero", "zero blocks", "any size")


def scales_of(parts: Parts, encoding: Encoding) -> np.ndarray:
    """The stored scales, float64 ``[rows, blocks]``."""
    weight = parts["weight"]
    if "scales" in parts:
        kind = ml_dtypes.float8_e4m3fn if "nv" in encoding.name else ml_dtypes.float8_e8m0fnu
        return parts["scales"].view(kind).astype(np.float64)
    blocks = weight.reshape(len(weight), -1, encoding.nbytes((encoding.block,)))
    if encoding.name == "mxfp4":
        return np.ldexp(1.0, blocks[..., 0].astype(int) - 127)
    at = _SCALE_AT.get(encoding.name, 0)
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(float)


def block_errors(
    parts: Parts, encoding: Encoding, weights: np.ndarray, importance: np.ndarray | None
) -> np.ndarray:
    """Σ w · (x - decoded)², float64 ``[rows, blocks]``."""
    off = OPS.decode(parts, encoding).astype(np.float64) - weights
    counts = np.ones(weights.shape[1]) if importance is None else importance.astype(np.float64)
    by_block = counts.reshape(-1, encoding.block)
    by_block = np.where(by_block.max(axis=1, keepdims=True) > 0, by_block, 1.0)
    return (off**2 * by_block.reshape(-1)).reshape(len(weights), -1, encoding.block).sum(axis=2)


def ordinary(seed: int = 0, rows: int = 37, cols: int = COLS) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size=(rows, cols)).astype(np.float32) * 0.02


@pytest.mark.parametrize("importance", ["none", "spread", "half zero", "zero blocks"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_no_block_is_worse_than_the_runtimes_rule_makes_it(name: str, importance: str) -> None:
    """The rule without importance: it is one of the trials, but for IQ4_NL's, itself a search."""
    encoding, counts = ENCODINGS[name], importances(importance, COLS)
    hard = np.vstack([hard_weights(kind, "f32").reshape(-1, COLS) for kind in KINDS])
    for weights in (ordinary(), hard):
        parts = OPS.encode(weights, encoding, counts, quality="fast")
        found = block_errors(parts, encoding, weights, counts)
        assert np.isfinite(found).all()
        with np.errstate(invalid="ignore"):
            expected = block_errors(OPS.encode(weights, encoding), encoding, weights, counts)
        if name == "iq4_nl":
            assert found[:37].sum() < expected[:37].sum()
            continue
        worse = found > expected * (1 + 1e-5) + 1e-80
        if name.startswith("mlx-mx"):
            # Where MLX's scale lets the largest level be infinite, ours clips.
            largest = np.abs(weights).reshape(len(weights), -1, encoding.block).max(axis=2)
            worse &= largest < 2.0**127
        assert not worse.any(), (found[worse], expected[worse])


@pytest.mark.parametrize(
    ("name", "least", "weighted"),
    [
        ("q4_0", 0.07, 0.03),
        ("q5_0", 0.07, 0.03),
        ("q8_0", 0.18, 0.3),
        ("iq4_nl", 0.05, 0.03),
        ("mxfp4", 0.05, 0.08),
        ("tq2_0", 0.4, 0.4),
        ("mlx-mxfp4", 0.03, 0.03),
        ("mlx-mxfp8", -1e-6, -1e-6),
        ("mlx-nvfp4", 0.15, 0.2),
    ],
)
def test_error_falls_below_the_rule_with_the_same_importance(
    name: str, least: float, weighted: float
) -> None:
    encoding, weights = ENCODINGS[name], ordinary(1, 64)
    for kind, expected in (("none", least), ("spread", weighted)):
        counts = importances(kind, COLS)
        rule = block_errors(OPS.encode(weights, encoding, counts), encoding, weights, counts)
        fast = OPS.encode(weights, encoding, counts, quality="fast")
        found = block_errors(fast, encoding, weights, counts)
        assert 1 - found.sum() / rule.sum() > expected, kind


@pytest.mark.parametrize("importance", ["none", "half zero"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_codes_are_the_best_for_the_stored_scale(name: str, importance: str) -> None:
    """Each weight has the nearest level, weights of columns without importance too."""
    encoding = ENCODINGS[name]
    weights = np.vstack([ordinary(2), hard_weights("normal", "f32").reshape(-1, COLS)])
    parts = OPS.encode(weights, encoding, importances(importance, COLS), quality="fast")
    scales = np.repeat(scales_of(parts, encoding), encoding.block, axis=1)
    decoded = OPS.decode(parts, encoding).astype(np.float64)
    off = np.abs(decoded - weights)
    nearest = np.min(
        np.abs(LEVELS[name] * scales[..., None] - weights[..., None].astype(np.float64)), axis=-1
    )
    assert (off <= nearest + 4e-7 * np.abs(scales) * np.abs(LEVELS[name]).max()).all()


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_neighbour_of_the_stored_scale_is_better(name: str) -> None:
    """By brute force over the scales next to it, in the precision it is stored in."""
    encoding, weights = ENCODINGS[name], ordinary(3, 16)
    # Powers of two that cut much off are not tried, whatever the importance.
    counts = importances("spread", COLS) if "mx" not in name else np.ones(COLS, np.float32)
    assert counts is not None
    parts = OPS.encode(weights, encoding, counts, quality="fast")
    scales = scales_of(parts, encoding)
    blocks = weights.astype(np.float64).reshape(16, -1, encoding.block)
    by_block = counts.astype(np.float64).reshape(-1, encoding.block)

    def errors(scale: np.ndarray) -> np.ndarray:
        values = LEVELS[name] * scale[..., None]
        off = np.min(np.abs(blocks[..., None] - values[..., None, :]), axis=-1)
        return (off**2 * by_block).sum(axis=-1)

    found = errors(scales)
    if name in HALVES:
        bits = scales.astype(np.float16).view(np.int16)
        near = [(bits + step).astype(np.int16).view(np.float16).astype(float) for step in (-1, 1)]
    elif "nv" in name:
        bytes_ = scales.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        steps = [np.clip(bytes_.astype(int) + step, 0, 126).astype(np.uint8) for step in (-1, 1)]
        near = [step.view(ml_dtypes.float8_e4m3fn).astype(float) for step in steps]
    else:
        near = [scales / 2, scales * 2]
    # A last step in float16 may lead to another, hardly any better.
    slack = 0.05 if name in HALVES else 1e-5
    for other in near:
        assert (found <= errors(other) * (1 + slack)).all()


@pytest.mark.parametrize("name", ENCODINGS)
def test_exact_blocks_are_found_exactly(name: str) -> None:
    encoding = ENCODINGS[name]
    rng = np.random.default_rng(4)
    levels = rng.choice(LEVELS[name], (40, COLS))
    edge = {"iq4_nl": -127.0, "mlx-mxfp8": 448.0}.get(name, LEVELS[name][0])
    levels[:, :: encoding.block] = edge
    shape = (40, COLS // encoding.block)
    if name in HALVES:
        scales = np.float16(rng.normal(size=shape)).astype(np.float64)
    elif "nv" in name:
        scales = rng.uniform(0.1, 9.0, shape).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        scales = 2.0 ** rng.integers(-9, 9, shape)
    weights = (levels * np.repeat(scales, encoding.block, axis=1)).astype(np.float32)
    for kind in ("none", "spread", "half zero"):
        parts = OPS.encode(weights, encoding, importances(kind, COLS), quality="fast")
        counted = importances(kind, COLS)
        decoded = OPS.decode(parts, encoding)
        held = np.ones(COLS, bool) if counted is None else counted > 0
        if kind == "half zero":
            # Blocks whose extreme level does not count may be found with another scale.
            held &= np.repeat(counted[:: encoding.block] > 0, encoding.block)
        np.testing.assert_array_equal(decoded[:, held], weights[:, held])


@pytest.mark.parametrize("name", ENCODINGS)
def test_columns_without_importance_do_not_count(name: str) -> None:
    encoding, weights = ENCODINGS[name], ordinary(6)
    counts = importances("half zero", COLS)
    assert counts is not None
    plain = OPS.encode(weights, encoding, counts, quality="fast")
    wild = weights.copy()
    wild[:, counts == 0] *= 1e3
    changed = OPS.encode(wild, encoding, counts, quality="fast")
    before = block_errors(plain, encoding, weights, counts)
    after = block_errors(changed, encoding, wild, counts)
    # Only the scale by the runtime's rule, which sees all columns, may make a difference.
    assert after.sum() < 1.002 * before.sum()


@pytest.mark.parametrize("name", ENCODINGS)
def test_importance_alike_is_no_importance(name: str) -> None:
    encoding, weights = ENCODINGS[name], ordinary(7)
    expected = OPS.encode(weights, encoding, None, quality="fast")
    for counts in (np.zeros(COLS, np.float32), np.full(COLS, 2.0**-40, np.float32)):
        got = OPS.encode(weights, encoding, counts, quality="fast")
        for part in expected:
            np.testing.assert_array_equal(got[part], expected[part])


@pytest.mark.parametrize("name", ENCODINGS)
def test_rows_are_independent(name: str) -> None:
    encoding, weights = ENCODINGS[name], ordinary(8, 40)
    counts = importances("spread", COLS)
    whole = OPS.encode(weights, encoding, counts, quality="fast")
    for rows in (slice(0, 1), slice(3, 20), slice(17, 40), slice(5, 5)):
        piece = OPS.encode(weights[rows], encoding, counts, quality="fast")
        for part in whole:
            np.testing.assert_array_equal(piece[part], whole[part][rows])


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("power", [-30, 7])
def test_a_power_of_two_changes_nothing_but_the_scale(name: str, power: int) -> None:
    """As long as the format can hold the scale."""
    if power < 0 and (name in HALVES or "nv" in name):
        power = -2
    encoding, weights = ENCODINGS[name], ordinary(9, 8) * np.float32(64.0)
    plain = OPS.decode(OPS.encode(weights, encoding, quality="fast"), encoding)
    scaled = OPS.encode(np.ldexp(weights, power), encoding, quality="fast")
    if name in HALVES or "mx" in name:
        np.testing.assert_array_equal(OPS.decode(scaled, encoding), np.ldexp(plain, power))


@pytest.mark.parametrize("name", GGML_NAMES)
def test_ggml_decodes_the_same_weights(name: str) -> None:
    encoding = GGML[name]
    for weights in (ordinary(10, 5), hard_weights("huge and tiny", "f32")):
        parts = OPS.encode(weights, encoding, quality="fast")
        expected = ggml.dequantize(name, parts["weight"].reshape(-1), weights.size)
        np.testing.assert_array_equal(OPS.decode(parts, encoding).reshape(-1), expected)
        assert np.isfinite(expected).all()


def test_q8_0_stays_within_127() -> None:
    weights = np.vstack([hard_weights(kind, "f32") for kind in KINDS])
    blocks = OPS.encode(weights, GGML["q8_0"], quality="fast")["weight"].reshape(-1, 34)
    assert blocks[:, 2:].view(np.int8).min() == -127


@pytest.mark.parametrize("name", ENCODINGS)
def test_infinities_and_nan_do_no_harm(name: str) -> None:
    weights = ordinary(11, 20)
    weights[::2, ::7] = np.inf
    weights[::3, ::5] = np.nan
    weights[::5, ::3] = -np.inf
    sound = np.isfinite(weights).all(axis=1)
    encoding = ENCODINGS[name]
    parts = OPS.encode(weights, encoding, quality="fast")
    expected = OPS.encode(weights[sound], encoding, quality="fast")
    for part in expected:
        np.testing.assert_array_equal(parts[part][sound], expected[part])


def assert_same_on_mlx(
    name: str, weights: np.ndarray, counts: np.ndarray | None, compiled: bool = False
) -> None:
    encoding = ENCODINGS[name]
    expected = fast_levels.search(weights, encoding, counts)
    got = on_mlx.search(weights, encoding, counts, compiled=compiled)
    assert got.keys() == expected.keys()
    for part, array in expected.items():
        assert (got[part].dtype, got[part].shape) == (array.dtype, array.shape)
        wrong = np.flatnonzero((got[part] != array).any(axis=1))
        assert not wrong.size, f"{part} differs in rows {wrong}"


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", ON_MLX)
def test_mlx_gives_the_same_bytes(name: str, importance: str) -> None:
    weights = np.vstack([hard_weights(kind, "f32").reshape(-1, COLS) for kind in KINDS])
    assert_same_on_mlx(name, np.vstack([weights, ordinary(12, 9)]), importances(importance, COLS))


@pytest.mark.parametrize("name", ON_MLX)
def test_mlx_gives_the_same_bytes_when_compiled(name: str) -> None:
    weights = np.vstack([hard_weights(kind, "f32")[:1] for kind in KINDS])
    assert_same_on_mlx(name, weights, importances("spread", 256), compiled=True)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
positive = st.floats(0, 2.0**100, width=32)


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (2, 64), elements=st.one_of(finite, st.floats(-2, 2, width=32))),
    st.one_of(st.none(), arrays(np.float32, 64, elements=positive)),
    st.sampled_from(ON_MLX),
)
def test_mlx_gives_the_same_bytes_for_any_weights(
    weights: np.ndarray, counts: np.ndarray | None, name: str
) -> None:
    assert_same_on_mlx(name, weights, counts)


@pytest.mark.parametrize("name", ON_MLX)
def test_mlx_pieces_join_without_a_seam(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_mlx, "WEIGHTS_AT_ONCE", 2 * COLS)
    assert_same_on_mlx(name, ordinary(13, 5), importances("spread", COLS))


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_rows_at_all(name: str) -> None:
    encoding, none = ENCODINGS[name], np.zeros((0, 256), np.float32)
    shapes = {part: p.shape for part, p in encoding.parts((0, 256)).items()}
    for search in (fast_levels.search, on_mlx.search):
        if search is on_mlx.search and name not in ON_MLX:
            continue
        assert {p: a.shape for p, a in search(none, encoding, None).items()} == shapes
