"""mlx-lm: what runs a model on Apple silicon, and wherever MLX is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxedge.engines.base import About, check_tokens
from mlxedge.errors import BackendError, UsageError
from mlxedge.models import known_model_types, normalise, spec_for
from mlxedge.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.sources.checkpoint import Checkpoint

_CHUNK = 512


def on_processor() -> bool:
    """Whether MLX is here, and computes without a GPU."""
    if importlib.util.find_spec("mlx") is None:
        return False
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.cpu)


@dataclass
class MlxState:
    """mlx-lm's cache of a sequence. ``length`` counts what may be relied on, ``held`` what may be
    in the cache at most."""

    cache: list[Any]
    length: int = 0
    held: int = 0


class MlxLmEngine:
    """Implements ``Engine`` on a Hugging Face or MLX folder; of a model that sees or hears as well
    ``checkpoint`` is the language model (``mlxedge.prepare.text_part``).

    Raises BackendError if mlx-lm is not installed or cannot load the folder, UsageError for a
    checkpoint that is no folder.
    """

    name = "mlx"
    threads: int | None = None

    def __init__(self, checkpoint: Checkpoint, context: int) -> None:
        if importlib.util.find_spec("mlx_lm") is None:
            raise BackendError("engine mlx needs mlx-lm: pip install 'mlxedge[mlx]'")
        if checkpoint.origin.kind not in ("hf", "mlx"):
            raise UsageError(
                f"engine mlx runs MLX and Hugging Face folders, not {checkpoint.origin.path}: "
                "convert it first (mlxedge convert … --to mlx:4bit), or use engine numpy"
            )
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_config, load_model

        path = checkpoint.origin.path
        spec = spec_for(checkpoint.config)
        whole = load_config(path).get("model_type") not in known_model_types()
        if not whole and checkpoint.origin.kind == "hf" and not spec.mlx_reads_stored:
            raise UsageError(
                f"mlx-lm reads {spec.model_type} right from an MLX folder only: convert {path} "
                "first (mlxedge convert … --to mlx:4bit), or use engine numpy"
            )
        # mlx-lm reads one style of rope settings only; what it is given has both. A model that sees
        # or hears as well it knows by its own config, or takes the language model out.
        config = spec.settle(normalise(checkpoint.config, checkpoint.tensors))
        given = {} if whole and not spec.mlx_prefix else spec.mlx_config(config)
        try:
            self._model, _ = load_model(path, model_config=given)
        except Exception as error:
            raise BackendError(f"mlx-lm cannot load {path}: {error}") from error
        self._make_cache = make_prompt_cache
        self._vocab, self._context = int(config["vocab_size"]), context

    def state(self) -> MlxState:
        return MlxState(self._make_cache(self._model))

    def truncate(self, state: MlxState, length: int) -> None:
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        # States of recurrent layers do not tell how many positions they have seen.
        told = [int(c.offset) for c in state.cache if hasattr(c, "offset")]
        held = max(told, default=state.held)
        state.length = min(state.length, length)
        if held == state.length:
            return
        if can_trim_prompt_cache(state.cache):
            trim_prompt_cache(state.cache, held - state.length)
        else:
            # A cache that has turned over has lost what would have to come back.
            state.cache, state.length, state.held = self._make_cache(self._model), 0, 0

    def run(self, tokens: Sequence[int], state: MlxState, results: int) -> np.ndarray:
        import mlx.core as mx
        import numpy as np

        check_tokens(tokens, self._vocab, state.length, self._context)
        first_result = len(tokens) - results
        found = [np.empty((0, self._vocab), np.float32)]
        for first in range(0, len(tokens), _CHUNK):
            piece = list(tokens[first : first + _CHUNK])
            logits = self._model(mx.array([piece]), cache=state.cache)[0]
            state.length = state.held = state.length + len(piece)
            wanted = min(max(first + len(piece) - first_result, 0), len(piece))
            # The cache's arrays are part of what must be computed now.
            mx.eval(logits, [c.state for c in state.cache])
            if wanted:
                found.append(np.array(logits[len(piece) - wanted :].astype(mx.float32)))
        return found[-1] if len(found) == 2 else np.concatenate(found)

    def generate(
        self, tokens: Sequence[int], state: MlxState, sampling: Sampling, most: int
    ) -> Generator[int, None, None]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step
        from mlx_lm.sample_utils import make_sampler

        check_tokens(tokens, self._vocab, state.length, self._context)
        state.held = state.length + len(tokens) + most
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        sampler = make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            top_k=min(sampling.top_k, self._vocab - 1),
            min_p=sampling.min_p,
        )
        steps = generate_step(
            mx.array(list(tokens)),
            self._model,
            max_tokens=most,
            sampler=sampler,
            prompt_cache=state.cache,
            prefill_step_size=_CHUNK,
        )
        # mlx-lm runs one token ahead; that one is not counted, and truncate() drops it.
        for length, (token, _) in enumerate(steps, state.length + len(tokens)):
            state.length = length
            yield int(token)

    def about(self) -> About:
        import mlx.core as mx

        gpu = mx.default_device().type == mx.gpu
        versions = (importlib.metadata.version(name) for name in ("mlx", "mlx-lm"))
        build = ", ".join(f"{n} {v}" for n, v in zip(("mlx", "mlx-lm"), versions, strict=True))
        return About("gpu" if gpu else "cpu", build, mx.get_peak_memory() if gpu else None)

    def close(self) -> None:
        del self._model
