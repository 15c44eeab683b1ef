"""The fallback's ggml encoders write ggml's bytes: all of them, on hard input."""

from __future__ import annotations

import json
import threading

import ml_dtypes
import numpy as np
import pytest
from golden import make_ggml_blocks as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import ggml

from mlxedge.encodings import GGML
from mlxedge.errors import UsageError
from mlxedge.fallback.ggml_encode import ENCODERS

#: The lattice formats have tests of their own: there ggml aborts on some of what follows.
TYPES = sorted(name for name in ENCODERS if not name.startswith(("iq1_", "iq2_", "iq3_")))
HUGE = 3e38

against_ggml = pytest.mark.skipif(
    not ggml.EXACT, reason="ggml's build for this machine may contract; golden bytes are held"
)


def encode(name: str, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    out = np.full((x.shape[0], GGML[name].nbytes((x.shape[1],))), 0xA5, np.uint8)
    ENCODERS[name](x, out)
    return out


def assert_same(name: str, x: np.ndarray) -> None:
    expected, got = ggml.quantize(name, x), encode(name, x)
    width = GGML[name].block_bytes
    wrong = np.flatnonzero(expected.ravel() != got.ravel())
    assert not wrong.size, (
        f"{name}: {wrong.size} of {got.size} bytes differ, first in block {wrong[0] // width} at "
        f"byte {wrong[0] % width}"
    )


def _blocks(kind: str, rng: np.random.Generator, n: int = 64 * 256) -> np.ndarray:
    normal = rng.normal(size=n)
    signs = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    return {
        "normal": lambda: normal,
        "weights of a model": lambda: 0.02 * normal,
        "laplace": lambda: rng.laplace(size=n),
        "student t": lambda: rng.standard_t(3, size=n),
        "uniform": lambda: rng.uniform(-1, 1, n),
        "positive": lambda: np.abs(normal),
        "negative": lambda: -np.abs(normal),
        "integers": lambda: rng.integers(-3, 4, n),
        "sparse": lambda: normal * (rng.random(n) < 0.05),
        "zeros of both signs": lambda: 0.0 * signs,
        "zeros and positive": lambda: np.where(rng.random(n) < 0.5, 0.0 * signs, np.abs(normal)),
        "zeros and negative": lambda: np.where(rng.random(n) < 0.5, 0.0 * signs, -np.abs(normal)),
        "constant per block": lambda: np.repeat(rng.normal(size=n // 256), 256),
        "alternating": lambda: np.resize([1.5, -1.5], n),
        "ties of magnitude": lambda: signs * rng.integers(1, 3, n),
        "one outlier a block": lambda: np.where(np.arange(n) % 256 == 77, -1e4, normal),
        "offset": lambda: 1 + 1e-6 * normal,
        "large offset": lambda: -1e3 + 1e-2 * normal,
        "near the least magnitude": lambda: 2e-15 * rng.uniform(-1, 1, n),
        "small": lambda: 1e-20 * normal,
        "f16 scales subnormal": lambda: 1e-5 * normal,
        "f16 scales zero": lambda: 1e-8 * normal,
        "subnormal": lambda: 1e-41 * normal,
        "around subnormal": lambda: 1e-37 * normal,
        "inverse overflows": lambda: 2.0**-124 * rng.uniform(-1, 1, n),
        "f16 scales overflow": lambda: 1e6 * normal,
        "huge": lambda: 1e30 * normal,
        "greatest": lambda: HUGE * signs,
        "sums overflow": lambda: np.clip(1e38 * normal, -HUGE, HUGE),
        "every magnitude": lambda: normal * 10.0 ** rng.uniform(-44, 37, n),
        "every magnitude by block": lambda: (
            normal * np.repeat(10.0 ** rng.uniform(-44, 37, n // 32), 32)
        ),
        "f16": lambda: normal.astype(np.float16),
        "bf16": lambda: normal.astype(ml_dtypes.bfloat16),
    }[kind]().astype(np.float32)


KINDS = [
    *("normal", "weights of a model", "laplace", "student t", "uniform", "positive", "negative"),
    *("integers", "sparse", "zeros of both signs", "zeros and positive", "zeros and negative"),
    *("constant per block", "alternating", "ties of magnitude", "one outlier a block", "offset"),
    *("large offset", "near the least magnitude", "small", "f16 scales subnormal"),
    *("f16 scales zero", "subnormal", "around subnormal", "inverse overflows"),
    *("f16 scales overflow", "huge", "greatest", "sums overflow", "every magnitude"),
    *("every magnitude by block", "f16", "bf16"),
]


@against_ggml
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_ggml(name: str, kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    assert_same(name, _blocks(kind, rng).reshape(4, -1))


@against_ggml
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, 1e-40, -1e-40, 1e-16, HUGE, -HUGE])
@pytest.mark.parametrize("name", TYPES)
def test_a_constant(name: str, value: float) -> None:
    assert_same(name, np.full((1, 512), value, np.float32))


@against_ggml
@pytest.mark.parametrize("blocks", [1, 3, 17, 33])
@pytest.mark.parametrize("name", TYPES)
def test_any_number_of_blocks(name: str, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    block = GGML[name].block
    assert_same(name, rng.normal(size=(1, blocks * block)))
    assert_same(name, rng.normal(size=(blocks, block)))
    assert_same(name, rng.normal(size=(3, blocks * block)))


_FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.integers(-8, 8).map(float),
)


@against_ggml
@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=40, deadline=None)
@given(x=arrays(np.float32, (1, 256), elements=_FLOATS))
def test_generated_blocks(name: str, x: np.ndarray) -> None:
    assert_same(name, x)


@pytest.mark.parametrize("name", TYPES)
def test_golden_bytes(name: str) -> None:
    expected = json.loads(golden.PATH.read_text())[name]
    assert encode(name, golden.weights()).tobytes().hex() == expected


@against_ggml
def test_golden_bytes_are_ggmls() -> None:
    for name, expected in json.loads(golden.PATH.read_text()).items():
        assert ggml.quantize(name, golden.weights()).tobytes().hex() == expected, name


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_independent(name: str) -> None:
    x = np.random.default_rng(3).normal(size=(7, 768)).astype(np.float32)
    whole = encode(name, x)
    parts = [encode(name, x[:1]), encode(name, x[1:4]), encode(name, x[4:])]
    assert np.array_equal(whole, np.concatenate(parts))


def test_threads_may_share_a_matrix() -> None:
    x = np.random.default_rng(4).normal(size=(64, 1024)).astype(np.float32)
    out = np.zeros((64, GGML["q4_k"].nbytes((1024,))), np.uint8)
    threads = [
        threading.Thread(target=ENCODERS["q4_k"], args=(x[i : i + 16], out[i : i + 16]))
        for i in range(0, 64, 16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(out, encode("q4_k", x))


def test_source_stays_as_it_was() -> None:
    x = np.random.default_rng(5).normal(size=(2, 256)).astype(np.float32)
    before = x.copy()
    encode("q6_k", x)
    assert np.array_equal(x, before)
    assert x.flags.writeable
    x.flags.writeable = False
    assert np.array_equal(encode("q6_k", x), encode("q6_k", before))


@pytest.mark.parametrize("name", TYPES)
def test_infinities_and_nan_do_no_harm(name: str) -> None:
    bits = np.random.default_rng(6).integers(0, 2**32, (8, 512), np.uint32)
    bits[:, ::7] |= 0x7F800000
    x = bits.view(np.float32)
    width = GGML[name].nbytes((512,))
    guarded = np.full((10, width), 0xA5, np.uint8)
    ENCODERS[name](x, guarded[1:9])
    assert (guarded[0] == 0xA5).all()
    assert (guarded[9] == 0xA5).all()


def test_no_rows() -> None:
    assert encode("q4_k", np.zeros((0, 256))).shape == (0, 144)


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (np.zeros((2, 256), np.float32), np.zeros((2, 143), np.uint8)),
        (np.zeros((2, 256), np.float32), np.zeros((1, 144), np.uint8)),
        (np.zeros((2, 128), np.float32), np.zeros((2, 72), np.uint8)),
        (np.zeros((2, 256), np.float64), np.zeros((2, 144), np.uint8)),
        (np.zeros((2, 256), np.float32), np.zeros((2, 144), np.int8)),
        (np.zeros((256, 256), np.float32).T, np.zeros((256, 144), np.uint8)),
        (np.zeros((2, 256), np.float32), np.zeros((2, 288), np.uint8)[:, ::2]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(x: np.ndarray, out: np.ndarray) -> None:
    with pytest.raises(UsageError, match="q4_k"):
        ENCODERS["q4_k"](x, out)


def test_every_writable_type_has_an_encoder() -> None:
    assert set(ENCODERS) == {name for name, encoding in GGML.items() if encoding.writable}
