"""What a model is calibrated on.

Without a text it is the beginning of Python's own documentation, as ``pydoc_data.topics`` of the
standard library has it: 465 KB of English, there wherever Python is, and nobody's test set. Little
is needed for the importance of columns: KL of 4-bit weights hardly falls beyond 2048 tokens, and
256 do nearly as well. Hessians tell how inputs go together, which differs more from text to text;
theirs are four texts of different kinds, with four times as many tokens.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mlxedge.errors import TokenizerError, UsageError
from mlxedge.models.shape import shape_of
from mlxedge.texts import CALIBRATION, HELDOUT
from mlxedge.tokenizer import load as load_tokenizer

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint
    from mlxedge.tokenizer import Tokenizer

CONTEXT = 512
#: Below, a chunk is hardly a text; llama-imatrix looks at no less, either.
LEAST_CONTEXT = 16
MOST_TOKENS, LEAST_TOKENS = 2048, 256
#: Weights up to which the most tokens are run.
_SMALL = 1_000_000_000
#: More than a token has, in any text that is one.
_CHARACTERS = 32


def default_tokens(weights: int, varied: bool = False) -> int:
    """How many tokens a model of so many weights is calibrated on unless told otherwise.

    2048 up to 10⁹ weights, then half as many for each doubling, so that the work stays about the
    same, and 256 from 4·10⁹ on; ``varied`` four times as many.
    """
    tokens = MOST_TOKENS
    while tokens > LEAST_TOKENS and weights > _SMALL * MOST_TOKENS // tokens:
        tokens //= 2
    return tokens * (1 + len(CALIBRATION) if varied else 1)


def default_texts(varied: bool = False) -> dict[str, str]:
    """The texts that are used unless another is given, by name; ``varied`` for Hessians.

    Raises UsageError where Python came without its documentation, as some stripped ones do.
    """
    name = "pydoc_data.topics"
    try:
        topics = importlib.import_module(name).topics
    except (ImportError, AttributeError):
        raise UsageError(
            f"this Python came without {name}, which is the text that models are calibrated on: "
            "give another one (UTF-8)"
        ) from None
    texts = {name: "\n".join(topics.values())}
    if varied:
        texts |= {f"mlxedge's {p.stem}": p.read_text(encoding="utf-8") for p in CALIBRATION}
    return texts


def read_text(file: Path) -> str:
    """A text given by the user. Raises UsageError unless it is UTF-8 without NUL, and not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise UsageError(f"{file} is empty: there is no text to run")
    if (at := text.find("\0")) >= 0:
        raise UsageError(f"{file} is no text: character {at} is NUL")
    return text


