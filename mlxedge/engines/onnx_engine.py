"""onnxruntime-genai: folders with a genai_config.json, as its model builder writes them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxedge.engines.base import About, check_tokens
from mlxedge.errors import BackendError, CorruptFileError
from mlxedge.sampling import Sampling
from mlxedge.sources.folder import model_name

if TYPE_CHECKING:
    import numpy as np

CONFIG = "genai_config.json"
#: What one sequence holds unless told otherwise.
_CONTEXT = 4096


def is_onnx_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


@dataclass(frozen=True)
class OnnxFolder:
    """What genai_config.json says. ``files`` are the graph and its weights."""

    path: Path
    name: str
    vocab: int
    context: int
    architecture: str
    files: tuple[Path, ...]


def read_folder(path: Path) -> OnnxFolder:
    """Raises CorruptFileError where it does not describe a decoder, or its files are missing."""
    try:
        model = json.loads((path / CONFIG).read_text(encoding="utf-8"))["model"]
        graph = path / str(model["decoder"]["filename"])
        vocab, context = int(model["vocab_size"]), int(model["context_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(path / CONFIG, f"does not describe a decoder: {error!r}") from error
    if graph.parent != path or not graph.is_file():
        raise CorruptFileError(path / CONFIG, f"there is no graph {graph.name}")
    files = (graph, *sorted(f for f in path.glob(f"{graph.name}*") if f != graph and f.is_file()))
    return OnnxFolder(path, model_name(path), vocab, context, str(model.get("type", "")), files)


@dataclass
class OnnxState:
    """A generator, which holds one sequence."""

    generator: Any
    length: int = 0


class OnnxEngine:
    """Implements ``Engine``. It generates greedily only, and gives logits of the last token only.

    ``wanted`` is how many tokens will be asked for at most: there is room for them from the start.
    Raises BackendError if onnxruntime-genai is not installed or cannot load the folder.
    """

    name = "onnxruntime"

    def __init__(
        self, folder: OnnxFolder, threads: int | None = None, wanted: int | None = None
    ) -> None:
        if importlib.util.find_spec("onnxruntime_genai") is None:
            raise BackendError(
                "engine onnxruntime needs onnxruntime-genai: pip install 'mlxedge[onnx]'"
            )
        import onnxruntime_genai as og

        self.threads: int | None = threads
        self._folder, self._og = folder, og
        self._context, self._vocab = min(folder.context, wanted or _CONTEXT), folder.vocab
        try:
            og.disable_telemetry_events()
            config = og.Config(str(folder.path))
            if threads is not None:
                options = {"session_options": {"intra_op_num_threads": threads}}
                config.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = og.Model(config)
        except Exception as error:
            raise BackendError(f"onnxruntime-genai cannot load {folder.path}: {error}") from error

    def state(self) -> OnnxState:
        params = self._og.GeneratorParams(self._model)
        # An end token must not end a measurement; min_length keeps it from being chosen.
        params.set_search_options(
            max_length=self._context, min_length=self._context, do_sample=False
        )
        return OnnxState(self._og.Generator(self._model, params))

    def truncate(self, state: OnnxState, length: int) -> None:
        if length >= state.length:
            return
        state.generator.rewind_to(length)
        state.length = length

    def run(self, tokens: Sequence[int], state: OnnxState, results: int) -> np.ndarray:
        import numpy as np

        self._append(tokens, state)
        if results == 0:
            return np.empty((0, self._vocab), np.float32)
        logits = np.asarray(state.generator.get_logits(), np.float32)
        return logits.reshape(-1, logits.shape[-1])[-1:]

    def generate(
        self, tokens: Sequence[int], state: OnnxState, sampling: Sampling, most: int
    ) -> Generator[int, None, None]:
        self._append(tokens, state)
        for number in range(most):
            state.generator.generate_next_token()
            if number:
                state.length += 1  # the token before has been run
            yield int(state.generator.get_next_tokens()[0])

    def about(self) -> About:
        kind = str(self._model.device_type).lower()
        build = f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}"
        return About("cpu" if kind == "cpu" else "gpu", build)

    def close(self) -> None:
        del self._model

    def _append(self, tokens: Sequence[int], state: OnnxState) -> None:
        import numpy as np

        check_tokens(tokens, self._vocab, state.length, self._context)
        state.generator.append_tokens(np.asarray(tokens, np.int32))
        state.length += len(tokens)
