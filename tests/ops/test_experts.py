"""The steps of a mixture of experts against plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlxedge.encodings import GGML, PLAIN, Affine, Encoding
from mlxedge.errors import UsageError
from mlxedge.fallback import OPS
from mlxedge.fallback.forward import (
    Buffer,
    Choice,
    ExpertProduct,
    Matrix,
    Product,
    Runner,
    Tape,
    Team,
    Watch,
)

F32 = PLAIN["f32"]
ROWS = 64

Record = Callable[[Tape, Buffer, Buffer], None]


def plain(weights: np.ndarray) -> Matrix:
    return Matrix({"weight": weights.astype(np.float32)}, F32, *weights.shape)


def run(
    record: Record,
    pieces: list[np.ndarray],
    width: int,
    threads: int = 1,
    watch: Watch | None = None,
) -> list[np.ndarray]:
    """What ``record(tape, x, out)`` adds to zeros ``[n, width]``, for each x in turn."""
    tape = Tape()
    x, out, result = tape.buffer(pieces[0].shape[1]), tape.buffer(width), tape.buffer(width)
    tape.head()
    tape.linear(x, [Product(plain(np.zeros((width, x.width))), out)])
    record(tape, x, out)
    tape.linear(out, [Product(plain(np.eye(width)), result)])
    team = Team(threads)
    runner = Runner(tape, team, x, result, [(np.ones(1), 1.0)], rows=ROWS)
    try:
        return [runner.project(piece, watch) for piece in pieces]
    finally:
        team.close()


def dense_weights(
    logits: np.ndarray,
    top_k: int,
    score: str = "softmax",
    normalise: bool = False,
    scale: float = 1.0,
    bias: np.ndarray | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
    each: np.ndarray | None = None,
) -> np.ndarray:
    """The weight of every expert, f64 ``[n, experts]``; NaN for those that were not chosen."""
    logits = logits.astype(np.float64)
    count, experts = logits.shape

    def softmax(v: np.ndarray) -> np.ndarray:
        powers = np.exp(v - v.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "softmax": softmax,
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
        "softmax_top": lambda v: v,
    }
    scores = rules[score](logits)
    ranks = scores if bias is None else scores + bias
    grouped = np.sort(ranks.reshape(count, groups, -1))[:, :, -group_best:].sum(-1)
    kept = np.argsort(-grouped, kind="stable")[:, :top_groups]
    allowed = (kept[:, :, None] == np.arange(experts) // (experts // groups)).any(1)
    ids = np.argsort(-np.where(allowed, ranks, -np.inf), kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, 1)
    if score == "softmax_top":
        weights = softmax(weights)
    if normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    found = np.full((count, experts), np.nan)
    own = 1.0 if each is None else each[ids]
    np.put_along_axis(found, ids, weights * scale * own, 1)
    return found


def weights_of(logits: np.ndarray, top_k: int, threads: int = 1, **routing: Any) -> np.ndarray:
    """As the tape chooses: expert e answers with one in column e and in column ``experts``."""
    experts = logits.shape[1]
    stack = np.zeros((experts, experts, experts + 1))
    stack[range(experts), range(experts), -1] = 1

    def record(tape: Tape, x: Buffer, out: Buffer) -> None:
        choice = tape.choice(experts, top_k)
        scores = tape.buffer(experts)
        rows, answers = (tape.buffer(width, choice) for width in (x.width, experts))
        tape.linear(x, [Product(plain(np.eye(experts, experts + 1)), scores)])
        tape.route(scores, choice, **routing)
        tape.gather(x, choice, rows)
        tape.expert_linear(
            rows, choice, [ExpertProduct(plain(stack.reshape(-1, experts + 1)), answers)]
        )
        tape.combine(answers, choice, out)

    x = np.pad(logits, ((0, 0), (0, 1)), constant_values=1).astype(np.float32)
    return run(record, [x], experts, threads)[0]


ROUTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "softmax": (60, 4, {}),
    "softmax-normalised": (128, 8, {"normalise": True}),
    "softmax-of-the-chosen": (8, 2, {"score": "softmax_top"}),
    "chosen-and-scaled": (32, 4, {"score": "softmax_top", "normalise": True, "scale": 1.5}),
    "sigmoid": (17, 3, {"score": "sigmoid"}),
    "sigmoid-bias": (33, 6, {"score": "sigmoid", "bias": 0.3, "normalise": True, "scale": 2.5}),
    "softmax-bias": (20, 5, {"bias": 0.05}),
    "groups": (
        64,
        6,
        {"score": "sigmoid", "bias": 0.3, "groups": 8, "top_groups": 3, "normalise": True},
    ),
    "groups-by-the-best": (24, 4, {"groups": 4, "top_groups": 2, "group_best": 1}),
    "groups-that-just-suffice": (12, 6, {"score": "sigmoid", "groups": 4, "top_groups": 2}),
    "each-its-own": (20, 3, {"normalise": True, "scale": 1.5, "each": 0.5}),
    "all": (6, 6, {}),
    "one": (1, 1, {"score": "sigmoid"}),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str, count: int, threads: int) -> None:
    experts, top_k, given = ROUTINGS[name]
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(count, experts)).astype(np.float32)
    routing = dict(given)
    for key in {"bias", "each"} & set(routing):
        routing[key] = (rng.normal(size=experts) * routing[key]).astype(np.float32)
    expected = dense_weights(logits, top_k, **routing)
    found = weights_of(logits, top_k, threads, **routing)
    assert (np.isnan(expected) == (found == 0)).all()
    np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=2e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_top"])
def test_of_equal_experts_the_first_serve(score: str) -> None:
    logits = np.array([[0, 1, 0, 1, 1, 0], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 3]], np.float32)
    found = weights_of(logits, 2, score=score)
    chosen = [np.flatnonzero(row).tolist() for row in found]
    assert chosen == [[1, 3], [0, 1], [0, 5]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_choose_somebody(value: float) -> None:
    """What comes of them is caught elsewhere; memory must not be read out of bounds."""
    logits = np.random.default_rng(2).normal(size=(5, 12)).astype(np.float32)
    logits[1:3], logits[4, 3] = value, value
    for routing in ({}, {"score": "sigmoid", "groups": 3, "top_groups": 1}):
        seen: list[tuple[int, int]] = []

        def record(tape: Tape, x: Buffer, out: Buffer, routing: Any = routing) -> None:
            choice = tape.choice(12, 4)
            rows = tape.buffer(12, choice)
            tape.route(x, choice, **routing)
            tape.gather(x, choice, rows)
            tape.expert_tap("rows", rows, choice)
            tape.combine(rows, choice, out)

        def watch(name: str, x: np.ndarray, expert: int, experts: int, seen: Any = seen) -> None:
            seen.append((expert, len(x)))

        with np.errstate(invalid="ignore"):
            found = run(record, [logits], 12, watch=watch)[0]
        assert np.isfinite(found[[0, 3]]).all()
        assert sum(n for _, n in seen) == 20
        assert all(0 <= a < b < 12 for (a, _), (b, _) in pairwise(seen))
        assert max(n for _, n in seen) <= 5


class Layer:
    """An MLP of experts with random weights, and what it is to compute.

    The last expert of several serves nobody. Column 0 of its input is one.
    """

    def __init__(
        self, experts: int, top_k: int, hidden: int, width: int, kind: Encoding, biased: bool
    ) -> None:
        self.experts, self.top_k, self.hidden, self.width = experts, top_k, hidden, width
        rng = np.random.default_rng([experts, top_k, hidden])
        self.x = rng.normal(size=(ROWS, hidden)).astype(np.float32)
        self.x[:, 0] = 1
        self.router = rng.normal(size=(experts, hidden)) / hidden**0.5
        if experts > top_k:
            self.router[-1, 0] = -1000
        self.stacks, self.weights = [], []
        self.biases: list[np.ndarray | None] = []
        for rows, cols in ((width, hidden), (width, hidden), (hidden, width)):
            values = rng.normal(size=(experts * rows, cols)).astype(np.float32) / cols**0.5
            dtype = getattr(kind, "scale_dtype", "f32")
            parts = OPS.encode(values.astype(np.float16 if dtype == "f16" else np.float32), kind)
            decoded = OPS.decode(parts, kind).reshape(experts, rows, cols)
            # A stack is given as it is stored, with its experts as the first axis.
            parts = {n: p.reshape(experts, rows, -1) for n, p in parts.items()}
            self.stacks.append(Matrix(parts, kind, experts * rows, cols))
            self.weights.append(decoded.astype(np.float64))
            bias = rng.normal(size=(experts, rows)).astype(np.float32)
            self.biases.append(bias if biased else None)

    def record(self, tape: Tape, x: Buffer, out: Buffer) -> None:
        choice = tape.choice(self.experts, self.top_k)
        logits = tape.buffer(self.experts)
        widths = (self.hidden, self.width, self.width, self.hidden)
        rows, gate, up, down = (tape.buffer(width, choice) for width in widths)
        answers = zip(self.stacks, (gate, up, down), self.biases, strict=True)
        products = [ExpertProduct(*answer) for answer in answers]
        tape.linear(x, [Product(plain(self.router), logits)])
        tape.route(logits, choice, normalise=True)
        tape.gather(x, choice, rows)
        tape.expert_tap("rows", rows, choice)
        tape.expert_linear(rows, choice, products[:2])
        tape.gate(gate, up)
        tape.tap("gate", gate)
        tape.expert_linear(gate, choice, products[2:])
        tape.combine(down, choice, out)

    def run(self, *counts: int, threads: int = 1, watch: Watch | None = None) -> list[np.ndarray]:
        """Passes over the first tokens, in turn."""
        return run(self.record, [self.x[:n] for n in counts], self.hidden, threads, watch)

    def shares(self) -> np.ndarray:
        """Of each expert in each token, f64 ``[64, experts]``."""
        logits = (self.x.astype(np.float64) @ self.router.T).astype(np.float32)
        return np.nan_to_num(dense_weights(logits, self.top_k, normalise=True))

    def expected(self) -> np.ndarray:
        x, shares = self.x.astype(np.float64), self.shares()
        found = np.zeros_like(x)
        for e in range(self.experts):
            bias_gate, bias_up, bias_down = (0 if b is None else b[e] for b in self.biases)
            gate, up, down = (stack[e] for stack in self.weights)
            inner = x @ gate.T + bias_gate
            inner = inner / (1 + np.exp(-inner)) * (x @ up.T + bias_up)
            found += shares[:, e : e + 1] * (inner @ down.T + bias_down)
        return found


LAYERS: dict[str, tuple[int, int, int, int, Encoding, bool]] = {
    "f32": (8, 2, 40, 23, F32, False),
    "f32-biases": (5, 3, 17, 50, F32, True),
    "one-expert": (1, 1, 24, 16, F32, True),
    "every-expert": (4, 4, 16, 33, F32, False),
    "affine": (6, 2, 64, 128, Affine(4, 64, "f16"), False),
    "q4_k": (16, 4, 256, 256, GGML["q4_k"], False),
    "q8_0-biases": (9, 3, 96, 64, GGML["q8_0"], True),
    "no-kernel": (6, 2, 64, 96, GGML["iq4_nl"], True),
}
_made: dict[str, Layer] = {}


def layer_of(name: str) -> Layer:
    if name not in _made:
        _made[name] = Layer(*LAYERS[name])
    return _made[name]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_experts(name: str, threads: int) -> None:
    """In passes of many lengths, one after another in the same memory."""
    layer = layer_of(name)
    expected = layer.expected()
    counts = (64, 1, 2, 3, 17, 64)
    found = layer.run(*counts, threads=threads)
    tolerance = 3e-6 * np.abs(expected).max()
    for count, rows in zip(counts, found, strict=True):
        np.testing.assert_allclose(rows, expected[:count], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found[0], found[-1])


def test_what_has_no_kernel() -> None:
    assert {n for n in LAYERS if not layer_of(n).stacks[0].compiled} == {"no-kernel"}


@pytest.mark.parametrize("name", ["f32-biases", "q4_k", "no-kernel"])
def test_threads_change_no_bit(name: str) -> None:
    counts = (1, 3, 64)
    one = layer_of(name).run(*counts)
    for threads in (2, 3, 5):
        for ours, theirs in zip(one, layer_of(name).run(*counts, threads=threads), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_a_token_alone_is_as_in_company(name: str) -> None:
    layer = layer_of(name)
    together = layer.run(64, threads=2)[0]
    alone = run(layer.record, list(layer.x[:, None]), layer.hidden, 2)
    tolerance = 3e-6 * np.abs(together).max()
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=0, atol=tolerance)


def test_more_products_than_a_step_holds() -> None:
    rng = np.random.default_rng(3)
    stacks = [rng.normal(size=(4 * 5, 16)).astype(np.float32) for _ in range(19)]

    def record(tape: Tape, x: Buffer, out: Buffer) -> None:
        choice = tape.choice(4, 2)
        logits, rows = tape.buffer(4), tape.buffer(16, choice)
        tape.linear(x, [Product(plain(np.eye(4, 16)), logits)])
        tape.route(logits, choice, score="sigmoid")
        tape.gather(x, choice, rows)
        answers = [tape.buffer(5, choice) for _ in stacks]
        tape.expert_linear(
            rows, choice, [ExpertProduct(plain(s), a) for s, a in zip(stacks, answers, strict=True)]
        )
        for answer in answers:
            tape.combine(answer, choice, out)

    x = rng.normal(size=(9, 16)).astype(np.float32)
    shares = np.nan_to_num(dense_weights(x[:, :4], 2, "sigmoid"))
    total = np.sum([s.reshape(4, 5, 16) for s in stacks], 0)
    expected = np.einsum("ne,erc,nc->nr", shares, total, x)
    for threads in (1, 3):
        np.testing.assert_allclose(run(record, [x], 5, threads)[0], expected, atol=2e-5)


@pytest.mark.parametrize("name", ["f32", "q4_k", "no-kernel"])
def test_a_tap_shows_the_rows_of_each_expert(name: str) -> None:
    layer = layer_of(name)
    seen: list[tuple[int, np.ndarray]] = []
    others: list[tuple[int, ...]] = []

    def watch(name: str, x: np.ndarray, expert: int, experts: int) -> None:
        if name == "rows":
            assert experts == layer.experts
            seen.append((expert, x.copy()))
        else:
            assert (name, expert, experts) == ("gate", 0, 1)
            others.append(x.shape)

    for count in (64, 1, 5):
        layer.run(count, threads=2, watch=watch)
        served = layer.shares()[:count] > 0
        assert [expert for expert, _ in seen] == np.flatnonzero(served.any(0)).tolist()
        for expert, x in seen:
            np.testing.assert_array_equal(x, layer.x[:count][served[:, expert]])
        assert others == [(count * layer.top_k, layer.width)]
        seen.clear()
        others.clear()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [7, 16, 100])
def test_scale_by_sigmoid_and_add(width: int, threads: int) -> None:
    """As a shared expert is weighed."""

    def record(tape: Tape, x: Buffer, out: Buffer) -> None:
        s, y = tape.buffer(1), tape.buffer(width)
        tape.linear(x, [Product(plain(np.eye(1, width)), s), Product(plain(np.eye(width)), y)])
        tape.scale_by_sigmoid(y, s)
        tape.add(y, out)
        tape.add(y, out)

    x = 20 * np.random.default_rng(4).normal(size=(11, width)).astype(np.float32)
    x[:2, 0] = 100, -100
    for count in (1, 11):
        wide = x[:count].astype(np.float64)
        expected = 2 * wide / (1 + np.exp(-wide[:, :1]))
        found = run(record, [x[:count]], width, threads)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("experts", "top_k", "routing", "message"),
    [
        (8, 9, {}, "9 of 8 experts"),
        (8, 0, {}, "0 of 8 experts"),
        (7, 2, {}, "a router with 8 outputs cannot choose of 7"),
        (8, 2, {"groups": 3}, "no best 1 of 3 groups"),
        (8, 2, {"groups": 2, "top_groups": 3}, "no best 3 of 2 groups"),
        (8, 5, {"groups": 2}, "1 of 2 groups of 8 experts do not have 5"),
        (8, 2, {"groups": 8, "top_groups": 4}, "groups of 1 cannot be compared by their best 2"),
        (8, 2, {"groups": 2, "group_best": 3}, "their best 3"),
        (8, 2, {"bias": np.zeros(7, np.float32)}, "a bias of 7 for 8 experts"),
    ],
)
def test_what_cannot_be_chosen(
    experts: int, top_k: int, routing: dict[str, Any], message: str
) -> None:
    tape = Tape()
    with pytest.raises(UsageError, match=message):
        tape.route(tape.buffer(8), tape.choice(experts, top_k), **routing)


def test_stacks_that_do_not_fit() -> None:
    tape = Tape()
    choice: Choice = tape.choice(4, 2)
    x, out = tape.buffer(16, choice), tape.buffer(5, choice)
    for rows, cols in ((5, 16), (19, 16), (20, 17)):
        with pytest.raises(UsageError, match=rf"\[{rows}, {cols}\] is not 4 matrices of \[5, 16\]"):
            tape.expert_linear(x, choice, [ExpertProduct(plain(np.zeros((rows, cols))), out)])
    short = ExpertProduct(plain(np.zeros((20, 16))), out, np.zeros(4, np.float32))
    with pytest.raises(UsageError, match=r"a bias of \[4\] is not 4 of \[5\]"):
        tape.expert_linear(x, choice, [short])