def refuse_heldout(name: str, text: str) -> None:
    """Raise UsageError for the text that ``evaluate`` measures with, or one that holds it: figures
    measured on it would say nothing any more. How it is broken into lines makes no difference."""
    given, heldout = (" ".join(t.split()) for t in (text, HELDOUT.read_text(encoding="utf-8")))
    # Only a passage of some length is a copy.
    if heldout in given or (len(given) >= 1000 and given in heldout):
        raise UsageError(
            f"{name} is the text that mlxedge evaluate measures with: calibrate on another one"
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens to run: ``ids`` int64 ``[chunks, context]``, each chunk on its own.

    ``text`` is the name of the text and ``sha256`` its hash, ``available`` how many tokens were
    looked at to find these; ``bos`` whether each chunk begins with BOS.
    """

    ids: np.ndarray
    text: str
    sha256: str
    available: int
    bos: bool

    @property
    def context(self) -> int:
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        return int(self.ids.size)


def sample(
    checkpoint: Checkpoint,
    text: str | None = None,
    *,
    name: str = "text",
    tokens: int | Literal["all"] | None = None,
    context: int | None = None,
    varied: bool = False,
) -> Sample:
    """The first ``tokens`` tokens of ``text`` in chunks of ``context``, as llama-imatrix cuts them:
    the first token of each chunk is BOS if the tokenizer begins a text with it, the text of control
    tokens is only text, and what fills no chunk is left out.

    Without ``text`` it is ``default_texts(varied)``, of which chunks are taken in turn; without
    ``tokens`` there are ``default_tokens`` of them, or as many as the text has, which "all" asks
    for; without ``context`` it is 512, or fewer where the model or ``tokens`` has fewer.

    Raises TokenizerError for a model without a tokenizer, and UsageError for a text that is too
    short or held out, and for figures that make no sense.
    """
    if checkpoint.tokenizer is None:
        raise TokenizerError(f"{checkpoint.origin.path} has no tokenizer, which calibration needs")
    texts = default_texts(varied) if text is None else {name: text}
    for one, content in texts.items():
        refuse_heldout(one, content)
    weights = sum(tensor.size for tensor in checkpoint.tensors.values())
    everything = max(len(content.encode()) for content in texts.values()) + 1
    wanted = tokens or default_tokens(weights, varied)
    wanted = everything * len(texts) if wanted == "all" else wanted
    limit = shape_of(checkpoint.config).context
    chunk = min(CONTEXT, wanted, limit) if context is None else context
    if chunk < LEAST_CONTEXT:
        raise UsageError(f"a context of {chunk} tokens is too short: it takes {LEAST_CONTEXT}")
    if chunk > limit:
        raise UsageError(
            f"a context of {chunk} tokens is more than the model's {limit}: use a smaller one"
        )
    if wanted < chunk:
        raise UsageError(f"{wanted} tokens are less than one chunk of {chunk}: use more tokens")
    tokenizer = load_tokenizer(checkpoint.tokenizer, checkpoint.generation_config)
    # Rounded up, so that the first texts have the chunk that does not divide.
    each = -(-(wanted // chunk) // len(texts)) * chunk
    each = max(each, wanted) if len(texts) == 1 else each
    cut: list[list[list[int]]] = []
    available, lacking, bos = 0, 0, None
    # What the short ones lack comes from the first, which is the longest by far.
    for content in reversed(texts.values()):
        share = each + lacking if len(cut) == len(texts) - 1 else each
        ids, bos = _encode(tokenizer, content, share)
        available += len(ids)
        cut.insert(0, [ids[i : i + chunk] for i in range(0, len(ids) - chunk + 1, chunk)])
        cut[0] = cut[0][: share // chunk]
        lacking += max(0, each - chunk * len(cut[0]))
    taken = [c for turn in zip_longest(*cut) for c in turn if c is not None][: wanted // chunk]
    if not taken or (
        isinstance(tokens, int) and (available < tokens or len(taken) < wanted // chunk)
    ):
        way = ", or fewer tokens" if taken else "" if context is None else ", or a smaller context"
        raise UsageError(
            f"{' and '.join(texts)}: {available} tokens, and {wanted if taken else chunk} are "
            f"asked for: give a longer text{way}"
        )
    rows = np.array(taken, np.int64)
    if bos is not None:
        rows[:, 0] = bos
    if rows.max() >= (vocab := int(checkpoint.config["vocab_size"])):
        raise TokenizerError(
            f"{checkpoint.origin.path}: the tokenizer has a token {rows.max()}, and the model's "
            f"vocabulary ends at {vocab}, so it is another model's"
        )
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    return Sample(rows, ", ".join(texts), digest, available, bos is not None)


def random_sample(checkpoint: Checkpoint, varied: bool = False) -> Sample:
    """Random tokens, for a model whose tokenizer cannot be used: of what calibration gains they
    bring most, since which columns are large hardly depends on the text."""
    weights = sum(tensor.size for tensor in checkpoint.tensors.values())
    context = min(CONTEXT, shape_of(checkpoint.config).context)
    chunks = max(1, default_tokens(weights, varied) // context)
    ids = np.random.default_rng(0).integers(checkpoint.config["vocab_size"], size=(chunks, context))
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    return Sample(ids.astype(np.int64), "random tokens", digest, ids.size, False)


def _encode(tokenizer: Tokenizer, text: str, wanted: int) -> tuple[list[int], int | None]:
    """At least the first ``wanted`` tokens of a text, if it has so many, and BOS if it leads."""
    bos = tokenizer.leading_bos
    lead = [] if bos is None else [bos]
    for part in (text[: _CHARACTERS * wanted], text):
        ids = lead + tokenizer.encode(part, add_special=False, parse_special=False)
        if len(ids) >= wanted or len(part) == len(text):
            break
    return ids, bos
