"""Matrices on which quantizers disagree, for tests that compare bytes."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

#: NumPy dtypes of weights, by the names that encodings use.
DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

ROWS, COLS = 6, 256
_N = ROWS * COLS


def _signs(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(_N) < 0.5, -1.0, 1.0)


def _odd_last_group(rng: np.random.Generator) -> np.ndarray:
    weights = rng.normal(size=(ROWS, COLS))
    weights[:, -16:] *= -1e4
    return weights


#: Each gives float64 numbers that :func:`hard_weights` rounds to a dtype.
_MAKERS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(size=_N),
    "like a model": lambda rng: 0.02 * rng.standard_t(4, size=_N),
    "zeros": lambda rng: np.zeros(_N),
    "negative zeros": lambda rng: -np.zeros(_N),
    "zeros of both signs": lambda rng: 0.0 * _signs(rng),
    "constant": lambda rng: np.full(_N, 0.7),
    "negative constant": lambda rng: np.full(_N, -0.7),
    "positive": lambda rng: np.abs(rng.normal(size=_N)),
    "negative": lambda rng: -np.abs(rng.normal(size=_N)),
    "negative, far from zero": lambda rng: -5.0 - 0.01 * rng.random(_N),
    "symmetric": lambda rng: np.repeat(rng.normal(size=_N // 2), 2) * np.tile([1.0, -1.0], _N // 2),
    "one weight per row": lambda rng: (np.arange(_N) % COLS == 77) * rng.normal(size=_N),
    "halves": lambda rng: rng.integers(-30, 31, _N) / 2.0,
    "eighths": lambda rng: rng.integers(-48, 49, _N) / 8.0,
    "powers of two": lambda rng: _signs(rng) * 2.0 ** rng.integers(-14, 15, _N),
    "last group odd": _odd_last_group,
    "about the smallest scale": lambda rng: rng.normal(size=_N) * 1e-6,
    "below the smallest scale": lambda rng: rng.normal(size=_N) * 3e-8,
    "subnormal": lambda rng: rng.normal(size=_N) * 1e-39,
    "large": lambda rng: rng.normal(size=_N) * 1e3,
    "huge": lambda rng: _signs(rng) * rng.uniform(0.5, 1.0, _N) * 3.4e38,
    "huge, of one sign": lambda rng: rng.uniform(0.5, 1.0, _N) * -3.4e38,
    "huge and tiny": lambda rng: _signs(rng) * 10.0 ** rng.uniform(-38, 38, _N),
}
KINDS = tuple(_MAKERS)


def hard_weights(kind: str, dtype: str) -> np.ndarray:
    """Finite weights ``[6, 256]``; what a dtype cannot hold becomes its largest number."""
    values = _MAKERS[kind](np.random.default_rng(7)).reshape(ROWS, COLS)
    top = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    return np.clip(values, -top, top).astype(DTYPES[dtype])
