"""Tensors that a world has in another form: what is made of ours, and ours again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxedge.encodings import F32, GGML, PLAIN, Encoding
from mlxedge.errors import UnsupportedModelError
from mlxedge.models import spec_for
from mlxedge.models.recasts import (
    Each,
    Extend,
    Join,
    Recast,
    Reshape,
    Scale,
    ScaleRows,
    Split,
    Stack,
    Step,
    Transpose,
    Values,
    groups_apart,
    heads_apart,
    interleaved,
    row_by_row,
)
from mlxedge.ops import load_reference
from mlxedge.sources.checkpoint import SourceTensor
from mlxedge.sources.recasts import from_world, recast_only, to_world

CONFIG: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BASE = spec_for({"model_type": "llama"})
Shape = tuple[int, ...]


class Spec:
    """An architecture with one recast, whose tensors have ``shapes``."""

    def __init__(self, recast: Recast, shapes: dict[str, Shape]) -> None:
        self.recasts = (recast,)
        self._shapes = shapes

    def expected(self, config: dict[str, Any]) -> dict[str, Shape]:
        return self._shapes

    def placeholders(self, config: dict[str, Any], world: str) -> dict[str, Any]:
        return {}


def source(name: str, values: np.ndarray, encoding: Encoding = F32) -> SourceTensor:
    flat = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    parts = load_reference().encode(flat, encoding)

    def read(start: int, stop: int) -> dict[str, np.ndarray]:
        assert 0 <= start < stop <= len(flat)
        return {name: part[start:stop].copy() for name, part in parts.items()}

    return SourceTensor(name, values.shape, encoding, read)


def values_of(tensor: SourceTensor, step: int = 3) -> np.ndarray:
    """Decoded, a few rows at a time."""
    found = []
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        parts = tensor.read_rows(start, stop)
        found.append(load_reference().decode(parts, tensor.encoding).reshape(stop - start, -1))
    return np.concatenate(found).reshape(tensor.shape)


def there_and_back(
    steps: tuple[Step, ...],
    values: list[np.ndarray],
    others: int = 1,
    encodings: list[Encoding] | None = None,
) -> tuple[list[np.ndarray], dict[str, SourceTensor]]:
    """What a world has of ``values``; asserts that the way back leads to the same."""
    names = [f"model.layers.3.part{i}.weight" for i in range(len(values))]
    encodings = encodings or [F32] * len(values)
    recast = Recast(
        "mlx",
        tuple(n.replace(".3.", ".{i}.") for n in names),
        tuple(f"h.{{i}}.other{i}.weight" for i in range(others)),
        steps,
    )
    spec: Any = Spec(recast, {n: v.shape for n, v in zip(names, values, strict=True)})
    tensors = {n: source(n, v, e) for n, v, e in zip(names, values, encodings, strict=True)}
    made = to_world(spec, CONFIG, tensors, "mlx")
    assert [t.name for t in made.values()] == [f"h.3.other{i}.weight" for i in range(others)]
    assert to_world(spec, CONFIG, tensors, "gguf") == tensors
    world = {t.name: t for t in made.values()}
    again = from_world(spec, CONFIG, world, "mlx")
    assert list(again) == names
    for name, tensor in tensors.items():
        assert again[name].shape == tensor.shape
        np.testing.assert_allclose(values_of(again[name]), values_of(tensor), atol=2e-7)
    return [values_of(t) for t in made.values()], made


def numbers(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize(
    ("order", "sizes"),
    [(None, (32, 16, 16)), (heads_apart, (32, 32, 32)), (groups_apart, (32, 16, 16))],
)
def test_rows_are_joined(order: Any, sizes: Shape, lead: Shape) -> None:
    parts = [numbers(*lead, size, 8) for size in sizes]
    (joined,), _ = there_and_back((Join(order),), parts)
    expected = np.concatenate(parts, axis=-2)
    if order is not None:
        expected = expected[..., order(CONFIG, sizes), :]
    np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("encoding", [F32, GGML["q8_0"]], ids=str)
def test_rows_are_added(encoding: Encoding) -> None:
    """Copies of the first, as they are encoded."""
    values = numbers(6, 32)
    (made,), tensors = there_and_back((Extend(lambda config: 9),), [values], encodings=[encoding])
    assert {t.encoding for t in tensors.values()} == {encoding}
    np.testing.assert_array_equal(made[6:], np.repeat(made[:1], 3, axis=0))
    np.testing.assert_allclose(made[:6], values, atol=0.05)


def test_heads_take_turns() -> None:
    """As in GPT-NeoX: of each head its query, its key, its value."""
    q, k, v = (numbers(32, 5) for _ in range(3))
    (joined,), _ = there_and_back((Join(heads_apart),), [q, k, v])
    stacked = np.stack([part.reshape(4, 8, 5) for part in (q, k, v)], axis=1)
    np.testing.assert_array_equal(joined, stacked.reshape(96, 5))


def test_groups_take_turns() -> None:
    """As in InternLM2: of each head of keys its queries, its key, its value."""
    q, k, v = numbers(32, 5), numbers(16, 5), numbers(16, 5)
    (joined,), _ = there_and_back((Join(groups_apart),), [q, k, v])
    parts = [q.reshape(2, 16, 5), k.reshape(2, 8, 5), v.reshape(2, 8, 5)]
    np.testing.assert_array_equal(joined, np.concatenate(parts, axis=1).reshape(64, 5))


def test_stacks_take_turns_and_are_transposed() -> None:
    """As in gpt-oss: gate and up row by row, then [experts, in, out]."""
    gate, up = numbers(3, 6, 4), numbers(3, 6, 4) + 1
    (made,), _ = there_and_back((Join(row_by_row), Transpose()), [gate, up])
    assert made.shape == (3, 4, 12)
    np.testing.assert_array_equal(made[..., ::2], gate.swapaxes(1, 2))
    np.testing.assert_array_equal(made[..., 1::2], up.swapaxes(1, 2))


def test_parts_have_an_axis_of_their_own() -> None:
    """As the convolutions of OLMo Hybrid: cut in three, each with an axis of one."""
    whole = numbers(16, 4)
    axis = Reshape(lambda shape: (*shape, 1), lambda shape: (shape[0], shape[1] * shape[2]))
    steps = Split(lambda config: (4, 4, 8)), Each(((axis,),) * 3)
    made, _ = there_and_back(steps, [whole], others=3)
    assert [part.shape for part in made] == [(4, 4, 1), (4, 4, 1), (8, 4, 1)]
    np.testing.assert_array_equal(np.concatenate(made)[..., 0], whole)


def test_columns_move() -> None:
    """As those of Qwen3.5's output, whose heads take turns in GGUF; calibration follows them."""

    def order(config: dict[str, Any], sizes: Any) -> np.ndarray:
        return np.arange(sizes[0]).reshape(2, -1).T.ravel()

    weight = numbers(5, 8)
    (made,), tensors = there_and_back((Join(order, columns=True),), [weight])
    np.testing.assert_array_equal(made, weight[:, [0, 4, 1, 5, 2, 6, 3, 7]])
    (tensor,) = tensors.values()
    assert tensor.like == "model.layers.3.part0.weight"
    assert tensor.columns is not None
    np.testing.assert_array_equal(tensor.columns, [0, 4, 1, 5, 2, 6, 3, 7])


