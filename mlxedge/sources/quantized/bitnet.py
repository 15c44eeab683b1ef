"""BitNet checkpoints of transformers: weights -1, 0 and 1, four to a byte, with one scale.

``X.weight`` u8 ``[out / 4, in]`` holds row ``i · out / 4 + r`` in bits 2i and 2i + 1 of row r, as
the weight plus one (``transformers/integrations/bitnet.py``). ``X.weight_scale`` divides them in
layers of class "bitlinear", which is the default, and multiplies them in "autobitlinear".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxedge.errors import UnsupportedEncodingError
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.files import shown
from mlxedge.sources.quantized.stored import FLOATS, Stored, decoded

_PER_BYTE = 4
#: ``linear_class`` → whether its scale divides.
_CLASSES = {"bitlinear": True, "autobitlinear": False}


def read(stored: Stored, rules: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every packed weight."""
    kind = str(rules.get("linear_class") or "bitlinear")
    if kind not in _CLASSES or rules.get("use_rms_norm"):
        raise UnsupportedEncodingError(
            f"{stored.folder}: BitNet layers of class {shown(kind)}"
            f"{' with a norm inside' if rules.get('use_rms_norm') else ''}, which mlxedge does not "
            f"read; it reads {' and '.join(_CLASSES)}"
        )
    if kind == "autobitlinear" and rules.get("quantization_mode") == "online":
        raise UnsupportedEncodingError(
            f"{stored.folder}: its weights are made ternary as the model runs; start from the "
            "packed checkpoint of the same model"
        )
    return {
        f"{stem}.weight": _layer(stored, stem, _CLASSES[kind])
        for stem, _ in stored.ending(".weight_scale")
    }


def _layer(stored: Stored, stem: str, divides: bool) -> SourceTensor:
    name, scale = f"{stem}.weight", f"{stem}.weight_scale"
    height, cols = stored.take(name, ("u8",), (None, None), of=scale).shape
    stored.take(scale, FLOATS, (1,), ())

    def rows_of(start: int, stop: int) -> np.ndarray:
        by = stored.scales(scale, stored.array(scale)).reshape(())
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.array([-1, 0, 1, 2], np.float32)
            values = stored.scales(scale, values / by if divides else values * by)
        out = np.empty((stop - start, cols), np.float32)
        for quarter in range(start // height, -(-stop // height)):
            first, last = max(start, quarter * height), min(stop, (quarter + 1) * height)
            packed = stored.rows(name, first - quarter * height, last - quarter * height)
            codes = (packed >> np.uint8(2 * quarter)) & np.uint8(3)
            if (codes == 3).any():
                raise stored.corrupt(name, "holds codes that are not -1, 0 or 1")
            out[first - start : last - start] = values[codes]
        return out

    return decoded(name, (height * _PER_BYTE, cols), rows_of)
