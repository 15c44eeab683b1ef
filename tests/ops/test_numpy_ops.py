"""What the fallback accepts and refuses, whatever the encoding."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import njit
from oracles.hard_weights import DTYPES

from mlxedge.encodings import GGML, MLX_FLOAT, PLAIN, Affine, Encoding
from mlxedge.errors import UnsupportedEncodingError, UsageError
from mlxedge.fallback import OPS
from mlxedge.fallback.ggml_encode import NEEDS_IMPORTANCE
from mlxedge.fallback.jit import kernel
from mlxedge.ops import Parts, load_ops

WRITABLE: list[Encoding] = [
    *PLAIN.values(),
    *(e for e in GGML.values() if e.writable and e.name not in NEEDS_IMPORTANCE),
    Affine(3, 32, "f32"),
    Affine(4, 64, "bf16"),
    Affine(5, 128, "f16"),
    *MLX_FLOAT.values(),
]
READ_ONLY = [e for e in GGML.values() if not e.writable]


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(12, 512)).astype(np.float32)


def same(got: Parts, expected: Parts) -> None:
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert got[name].dtype == part.dtype
        assert got[name].tobytes() == part.tobytes(), name


def test_it_is_the_numpy_backend() -> None:
    assert load_ops("numpy") is OPS
    assert OPS.name == "numpy"


@pytest.mark.parametrize("encoding", WRITABLE, ids=str)
def test_parts_are_those_the_encoding_declares(encoding: Encoding, weights: np.ndarray) -> None:
    names = {**DTYPES, "u32": np.uint32, "u8": np.uint8}
    for rows in (12, 1, 0):
        parts = OPS.encode(weights[:rows], encoding)
        declared = encoding.parts((rows, 512))
        assert {n: (p.shape, p.dtype) for n, p in parts.items()} == {
            n: (p.shape, np.dtype(names[p.dtype])) for n, p in declared.items()
        }
        decoded = OPS.decode(parts, encoding)
        assert (decoded.shape, decoded.dtype) == ((rows, 512), np.float32)


@pytest.mark.parametrize("encoding", WRITABLE, ids=str)
def test_decoded_weights_are_near(encoding: Encoding, weights: np.ndarray) -> None:
    error = OPS.decode(OPS.encode(weights, encoding), encoding) - weights
    # A uniform quantizer of b bits errs by about 3 σ / 2^b; bits per weight include the scales.
    assert np.sqrt(np.mean(error**2)) < 4 * 2.0 ** -min(7.0, encoding.bits_per_weight - 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", WRITABLE, ids=str)
def test_strides_do_not_matter(encoding: Encoding, dtype: str, weights: np.ndarray) -> None:
    big = np.zeros((24, 1024), DTYPES[dtype])
    big[::2, ::2] = weights.astype(DTYPES[dtype])
    view = big[::2, ::2]
    same(OPS.encode(view, encoding), OPS.encode(view.copy(), encoding))
    fortran = np.asfortranarray(view)
    fortran.flags.writeable = False
    same(OPS.encode(fortran, encoding), OPS.encode(view.copy(), encoding))


@pytest.mark.parametrize("encoding", WRITABLE, ids=str)
def test_rows_are_independent_and_threads_may_share_them(
    encoding: Encoding, weights: np.ndarray
) -> None:
    whole = OPS.encode(weights, encoding)
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda i: OPS.encode(weights[i : i + 3], encoding), range(0, 12, 3)))
    same({n: np.concatenate([p[n] for p in pieces]) for n in whole}, whole)


@pytest.mark.parametrize("encoding", READ_ONLY, ids=str)
def test_encodings_without_encoder_say_which_have_one(
    encoding: Encoding, weights: np.ndarray
) -> None:
    with pytest.raises(UnsupportedEncodingError, match=rf"{encoding} can be read .* q4_k"):
        OPS.encode(weights, encoding)


@pytest.mark.parametrize("encoding", [e for e in WRITABLE if e.block > 1], ids=str)
def test_rows_that_do_not_fit(encoding: Encoding) -> None:
    with pytest.raises(UnsupportedEncodingError, match=f"multiple of {encoding.block}"):
        OPS.encode(np.zeros((2, encoding.block + 8), np.float32), encoding)


def test_other_weights_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(UsageError, match="float64"):
        OPS.encode(weights.astype(np.float64), GGML["q8_0"])
    with pytest.raises(UsageError, match=">f4"):
        OPS.encode(weights.astype(">f4"), GGML["q8_0"])
    with pytest.raises(UsageError, match=r"\[rows, cols\]"):
        OPS.encode(weights[0], GGML["q8_0"])


@pytest.mark.parametrize("encoding", [GGML["q4_0"], Affine(5, 32, "f16"), MLX_FLOAT["nvfp4"]])
def test_parts_that_do_not_fit(encoding: Encoding, weights: np.ndarray) -> None:
    parts = OPS.encode(weights, encoding)
    with pytest.raises(UsageError, match="'weight' is missing"):
        OPS.decode({}, encoding)
    for name, part in parts.items():
        fewer_rows = [part[1:]] if len(parts) > 1 else []
        for wrong in (part[:, 1:], part.view(np.int8), part[:, :, None], *fewer_rows):
            with pytest.raises(UsageError, match="the part"):
                OPS.decode({**parts, name: wrong}, encoding)


def test_import_is_light() -> None:
    code = (
        "import sys, mlxedge.fallback\n"
        "heavy = {'numpy', 'numba', 'ml_dtypes', 'gguf', 'mlx'} & sys.modules.keys()\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kernels_compile_where_nothing_can_be_cached() -> None:
    namespace: dict[str, object] = {}
    exec("def twice(x):\n    return 2 * x", namespace)
    with pytest.raises(RuntimeError, match="cannot cache"):
        njit(cache=True)(namespace["twice"])
    assert kernel(namespace["twice"])(21) == 42