def test_biases() -> None:
    """Vectors are joined by their elements, stacks of them in columns."""
    (made,), _ = there_and_back((Join(),), [numbers(8), numbers(4)])
    np.testing.assert_array_equal(made, np.concatenate([numbers(8), numbers(4)]))
    gate, up = numbers(3, 6), numbers(3, 6) + 1
    (made,), _ = there_and_back((Join(row_by_row, columns=True),), [gate, up])
    np.testing.assert_array_equal(made, np.stack([gate, up], axis=-1).reshape(3, 12))


def test_one_becomes_two_of_which_one_is_transposed() -> None:
    """As DeepSeek's kv_b in llama.cpp: by head, keys transposed and values."""

    stack = Stack(lambda config: 4)

    def apart(config: dict[str, Any], sizes: Any) -> np.ndarray:
        return interleaved(4, sizes)

    kv_b = numbers(4 * (6 + 2), 16)
    steps = (
        Split(lambda config: (24, 8), apart),
        Each(((stack, Transpose()), (stack,))),
    )
    (keys, values), made = there_and_back(steps, [kv_b], others=2)
    by_head = kv_b.reshape(4, 8, 16)
    np.testing.assert_array_equal(keys, by_head[:, :6].swapaxes(1, 2))
    np.testing.assert_array_equal(values, by_head[:, 6:])
    # Only the values' rows have moved, and multiply what all of it does.
    assert [t.like for t in made.values()] == [None, "model.layers.3.part0.weight"]


def test_stacked_rows_keep_their_codes() -> None:
    weights, encoding = numbers(24, 64), GGML["q4_0"]
    (stacked,), made = there_and_back((Stack(lambda config: 4),), [weights], encodings=[encoding])
    (tensor,) = made.values()
    assert (tensor.encoding, tensor.shape, tensor.decoded) == (encoding, (4, 6, 64), False)
    np.testing.assert_array_equal(
        stacked.reshape(24, 64), values_of(source("x", weights, encoding))
    )
    with pytest.raises(UnsupportedModelError, match="do not divide into 5"):
        there_and_back((Stack(lambda config: 5),), [weights])


def test_values_are_scaled() -> None:
    norm = numbers(7)
    (made,), out = there_and_back((Scale(lambda config: 0.1),), [norm])
    np.testing.assert_array_equal(made, norm * np.float32(0.1))
    assert next(iter(out.values())).encoding == F32


