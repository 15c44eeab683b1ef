"""A real model through everything: SmolLM2-135M-Instruct, from a Q4_1 GGUF file to every target
and back, answered by llama.cpp, by mlx-lm and by mlxedge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles.llama_cpp import LlamaCpp

import mlxedge
from mlxedge.ops import load_ops
from mlxedge.sources import open_source
from mlxedge.targets import GGUF_RECIPES, parse_target

QUESTION = "What is the capital of France?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
MLX = ("mlx:4bit", "mlx:8bit", "mlx:mxfp4", "mlx:mxfp8", "mlx:nvfp4", "mlx:bf16", "mlx:6bit-g32")
#: Precise enough to know the answer. Smaller ones answer in sentences, and some do not know.
PRECISE = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q4_1")


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a float folder, made from the GGUF file by the command line, and everything
    made from that folder in one run."""
    home = tmp_path_factory.mktemp("smollm2")
    floats = home / "smol"
    run(["convert", smollm2, "--to", "hf:f32", "-o", floats])
    targets = [f"gguf:{r}" for r in GGUF_RECIPES] + list(MLX)
    run(["convert", floats, *(w for t in targets for w in ("--to", t)), "-o", home / "out"])
    rule = ["--to", "gguf:f16", "--to", "gguf:q8_0", "--to", "mlx:4bit", "--quality", "reference"]
    run(["convert", floats, *rule, "-o", home / "rule"])
    return home


def run(arguments: list[object]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlxedge", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def output(home: Path, target: str, folder: str = "out") -> Path:
    return home / folder / parse_target(target).default_name("smol")


@pytest.mark.parametrize("recipe", GGUF_RECIPES)
def test_llama_cpp_answers(home: Path, recipe: str) -> None:
    with LlamaCpp(output(home, f"gguf:{recipe}")) as model:
        tokens = model.tokenize(PROMPT, add_special=True, parse_special=True)
        answer = model.detokenize(model.greedy(tokens, 24)).decode(errors="replace")
    assert len(set(answer)) > 8, answer
    assert recipe not in PRECISE or "Paris" in answer, answer


def test_mlx_lm_answers(home: Path) -> None:
    """mlx-lm on the CPU takes seconds a token, so the answer stops at the name."""
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(str(output(home, "mlx:8bit")))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    with mlxedge.load(output(home, "mlx:8bit")) as ours:
        assert ours.encode_prompt([{"role": "user", "content": QUESTION}]) == list(prompt)
        answer = ours.generate([{"role": "user", "content": QUESTION}], max_tokens=24)
        assert "Paris" in answer
        said = ours.tokenizer.encode(answer, add_special=False)
        truth = ours.logits([*prompt, *said])
    logits = np.array(model(mx.array([[*prompt, *said]]))[0].astype(mx.float32))
    # One pass over prompt and answer: at each place of the answer mlx-lm picks the same token.
    start = len(prompt) - 1
    assert logits[start:-1].argmax(-1).tolist() == said
    assert np.abs(logits - truth).max() < 0.05 * np.abs(truth).max()


@pytest.mark.parametrize("target", ["gguf:q8_0", "gguf:f16"])
def test_greedy_tokens_equal_llama_cpps(home: Path, target: str) -> None:
    path = output(home, target, "rule")
    with LlamaCpp(path) as peer, mlxedge.load(path) as ours:
        tokens = peer.tokenize("The history of the city begins", add_special=True)
        expected = peer.greedy(tokens, 32)
        found = [c.token for c in ours.stream(tokens, max_tokens=32)]
        assert ours.tokenizer.encode("The history of the city begins") == tokens
    assert found == expected[: len(found)]
    assert len(found) == 32 or found[-1] in ours.end_ids


@pytest.mark.parametrize("target", ["mlx:8bit", "mlx:bf16", "hf"])
def test_our_own_answer(home: Path, target: str) -> None:
    path = home / "smol" if target == "hf" else output(home, target)
    answer = run(["generate", path, QUESTION, "-n", "24", "--no-stats"])
    assert "Paris" in answer


@pytest.mark.parametrize(
    ("recipe", "target"),
    [("q4_0", "mlx:4bit-g32"), ("q4_1", "mlx:4bit-g32"), ("q8_0", "mlx:8bit-g32")],
)
def test_gguf_to_mlx_is_lossless(home: Path, tmp_path: Path, recipe: str, target: str) -> None:
    source = output(home, f"gguf:{recipe}")
    printed = run(["convert", source, "--to", target, "-o", tmp_path / "m", "--json"])
    record = json.loads((tmp_path / "m.mlxedge.json").read_text())
    assert json.loads(printed)["result"]["outputs"][0]["target"] == target
    kept = [t["source"] for t in record["tensors"] if t["how"] == "transcode"]
    assert len(kept) >= 210
    ops = load_ops("numpy")
    with open_source(source) as before, open_source(tmp_path / "m") as after:
        for name in kept[:: len(kept) // 10]:
            a, b = before.tensors[name], after.tensors[name]
            np.testing.assert_array_equal(
                ops.decode(a.read(), a.encoding), ops.decode(b.read(), b.encoding)
            )


def test_mlx_arrays_equal_mlx_lms(home: Path) -> None:
    """The rule of ``mlx_lm.convert`` on a CPU, array for array."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    model, config = load_model(home / "smol")
    model, _ = quantize_model(model, config, 64, 4)
    peer = dict(tree_flatten(model.parameters()))
    ours = mx.load(str(output(home, "mlx:4bit", "rule") / "model.safetensors"))
    assert set(ours) == set(peer)
    assert [k for k in ours if not mx.array_equal(ours[k], peer[k])] == []
