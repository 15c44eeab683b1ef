"""The perplexity of GGUF files is what llama.cpp's own logits and tokens give."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from oracles.llama_cpp import LlamaCpp

import mlxedge
from mlxedge.demo import model_path
from mlxedge.evaluate import evaluate
from mlxedge.targets import parse_target
from mlxedge.texts import HELDOUT

CONTEXT, CHUNKS = 128, 4
TEXT = HELDOUT.read_text(encoding="utf-8")[:3000]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as GGUF files; as it is, and with BOS before every text."""
    home = tmp_path_factory.mktemp("evaluate")
    folder = home / "demo"
    shutil.copytree(model_path(), folder)
    if request.param:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    mlxedge.convert(folder, ["gguf:f16", "gguf:q8_0"], home)
    return home


def log_likelihoods(path: Path, bos: bool) -> np.ndarray:
    """Of every token that counts, by the loop of llama-perplexity."""
    found = []
    with LlamaCpp(path, threads=2, cache="f32") as peer:
        assert peer.add_bos == bos
        tokens = peer.tokenize(TEXT, add_special=True, parse_special=False)
        for start in range(0, CHUNKS * CONTEXT, CONTEXT):
            chunk = tokens[start : start + CONTEXT]
            first = [peer.bos] if peer.add_bos else chunk[:1]
            logits = peer.logits([*first, *chunk[1:]]).astype(np.longdouble)
            for at in range(CONTEXT // 2, CONTEXT - 1):
                row = logits[at] - logits[at].max()
                found.append(float(row[chunk[at + 1]] - np.log(np.exp(row).sum())))
    return np.array(found)


@pytest.mark.parametrize(("recipe", "close"), [("f16", 1e-4), ("q8_0", 5e-3)])
def test_perplexity_is_llama_cpps(
    home: Path, request: pytest.FixtureRequest, recipe: str, close: float
) -> None:
    """With quantized weights llama.cpp rounds activations to 8 bits too."""
    path = home / parse_target(f"gguf:{recipe}").default_name("demo")
    found = evaluate([path], text=TEXT, context=CONTEXT, chunks=CHUNKS)
    expected = log_likelihoods(path, found.bos)
    assert found.bos == ("bos" in request.node.callspec.id)
    assert found.scored == len(expected) == CHUNKS * 63
    perplexity = found.models[0].perplexity
    assert perplexity.value == pytest.approx(math.exp(-expected.mean()), rel=close)
    error = expected.std(ddof=1) / math.sqrt(len(expected))
    assert perplexity.error == pytest.approx(math.exp(-expected.mean()) * error, rel=close)