def test_values_and_shapes() -> None:
    a_log = numbers(7)
    (made,), out = there_and_back(
        (Values(lambda x: -np.exp(x), lambda x: np.log(-x)), Reshape(lambda s: (*s, 1))), [a_log]
    )
    np.testing.assert_allclose(made, -np.exp(a_log)[:, None], rtol=1e-6)
    assert next(iter(out.values())).encoding == F32
    norm = numbers(12)
    (made,), _ = there_and_back((Reshape(rows=lambda config: 3),), [norm])
    np.testing.assert_array_equal(made, norm.reshape(3, 4))
    conv = numbers(12, 1, 4)
    (made,), _ = there_and_back((Reshape(lambda s: (s[0], s[2], 1)),), [conv])
    np.testing.assert_array_equal(made, conv.reshape(12, 4, 1))


def test_rows_are_scaled() -> None:
    """As Falcon-H1's multipliers, which other worlds have in the weights."""

    def factors(config: dict[str, Any], rows: int) -> np.ndarray:
        return np.arange(1, rows + 1)

    values = numbers(6, 5)
    (made,), _ = there_and_back((ScaleRows(factors),), [values])
    np.testing.assert_allclose(made, values / np.arange(1, 7)[:, None], rtol=1e-6)
    encoding = GGML["q4_0"]
    _, out = there_and_back(
        (ScaleRows(lambda config, rows: np.ones(rows)),), [numbers(4, 32)], encodings=[encoding]
    )
    assert next(iter(out.values())).encoding == encoding


def test_codes_stay_where_rows_only_move() -> None:
    q, k, v = (numbers(32, 64) for _ in range(3))
    encoding = GGML["q4_0"]
    (joined,), made = there_and_back((Join(heads_apart),), [q, k, v], encodings=[encoding] * 3)
    (tensor,) = made.values()
    assert tensor.encoding == encoding
    assert tensor.like == "model.layers.3.part0.weight"
    parts = [values_of(source("x", part, encoding)).reshape(4, 8, 64) for part in (q, k, v)]
    np.testing.assert_array_equal(joined, np.stack(parts, axis=1).reshape(96, 64))


def test_what_differs_or_is_transposed_is_decoded() -> None:
    kinds = [GGML["q4_0"], PLAIN["f16"]]
    _, made = there_and_back((Join(),), [numbers(4, 32), numbers(2, 32)], encodings=kinds)
    (tensor,) = made.values()
    assert tensor.encoding == F32
    assert tensor.decoded
    _, made = there_and_back((Transpose(),), [numbers(4, 32)], encodings=[PLAIN["bf16"]])
    (tensor,) = made.values()
    assert tensor.encoding == PLAIN["bf16"]
    assert not tensor.decoded


def test_only_where_all_are_there() -> None:
    names = ("model.layers.{i}.q.weight", "model.layers.{i}.k.weight")
    recast = Recast("gguf", names, ("blk.{i}.qk.weight",), (Join(),))
    tensors = {
        f"model.layers.{i}.{part}.weight": source("x", numbers(4, 8))
        for i, parts in ((0, "qk"), (11, "k"), (12, "qk"))
        for part in parts
    }
    tensors = {name: replace(tensor, name=name) for name, tensor in tensors.items()}
    spec: Any = Spec(recast, dict.fromkeys(tensors, (4, 8)))
    made = to_world(spec, CONFIG, tensors, "gguf")
    assert list(made) == [
        "gguf:blk.0.qk.weight", "model.layers.11.k.weight", "gguf:blk.12.qk.weight"
    ]  # fmt: skip
    assert list(recast_only(made)) == ["gguf:blk.0.qk.weight", "gguf:blk.12.qk.weight"]


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="do not divide into 4"):
        heads_apart(CONFIG, (30, 30, 30))
    recast = Recast("mlx", ("a.weight", "b.weight"), ("ab.weight",), (Join(),))
    spec: Any = Spec(recast, {"a.weight": (4, 8), "b.weight": (4, 8)})
    with pytest.raises(UnsupportedModelError, match="makes that 8 rows"):
        from_world(spec, CONFIG, {"ab.weight": source("ab.weight", numbers(9, 8))}, "mlx")


@given(
    count=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    step=st.integers(1, 40),
)
def test_any_order_comes_back(count: int, sizes: list[int], step: int) -> None:
    rows = [size * count for size in sizes]
    index = interleaved(count, rows)
    assert sorted(index) == list(range(sum(rows)))
    parts = [numbers(n, 3) for n in rows]
    names = [f"part{i}" for i in range(len(parts))]
    recast = Recast("mlx", tuple(names), ("all",), (Join(lambda c, s: interleaved(count, s)),))
    spec: Any = Spec(recast, {n: p.shape for n, p in zip(names, parts, strict=True)})
    tensors = {n: source(n, p) for n, p in zip(names, parts, strict=True)}
    made = to_world(spec, CONFIG, tensors, "mlx")
    np.testing.assert_array_equal(values_of(made["mlx:all"], step), np.concatenate(parts)[index])
