"""Codes and scales read from any format give what its decoder gives, and go back unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from oracles.hard_weights import KINDS, hard_weights

from mlxedge import grids
from mlxedge.encodings import BF16, GGML, MLX_FLOAT, Affine, Encoding
from mlxedge.encodings.mlx import AFFINE_BITS, AFFINE_GROUPS
from mlxedge.errors import UnsupportedEncodingError
from mlxedge.fallback import OPS

GRIDS: list[Encoding] = [
    *(Affine(bits, group, "bf16") for bits in AFFINE_BITS for group in AFFINE_GROUPS),
    Affine(4, 64, "f16"),
    Affine(3, 32, "f32"),
    *MLX_FLOAT.values(),
    *(e for e in GGML.values() if e.writable and not e.name.startswith(("iq1", "iq2", "iq3"))),
]
IDS = [f"{e}-{getattr(e, 'scale_dtype', '')}" for e in GRIDS]


def random_parts(encoding: Encoding, rows: int = 7, cols: int = 768) -> dict[str, np.ndarray]:
    """Parts of random bits, but for scales that would be infinite."""
    rng = np.random.default_rng(3)
    parts = OPS.encode(rng.normal(size=(rows, cols)).astype(np.float32), encoding)
    if encoding.name == "tq1_0":  # 256 bytes stand for 243 numbers: most bytes are never written
        return parts
    if encoding.family == "mlx":
        parts["weight"] = rng.integers(0, 1 << 32, parts["weight"].shape, np.uint32)
        if parts["scales"].dtype == np.uint8:
            parts["scales"] = rng.integers(0, 255, parts["scales"].shape, np.uint8)
        return parts
    blocks = rng.integers(0, 256, parts["weight"].shape, np.uint8)
    # Any bit pattern may be a scale: those with the highest exponent are infinite or NaN.
    blocks[blocks >= 0x7C] &= 0x7B if encoding.name != "mxfp4" else 0xFF
    return {"weight": blocks}


@pytest.mark.parametrize("encoding", GRIDS, ids=IDS)
def test_values_are_those_of_the_decoder(encoding: Encoding) -> None:
    parts = random_parts(encoding)
    grid = grids.grid(parts, encoding)
    values = grid.values(grids.codes(parts, encoding))
    expected = OPS.decode(parts, encoding)
    same = values.view(np.uint32) == expected.view(np.uint32)
    assert np.all(same | (np.isnan(values) & np.isnan(expected)))
    assert np.isfinite(expected).any()


@pytest.mark.parametrize("encoding", GRIDS, ids=IDS)
def test_codes_come_back(encoding: Encoding) -> None:
    parts = random_parts(encoding)
    codes = grids.codes(parts, encoding)
    again = grids.with_codes(parts, encoding, codes)
    assert parts.keys() == again.keys()
    for name in parts:
        assert again[name].dtype == parts[name].dtype
        assert np.array_equal(again[name].view(np.uint8), parts[name].view(np.uint8)), name


@pytest.mark.parametrize("encoding", GRIDS, ids=IDS)
def test_new_codes_keep_the_scales(encoding: Encoding) -> None:
    parts = random_parts(encoding)
    before = {name: part.copy() for name, part in parts.items()}
    grid = grids.grid(parts, encoding)
    rng = np.random.default_rng(5)
    chosen = rng.choice(grid.ranked, (7, 768))
    changed = grids.with_codes(parts, encoding, chosen)
    assert np.array_equal(grids.codes(changed, encoding), chosen)
    after = grids.grid(changed, encoding)
    for name in ("scale", "offset"):
        assert np.array_equal(getattr(after, name), getattr(grid, name), equal_nan=True)
    assert np.array_equal(OPS.decode(changed, encoding), grid.values(chosen), equal_nan=True)
    for name, part in before.items():
        assert np.array_equal(parts[name].view(np.uint8), part.view(np.uint8)), "parts were changed"


@pytest.mark.parametrize("encoding", GRIDS, ids=IDS)
def test_ranked_codes_rise(encoding: Encoding) -> None:
    grid = grids.grid(random_parts(encoding), encoding)
    assert np.all(np.diff(grid.levels[grid.ranked]) > 0)
    written = grid.levels[:3] if encoding.name == "tq2_0" else grid.levels
    finite = written[np.isfinite(written)]
    assert set(grid.levels[grid.ranked].tolist()) == set(finite.tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q4_k", "q3_k", "q8_0", "tq1_0", "iq4_xs"])
def test_of_what_encoders_write(name: str, kind: str) -> None:
    parts = OPS.encode(hard_weights(kind, "f32"), GGML[name])
    values = grids.grid(parts, GGML[name]).values(grids.codes(parts, GGML[name]))
    assert np.array_equal(values, OPS.decode(parts, GGML[name]), equal_nan=True)


@pytest.mark.parametrize("encoding", [BF16, GGML["iq2_xxs"], GGML["iq3_s"]], ids=str)
def test_lattices_have_no_grid(encoding: Encoding) -> None:
    assert not grids.has_grid(encoding)
    parts = {"weight": np.zeros((1, encoding.nbytes((256,))), np.uint8)}
    for read in (grids.grid, grids.codes):
        with pytest.raises(UnsupportedEncodingError, match="has no code for each weight"):
            read(parts, encoding)
