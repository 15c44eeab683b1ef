"""Mixtures of experts, converted whole: each expert by its own statistics, in files that the
runtimes of each format run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles.checkpoints import write_checkpoint
from oracles.gguf_models import write_gguf_model
from oracles.llama_cpp import LlamaCpp
from oracles.llama_quantize import Options, quantize

import mlxedge
from mlxedge.calibration.collect import calibrate, collect
from mlxedge.calibration.imatrix import read_imatrix, write_imatrix
from mlxedge.calibration.statistics import Calibration, Statistics
from mlxedge.calibration.texts import sample
from mlxedge.ops import Quality, load_reference
from mlxedge.prepare import prepare
from mlxedge.recipes.llama_cpp import file_type
from mlxedge.sources import open_source
from mlxedge.sources.gguf import read_gguf

MODELS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "olmoe"),
    *("gpt_oss", "granitemoe", "minimax_m2", "dots1", "afmoe", "deepseek_v3"),
)
#: The width of an expert of these is ``intermediate_size``.
ONE_WIDTH = ("mixtral", "olmoe", "gpt_oss", "granitemoe", "minimax_m2")
#: What leaves two layers with experts.
LAYERS = {
    "glm4_moe": {"first_k_dense_replace": 0},
    "deepseek_v3": {"first_k_dense_replace": 0},
    "dots1": {"first_k_dense_replace": 0},
    "afmoe": {"num_hidden_layers": 4, "num_dense_layers": 2},
}
#: Other random weights, where those of seed 0 have near-ties of experts at most positions.
SEEDS = {"minimax_m2": 1}
OPS = load_reference()
TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 512, 64)]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    wide = {"moe_intermediate_size": 256} if request.param not in ONE_WIDTH else {}
    wide |= LAYERS.get(request.param, {})
    wide |= {"seed": SEEDS.get(request.param, 0)}
    return write_checkpoint(
        folder, request.param, "bfloat16", hidden_size=256, intermediate_size=256, **wide
    )


def test_quantized_models_run_in_their_runtimes(model: Path, tmp_path: Path) -> None:
    """As ours runs them, which reads the same codes."""
    import mlx.core as mx
    from mlx_lm import load

    mlxedge.convert(model, ["mlx:4bit", "gguf:q4_k_m", "gguf:q8_0"], tmp_path)
    folder, mixed, wide = (
        tmp_path / f"model{end}" for end in ("-mlx-4bit", "-Q4_K_M.gguf", "-Q8_0.gguf")
    )
    for file in (mixed, wide):
        with LlamaCpp(file, cache="f32") as running:
            # llama.cpp rounds activations to 8 bits where weights are quantized.
            assert relative(running.logits(TOKENS), mlxedge.load(file).logits(TOKENS)) < 0.05
    network = load(str(folder))[0]
    network.set_dtype(mx.float32)
    theirs = np.array(network(mx.array([TOKENS]))[0].astype(mx.float32))
    assert relative(theirs, mlxedge.load(folder).logits(TOKENS)) < 1e-3


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The median over positions: at a few a near-tie of two experts may be decided otherwise."""
    assert found.shape == expected.shape
    errors = ((found - expected) ** 2).sum(1) / (expected**2).sum(1)
    return float(np.sqrt(np.median(errors)))


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_each_expert_is_encoded_by_its_own_inputs(
    model: Path, quality: Quality, tmp_path: Path
) -> None:
    mlxedge.convert(model, "mlx:3bit", tmp_path / "made", quality=quality)
    with open_source(model) as opened, open_source(tmp_path / "made") as written:
        checkpoint, made = prepare(opened)[1], prepare(written)[1]
        taken = sample(checkpoint, varied=quality == "best")
        stacks = 0
        for one in collect(checkpoint, taken, hessians=quality == "best"):
            importance = one.statistics.importance()
            for name in one.names if len(importance) > 1 else ():
                source, found = checkpoint.tensors[name], made.tensors[name]
                rows = source.shape[1]
                stacks += 1
                for expert, columns in enumerate(importance):
                    span = expert * rows, (expert + 1) * rows
                    weights = source.read_rows(*span)["weight"]
                    feedback = None
                    if quality == "best":
                        assert one.hessians is not None
                        feedback = OPS.feedback(one.hessians[expert])
                    parts = OPS.encode(
                        weights, found.encoding, columns, quality=quality, feedback=feedback
                    )
                    for part, stored in found.read_rows(*span).items():
                        assert np.array_equal(parts[part], stored), (name, expert, part)
        assert stacks == 2 * 3


@pytest.mark.parametrize("recipe", ["q2_k", "q4_k_m", "iq2_xs"])
def test_an_imatrix_serves_experts_as_in_llama_quantize(recipe: str, tmp_path: Path) -> None:
    source, file = tmp_path / "m.gguf", tmp_path / "m.imatrix"
    shapes = write_gguf_model(source, experts=4, vocab=260)
    rng = np.random.default_rng(1)
    with open_source(source) as opened:
        spec, checkpoint = prepare(opened)
        statistics = {
            name: Statistics(
                rng.exponential(64, (max(1, *t.shape[:-2], 1), t.cols)).astype(np.float32),
                np.full(max(1, *t.shape[:-2], 1), 64),
            )
            for name, t in checkpoint.tensors.items()
            if len(t.shape) > 1
        }
        calibration = Calibration(statistics, ("random",), None, 64, 64)
        write_imatrix(file, calibration, spec)
        found = read_imatrix(file, spec)
        named = {spec.to_gguf(name): found.importance(name) for name in found.tensors}
    options = Options(imatrix={to[0]: i for to, i in named.items() if to and i is not None})
    quantize(source, tmp_path / "theirs.gguf", file_type(recipe), options=options)
    ours = tmp_path / "ours.gguf"
    mlxedge.convert(source, f"gguf:{recipe}", ours, quality="reference", calibrate=file)
    assert tensors(ours) == tensors(tmp_path / "theirs.gguf")
    assert {len(s) for s in shapes.values()} == {1, 2, 3}


def tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {
        t.name: (t.encoding.name, data[t.offset : t.offset + t.nbytes])
        for t in read_gguf(path).tensors
    }


def test_a_calibration_of_experts_can_be_kept(model: Path, tmp_path: Path) -> None:
    """In both formats, with the counts of each expert in the newer one."""
    with open_source(model) as opened:
        spec, checkpoint = prepare(opened)
        calibration = calibrate(checkpoint, sample(checkpoint, tokens=512))
    for legacy in (False, True):
        write_imatrix(tmp_path / "i", calibration, spec, legacy)
        found = read_imatrix(tmp_path / "i", spec)
        for name, statistics in calibration.tensors.items():
            assert found.tensors[name].sums.shape == statistics.sums.shape
            if not legacy:
                np.testing.assert_array_equal(found.tensors[name].sums, statistics.sums)
                np.testing.assert_array_equal(found.tensors[name].counts, statistics.counts)
