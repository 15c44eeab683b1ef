"""The activation functions of MLPs, lanes at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.fallback.lanes import inline, spread, where
from mlxedge.fallback.memory import get_f32
from mlxedge.fallback.tiles import exp

#: As steps know them; the GELUs are the exact one and Hendrycks and Gimpel's with a hyperbolic
#: tangent (arXiv 1606.08415), "relu2" is the square of ReLU, "xielu" that of arXiv 2411.13010;
#: "sigmoid" is for gates.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu2": 3, "xielu": 4, "sigmoid": 5}
_GELU_TANH, _GELU, _RELU2, _XIELU, _SIGMOID = (
    ACTIVATIONS[n] for n in ("gelu_tanh", "gelu", "relu2", "xielu", "sigmoid")
)

_ZERO, _ONE, _TWO, _HALF = (np.float32(x) for x in (0.0, 1.0, 2.0, 0.5))
_CUBIC, _STEEP = np.float32(0.044715), np.float32(2.0 * np.sqrt(2.0 / np.pi))
_ROOT_HALF = np.float32(np.sqrt(0.5))
#: erf(x) = 1 - (a1·t + … + a5·t⁵)·exp(-x²) for x >= 0 with t = 1 / (1 + p·x), to 1.5e-7:
#: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
_P = np.float32(0.3275911)
_A1, _A2, _A3, _A4, _A5 = (
    np.float32(a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)


@inline
def tanh(v: Any) -> Any:
    """The hyperbolic tangent, to about 1e-7 absolute."""
    return spread(_ONE) - spread(_TWO) / (exp(v * _TWO) + _ONE)


@inline
def _silu(v: Any) -> Any:
    return v / (exp(v * -_ONE) + _ONE)


@inline
def _gelu(v: Any) -> Any:
    x = where(v > spread(_ZERO), v, v * -_ONE) * _ROOT_HALF
    t = spread(_ONE) / (x * _P + _ONE)
    tail = ((((t * _A5 + _A4) * t + _A3) * t + _A2) * t + _A1) * t * exp(x * x * -_ONE)
    # Φ(v) is tail / 2 below zero and 1 - tail / 2 above.
    return v * where(v > spread(_ZERO), spread(_ONE) - tail * _HALF, tail * _HALF)


@inline
def _xielu(v: Any, numbers: int) -> Any:
    """αp·x² + β·x above zero, αn·(exp(min(x, ε)) - 1 - x) + β·x below; ``numbers`` is the address
    of αp, αn, β and ε."""
    positive, negative = get_f32(numbers), get_f32(numbers + 4)
    beta, least = get_f32(numbers + 8), spread(get_f32(numbers + 12))
    bent = (exp(where(v > least, least, v)) - spread(_ONE) - v) * negative
    return where(v > spread(_ZERO), v * v * positive, bent) + v * beta


@inline
def activate(kind: int, v: Any, numbers: int) -> Any:
    """The activation ``kind`` of each lane; ``numbers`` is the address of those f32 that it has of
    its own, if any."""
    if kind == _GELU_TANH:
        # x · (1 + tanh u) / 2 = x / (1 + exp(-2u))
        return v / (exp((v * v * v * _CUBIC + v) * -_STEEP) + _ONE)
    if kind == _GELU:
        return _gelu(v)
    if kind == _RELU2:
        positive = where(v > spread(_ZERO), v, spread(_ZERO))
        return positive * positive
    if kind == _SIGMOID:
        return spread(_ONE) / (exp(v * -_ONE) + _ONE)
    if kind == _XIELU:
        return _xielu(v, numbers)
    return _silu(v)
