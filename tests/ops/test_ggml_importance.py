"""With an importance matrix, too, the fallback's ggml encoders write ggml's bytes."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from golden import make_ggml_blocks as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import ggml
from oracles.hard_weights import KINDS, hard_weights

from mlxedge.encodings import GGML, MLX_FLOAT, PLAIN, Affine
from mlxedge.errors import UsageError
from mlxedge.fallback import OPS
from mlxedge.fallback.ggml_encode import ENCODERS

#: The lattice formats have tests of their own: there ggml aborts on some of what follows.
TYPES = sorted(name for name in ENCODERS if not name.startswith(("iq1_", "iq2_", "iq3_")))
WEIGHED = sorted(golden.WEIGHED)

against_ggml = pytest.mark.skipif(
    not ggml.EXACT, reason="ggml's build for this machine may contract; golden bytes are held"
)


def encode(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    out = np.full((x.shape[0], GGML[name].nbytes((x.shape[1],))), 0xA5, np.uint8)
    ENCODERS[name](np.ascontiguousarray(x, np.float32), out, importance)
    return out


def assert_same(name: str, x: np.ndarray, importance: np.ndarray | None, what: str = "") -> None:
    expected = ggml.quantize(name, x, importance=importance)
    wrong = np.flatnonzero((expected != encode(name, x, importance)).ravel())
    block, byte = divmod(int(wrong[0]), GGML[name].block_bytes) if wrong.size else (0, 0)
    assert not wrong.size, f"{name}, {what}: {wrong.size} bytes differ: block {block}, byte {byte}"


def _importances(cols: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(cols)
    random = rng.random(cols)
    made = {
        "ones": np.ones(cols),
        "random": random,
        "mean squares": rng.normal(size=cols) ** 2 * 10.0 ** rng.uniform(-4, 4, cols),
        "zeros in places": random * (rng.random(cols) < 0.5),
        "whole blocks of zeros": random * np.repeat(rng.random(cols // 32) < 0.5, 32),
        "one column": (np.arange(cols) == 5) * 1.0,
        "all zeros": np.zeros(cols),
        "negative zeros": -np.zeros(cols),
        "huge": 1e37 * random,
        "greatest": np.full(cols, 3.4e38),
        "tiny": 1e-40 * random,
        "every magnitude": 10.0 ** rng.uniform(-44, 38, cols),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


IMPORTANCES = list(_importances(256))


@against_ggml
@pytest.mark.parametrize("what", IMPORTANCES)
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_ggml(name: str, what: str) -> None:
    for kind in KINDS:
        for shape in ((6, 256), (2, 768)):
            x = hard_weights(kind, "f32").reshape(shape)
            assert_same(name, x, _importances(shape[1])[what], f"{kind}, {what}")


@against_ggml
@pytest.mark.parametrize("name", TYPES)
def test_of_the_weights_of_a_model(name: str) -> None:
    rng = np.random.default_rng(8)
    x = (0.02 * rng.standard_t(4, size=(19, 4352))).astype(np.float32)
    x[:, 7] *= 50
    for what, importance in _importances(4352).items():
        assert_same(name, x, importance, what)


@against_ggml
@pytest.mark.parametrize("blocks", [1, 2, 3, 15, 17, 33])
@pytest.mark.parametrize("name", TYPES)
def test_any_number_of_blocks(name: str, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    block = GGML[name].block
    for rows, cols in ((1, blocks * block), (blocks, block), (3, blocks * block)):
        x = rng.normal(size=(rows, cols)).astype(np.float32)
        assert_same(name, x, rng.random(cols, np.float32), f"{rows} x {cols}")


#: Where an outlier counts nothing, the fit of the others may send it beyond the integers that
#: ggml rounds to (its ``nearest_int`` asserts 4194303). There the wheel's build differs from the
#: source compiled by GCC, which the fallback follows: so not weights of every magnitude.
_WEIGHTS = st.integers(-2048, 2048).map(lambda i: i / 256.0)
#: Any finite, by their bits; those of 0 and 1 more often.
_IMPORTANCE_BITS = st.one_of(st.integers(0, 0x7F7FFFFF), st.sampled_from([0, 0x3F800000]))


@against_ggml
@pytest.mark.parametrize("name", WEIGHED)
@settings(max_examples=40, deadline=None)
@given(
    x=arrays(np.float32, 96, elements=_WEIGHTS),
    importance=arrays(np.uint32, 40, elements=_IMPORTANCE_BITS),
)
def test_generated_blocks(name: str, x: np.ndarray, importance: np.ndarray) -> None:
    assert_same(name, np.resize(x, (1, 256)), np.resize(importance.view(np.float32), 256))


@against_ggml
def test_mxfp4_of_numbers_just_below_powers_of_two() -> None:
    """Their logarithms round to whole numbers, sooner the larger the exponent."""
    ends = np.arange(0, 256, dtype=np.int64)[:, None] << 23
    bits = np.clip(ends + np.arange(-60, 8), 0, 0x7F7FFFFF).ravel().astype(np.uint32)
    subnormal = np.clip((1 << np.arange(23))[:, None] + np.arange(-3, 4), 0, None).ravel()
    largest = np.concatenate([bits, subnormal.astype(np.uint32)]).view(np.float32)
    x = largest[:, None] * np.linspace(-1, 1, 32, dtype=np.float32)
    assert_same("mxfp4", x.astype(np.float32), None)


@against_ggml
@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs", "mxfp4"])
def test_numbers_half_way_between_levels(name: str) -> None:
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    steps = sorted({*levels, 0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12})
    middles = [(a + b) / 2 for a in steps for b in steps]
    x = np.resize(np.array(middles, np.float32), (8, 512))
    for extreme in (-127.0, 113.0, 12.0, -8.0):
        edge = np.where(np.abs(x) < abs(extreme), x, np.float32(extreme))
        edge[:, ::32] = extreme
        for nearby in (edge, np.nextafter(edge, 200), np.nextafter(edge, -200)):
            nearby[:, ::32] = extreme
            assert_same(name, nearby.astype(np.float32), None)


@pytest.mark.parametrize("name", WEIGHED)
def test_golden_bytes(name: str) -> None:
    expected = json.loads(golden.IMPORTANCE_PATH.read_text())[name]
    got = encode(name, golden.weights(), golden.importance())
    assert got.tobytes().hex() == expected
    assert not np.array_equal(got, encode(name, golden.weights(), None))


@against_ggml
def test_golden_bytes_are_ggmls() -> None:
    for name, expected in json.loads(golden.IMPORTANCE_PATH.read_text()).items():
        made = ggml.quantize(name, golden.weights(), importance=golden.importance())
        assert made.tobytes().hex() == expected, name


@pytest.mark.parametrize("name", TYPES)
def test_encodings_declare_whether_they_weigh(name: str) -> None:
    assert GGML[name].weighs == (name in WEIGHED)


@pytest.mark.parametrize(
    "encoding",
    [*PLAIN.values(), Affine(4, 64, "bf16"), *MLX_FLOAT.values()]
    + [GGML[name] for name in TYPES if name not in WEIGHED],
    ids=str,
)
def test_others_ignore_it(encoding: Affine) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 512)).astype(np.float32)
    plain, weighed = OPS.encode(x, encoding), OPS.encode(x, encoding, rng.random(512, np.float32))
    assert all(np.array_equal(plain[part], weighed[part]) for part in plain)


@pytest.mark.parametrize("name", WEIGHED)
def test_error_where_it_matters_falls(name: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(64, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 8 == 0, 100, 0.1).astype(np.float32)

    def error(heeded: np.ndarray | None) -> float:
        difference = OPS.decode(OPS.encode(x, GGML[name], heeded), GGML[name]) - x
        return float(np.mean(importance * difference**2))

    assert error(importance) < 0.98 * error(None)


@pytest.mark.parametrize("name", WEIGHED)
def test_rows_are_independent(name: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(7, 768)).astype(np.float32)
    importance = rng.random(768, np.float32)
    whole = encode(name, x, importance)
    parts = [encode(name, x[part], importance) for part in (slice(1), slice(1, 4), slice(4, 7))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert encode(name, x[:0], importance).shape == (0, whole.shape[1])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["q4_0", "q4_k", "iq4_xs"])
def test_sources_of_16_bits_in_pieces(name: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    kind = np.float16 if dtype == "f16" else ml_dtypes.bfloat16
    x = rng.normal(size=(150, 2048)).astype(kind)
    importance = rng.random(2048, np.float32)
    got = OPS.encode(x, GGML[name], importance)["weight"]
    assert np.array_equal(got, encode(name, x.astype(np.float32), importance))


@pytest.mark.parametrize("name", TYPES)
def test_infinities_and_nan_do_no_harm(name: str) -> None:
    bits = np.random.default_rng(6).integers(0, 2**32, (8, 512), np.uint32)
    bits[:, ::7] |= 0x7F800000
    guarded = np.full((10, GGML[name].nbytes((512,))), 0xA5, np.uint8)
    ENCODERS[name](bits.view(np.float32), guarded[1:9], np.ones(512, np.float32))
    assert (guarded[0] == 0xA5).all()
    assert (guarded[9] == 0xA5).all()


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (np.ones(255, np.float32), "each of the 256 columns"),
        (np.ones((1, 256), np.float32), "each of the 256 columns"),
        (np.ones(256, np.float64), "float64"),
        (np.full(256, -1, np.float32), "not negative"),
        (np.full(256, np.nan, np.float32), "finite"),
        (np.full(256, np.inf, np.float32), "finite"),
    ],
)
@pytest.mark.parametrize("encoding", [GGML["q4_k"], GGML["q8_0"], Affine(4, 64, "f16")], ids=str)
def test_importance_that_makes_no_sense(
    encoding: Affine, importance: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        OPS.encode(np.zeros((2, 256), np.float32), encoding, importance)
