"""How well models predict a text, and how far each is from the model it was made of.

evaluate(["model-Q4_K_M.gguf"], against="model").models[0].divergence

By the definitions of llama-perplexity (tools/perplexity/perplexity.cpp of llama.cpp as vendored by
llama-cpp-python 0.3.36). The tokens of the text are cut into chunks of ``context``; each chunk is
run on its own, its first token replaced by BOS if the tokenizer puts one before a text. Position
``context // 2`` is the first whose prediction of the next token counts, and what is left at the end
is not used. llama.cpp stores the reference's logits in 16 bits and leaves tokens below e^-16 out of
the divergence; here nothing is rounded or left out.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlxedge.errors import BadWeightsError, TokenizerError, UsageError
from mlxedge.generate import load
from mlxedge.layers import LayerRunner
from mlxedge.models.shape import shape_of
from mlxedge.ops import load_forward
from mlxedge.prepare import check_weights, prepare, text_part
from mlxedge.sources import open_source
from mlxedge.sources.checkpoint import Checkpoint
from mlxedge.texts import HELDOUT
from mlxedge.tokenizer import load as load_tokenizer

T = TypeVar("T")

CONTEXT = 512
#: Below, too little of a chunk counts.
LEAST_CONTEXT = 8
#: Logits that one thread widens to f64 at a time: 2 MiB, which stays in its cache.
_SLAB = 1 << 18

#: The share of this machine's memory that models may fill; beyond, they are run layer by layer.
_MEMORY_SHARE = 0.6

#: Called with chunks done, chunks in all, and what runs now.
ProgressHook = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from the reference's, in nats.

    ``mean``, ``median``, ``p99`` and ``maximum`` are of KL(reference ‖ model) of each scored token,
    ``same_top`` is the share of them at which both hold the same token for the likeliest, and
    ``log_ratio`` is ln(perplexity / perplexity of the reference), whose error is that of the paired
    differences.
    """

    mean: Estimate
    median: float
    p99: float
    maximum: float
    same_top: Estimate
    log_ratio: Estimate


@dataclass(frozen=True)
class Score:
    """What one model gave. ``nbytes`` is the size of its tensors; ``perplexity`` is exp(``nll``),
    the mean negative log likelihood of the next token in nats."""

    name: str
    path: Path
    nbytes: int
    nll: Estimate
    perplexity: Estimate
    divergence: Divergence | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured on: ``scored`` tokens in ``chunks`` of ``context``, of a text of ``tokens``
    tokens in all; and what it gave, in the order asked for."""

    text_sha256: str
    tokens: int
    context: int
    chunks: int
    scored: int
    bos: bool
    reference: Score | None
    models: tuple[Score, ...]


def evaluate(
    models: Sequence[str | Path | Checkpoint],
    *,
    against: str | Path | Checkpoint | None = None,
    text: str | None = None,
    context: int = CONTEXT,
    chunks: int | None = None,
    engine: str = "numpy",
    by_layer: bool | None = None,
    threads: int | None = None,
    progress: ProgressHook | None = None,
) -> Evaluation:
    """Measure ``models`` on ``text``, and their divergence from ``against`` if that is given.

    Models are whatever ``open_source`` takes, or checkpoints, which are closed. All are held in
    memory and see a chunk in turn; beside their weights it takes the logits of half a chunk for two
    of them. ``by_layer`` instead reads one layer of one model at a time and keeps the hidden states
    of all chunks, with the same result; by itself it is chosen where the models would fill most of
    the memory. All run in one ``engine`` ("numpy": mlxedge's own forward pass, "mlx": mlx-lm), so
    that nothing but the weights differs. Without ``text`` it is the one that ships with the
    package; without ``chunks`` it is all of it.

    Raises what ``open_source`` and ``load`` do; UsageError for a ``context`` that is too short or
    too long, a text shorter than one chunk, and models whose tokens or vocabularies differ;
    TokenizerError for a model without a tokenizer; BadWeightsError for logits that are not finite.
    """
    if not models:
        raise UsageError("there is nothing to evaluate: give a model")
    if context < LEAST_CONTEXT:
        raise UsageError(f"context is {context}: it takes {LEAST_CONTEXT} tokens at least")
    if chunks is not None and chunks < 1:
        raise UsageError(f"chunks is {chunks}: it takes one at least")
    if text is None:
        text = HELDOUT.read_text(encoding="utf-8")
    with ExitStack() as stack:
        given = [*models] if against is None else [against, *models]
        opened = [
            stack.enter_context(m if isinstance(m, Checkpoint) else open_source(m)) for m in given
        ]
        checkpoints = [text_part(checkpoint) for checkpoint in opened]
        tokens, bos = _shared_tokens(checkpoints, text)
        chunks = _count(len(tokens), context, chunks)
        sizes = [sum(t.nbytes for t in c.tensors.values()) for c in checkpoints]
        fed = np.array(tokens[: chunks * context], np.int64).reshape(chunks, context)
        targets = fed[:, context // 2 + 1 :].copy()
        if bos is not None:
            fed[:, 0] = bos
        if by_layer is None:
            by_layer = engine == "numpy" and sum(sizes) > _MEMORY_SHARE * _physical_memory()
        if by_layer and engine != "numpy":
            raise UsageError(f"engine {engine} holds models whole: use engine numpy by layer")
        for checkpoint in checkpoints:
            _check_context(checkpoint, context)
        streams = [
            _by_layer(stack, checkpoint, fed[:, :-1], targets.shape[1], threads, progress)
            if by_layer
            else _whole(stack, checkpoint, fed[:, :-1], targets.shape[1], engine, threads, progress)
            for checkpoint in checkpoints
        ]
        workers = threads or load_forward().available_threads()
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        found = _run(checkpoints, streams, targets, against is not None, pool)
        if progress:
            progress(chunks, chunks, "")
    scores = [
        _score(checkpoint, nbytes, values, found[0])
        for checkpoint, nbytes, values in zip(checkpoints, sizes, found, strict=True)
    ]
    return Evaluation(
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        tokens=len(tokens),
        context=context,
        chunks=chunks,
        scored=len(found[0].nll),
        bos=bos is not None,
        reference=None if against is None else scores[0],
        models=tuple(scores if against is None else scores[1:]),
    )


def _shared_tokens(checkpoints: Sequence[Checkpoint], text: str) -> tuple[list[int], int | None]:
    """The tokens of ``text``, led by BOS if the tokenizers put one, and the id of that.

    An EOS that a tokenizer puts after a text is left out.
    """
    first, vocab = checkpoints[0], checkpoints[0].config.get("vocab_size")
    shared: list[int] = []
    shared_bos: int | None = None
    for checkpoint in checkpoints:
        path = checkpoint.origin.path
        if checkpoint.tokenizer is None:
            raise TokenizerError(f"{path} has no tokenizer, which evaluate needs")
        if (own := checkpoint.config.get("vocab_size")) != vocab:
            raise UsageError(
                f"{path} has a vocabulary of {own} tokens and {first.origin.path} one of {vocab}: "
                "figures of different vocabularies do not compare, evaluate them one by one"
            )
        tokenizer = load_tokenizer(checkpoint.tokenizer, checkpoint.generation_config)
        bos = tokenizer.leading_bos
        # As in llama-perplexity, the text of a control token is only text.
        tokens = tokenizer.encode(text, add_special=False, parse_special=False)
        if bos is not None:
            tokens.insert(0, bos)
        if checkpoint is first:
            shared, shared_bos = tokens, bos
        elif tokens != shared:
            at = next((i for i, (a, b) in enumerate(zip(tokens, shared)) if a != b), len(shared))
            raise UsageError(
                f"{path} reads the text as other tokens than {first.origin.path} (from token {at} "
                "on): figures of different tokens do not compare, evaluate them one by one"
            )
    return shared, shared_bos


def _count(tokens: int, context: int, asked: int | None) -> int:
    whole = tokens // context
    if whole < max(asked or 1, 1):
        raise UsageError(
            f"the text has {tokens} tokens, {whole} chunks of {context}: give a longer text, a "
            "smaller context or fewer chunks"
        )
    return asked or whole


@dataclass
class _Values:
    """Of every scored token: f64 ``nll`` and ``kl``, bool ``same``; the last two are empty without
    a reference."""

    nll: np.ndarray
    kl: np.ndarray
    same: np.ndarray


def _check_context(checkpoint: Checkpoint, context: int) -> None:
    longest = shape_of(checkpoint.config).context
    if context > longest:
        raise UsageError(
            f"{checkpoint.name} has a context of {longest} tokens: it cannot run chunks of "
            f"{context}; use a smaller context"
        )


def _physical_memory() -> float:
    """Bytes of this machine's memory, infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


#: The logits of the scored positions of one chunk after the other, f32 ``[scored, vocab]``.
_Logits = Iterator[np.ndarray]


def _whole(
    stack: ExitStack,
    checkpoint: Checkpoint,
    ids: np.ndarray,
    scored: int,
    engine: str,
    threads: int | None,
    progress: ProgressHook | None,
) -> _Logits:
    """The model is loaded now, and run when logits are asked for."""
    model = stack.enter_context(load(checkpoint, engine=engine, threads=threads))
    state = model.runner.state()

    def run() -> _Logits:
        for chunk, tokens in enumerate(ids):
            if progress:
                progress(chunk, len(ids), model.name)
            model.runner.truncate(state, 0)
            yield model.runner.run(tokens.tolist(), state, scored)

    return run()


def _by_layer(
    stack: ExitStack,
    checkpoint: Checkpoint,
    ids: np.ndarray,
    scored: int,
    threads: int | None,
    progress: ProgressHook | None,
) -> _Logits:
    """The layers are run when the first logits are asked for, and the head when others are."""
    spec, ready = prepare(checkpoint)
    check_weights(spec, ready)
    runner = stack.enter_context(LayerRunner(ready, ids, threads))

    def named(done: int, total: int, what: str) -> None:
        if progress:
            progress(done, total, f"{ready.name} {what}".rstrip())

    return runner.logits(scored, progress=named)


def _run(
    checkpoints: Sequence[Checkpoint],
    streams: Sequence[_Logits],
    targets: np.ndarray,
    compared: bool,
    pool: ThreadPoolExecutor,
) -> list[_Values]:
    """Score what the streams give for ``targets`` int ``[chunks, scored]``."""
    chunks, scored = targets.shape
    found = [
        _Values(np.empty(targets.size), np.empty(n), np.empty(n, bool))
        for n in [targets.size * (compared and i > 0) for i in range(len(streams))]
    ]
    for chunk in range(chunks):
        here = slice(chunk * scored, (chunk + 1) * scored)
        reference = None
        for checkpoint, stream, values in zip(checkpoints, streams, found, strict=True):
            logits = next(stream)
            if not np.isfinite(logits).all():
                raise BadWeightsError(
                    f"{checkpoint.origin.path}: the logits of chunk {chunk + 1} are not finite, so "
                    "the weights are damaged or out of range"
                )
            values.nll[here] = negative_log_likelihood(logits, targets[chunk], pool)
            if reference is not None:
                values.kl[here], values.same[here] = compare_logits(reference, logits, pool)
            elif compared:
                reference = logits
    return found


def negative_log_likelihood(
    logits: np.ndarray, targets: np.ndarray, pool: ThreadPoolExecutor | None = None
) -> np.ndarray:
    """-ln p(target) of each row, f64 ``[n]``: logits f32 ``[n, vocab]``, targets int ``[n]``."""

    def slab(rows: slice) -> np.ndarray:
        wide = logits[rows].astype(np.float64)
        picked = np.take_along_axis(wide, targets[rows, None], 1)[:, 0]
        result: np.ndarray = _log_sum(wide) - picked
        return result

    return np.concatenate(_map(slab, logits.shape, pool))


def compare_logits(
    reference: np.ndarray, logits: np.ndarray, pool: ThreadPoolExecutor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference ‖ logits) of each row in nats, f64 ``[n]``, and whether both have the same
    largest logit (the first among equals), bool ``[n]``. Both are f32 ``[n, vocab]``."""

    def slab(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        p, q = reference[rows].astype(np.float64), logits[rows].astype(np.float64)
        same = p.argmax(1) == q.argmax(1)
        p -= _log_sum(p)[:, None]
        q -= _log_sum(q)[:, None]
        np.subtract(p, q, out=q)
        return np.einsum("nv,nv->n", np.exp(p, out=p), q), same

    parts = _map(slab, logits.shape, pool)
    return np.concatenate([kl for kl, _ in parts]), np.concatenate([same for _, same in parts])


def _log_sum(wide: np.ndarray) -> np.ndarray:
    """ln Σ exp of each row of f64 ``[n, vocab]``, without overflow."""
    top = wide.max(1)
    result: np.ndarray = np.log(np.exp(wide - top[:, None]).sum(1)) + top
    return result


def _map(
    function: Callable[[slice], T], shape: tuple[int, ...], pool: ThreadPoolExecutor | None
) -> list[T]:
    """``function`` of slices that cover the rows, in order."""
    rows, vocab = shape
    step = max(1, _SLAB // vocab)
    slices = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    return list((pool.map if pool else map)(function, slices))


def _score(checkpoint: Checkpoint, nbytes: int, values: _Values, reference: _Values) -> Score:
    nll = mean_and_error(values.nll)
    # A model that is quite broken may exceed what a float holds.
    perplexity = math.exp(nll.value) if nll.value < 700 else math.inf
    divergence = None
    if len(values.kl):
        divergence = Divergence(
            mean=mean_and_error(values.kl),
            median=float(np.median(values.kl)),
            p99=float(np.percentile(values.kl, 99)),
            maximum=float(values.kl.max()),
            same_top=mean_and_error(values.same.astype(np.float64)),
            log_ratio=mean_and_error(values.nll - reference.nll),
        )
    return Score(
        name=checkpoint.name,
        path=checkpoint.origin.path,
        nbytes=nbytes,
        nll=nll,
        perplexity=Estimate(perplexity, perplexity * nll.error),
        divergence=divergence,
    )


def mean_and_error(values: np.ndarray) -> Estimate:
    """Mean of ``values`` (at least two) and its standard error: the deviation of the sample over
    the root of its size."""
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
