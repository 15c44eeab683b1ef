"""Statistics of activations against transformers, whose hooks show the same inputs, and against
what llama-imatrix wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.checkpoints import ALL, write_checkpoint
from oracles.gguf_models import write_gguf_model
from oracles.stand_ins import load_config
from oracles.tiny import SENTENCES, write_tiny_llama

import mlxedge
from mlxedge.calibration.collect import calibrate, collect
from mlxedge.calibration.imatrix import read_imatrix
from mlxedge.calibration.statistics import FEWEST_TOKENS
from mlxedge.calibration.texts import Sample, sample
from mlxedge.layers import LayerRunner
from mlxedge.models import ModelSpec, spec_for
from mlxedge.prepare import prepare
from mlxedge.sources import open_source

HEAD = "lm_head.weight"
GOLDEN = Path(__file__).parents[1] / "golden" / "imatrix"
IDS = np.random.default_rng(0).integers(3, 512, (3, 160))

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"layers": 3},
    "llama-untied-biases": {"tied": False, "attention_bias": True, "kv_heads": 4},
    "llama-head-dim": {"head_dim": 32, "heads": 4, "kv_heads": 1, "rope": {"rope_theta": 5e5}},
    "mistral-window": {"model_type": "mistral", "tied": False, "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", "rope": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6},
}

#: Of other wirings: norms on both sides with caps, matrices in one, none before, MLP beside.
OTHERS = (
    "gemma2",
    "gemma3_text",
    "phi3",
    "glm4-biases-three-quarters",
    "olmo2",
    "granite",
    "apertus",
    "ministral3",
    "minicpm-tied",
    "exaone",
    "stablelm-parallel",
    "phi",
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "gpt_bigcode-heads-untied-gelu",
    "bloom",
    "falcon-new",
    "mpt-six-heads-clipped",
    "cohere2",
    "hunyuan_v1_dense",
    "nemotron-biases-three-quarters",
    "lfm2",
    "jamba",
    "nemotron_h",
    "mamba",
    "mamba2",
    "granitemoehybrid-dense-tied",
    "minicpm3-unscaled",
    "gemma4_text",
    "gemma4_text-no-inputs-keys-as-values",
    "gemma3n_text",
    "qwen3_5_text-tied-every-third-half",
)


def inputs_by_transformers(folder: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What goes into each linear layer: f32 ``[tokens, cols]``, by its weight's name."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(
        folder, config=load_config(folder), dtype=torch.float32, attn_implementation="eager"
    )
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):

            def keep(module: Any, given: Any, key: str = f"{name}.weight") -> None:
                seen.setdefault(key, []).append(given[0].reshape(-1, given[0].shape[-1]).numpy())

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in ids:
            model(torch.tensor(row[None]))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def canonical(spec: ModelSpec, stored: str) -> list[str]:
    """The matrices that a stored one holds; files may call the whole otherwise than transformers
    does."""
    found = []
    for recast in spec.recasts:
        layer = recast.layer_of(stored, recast.other) if recast.world == "stored" else None
        found += recast.at(layer, recast.canonical) if layer is not None else []
    other = f"backbone.{stored.removeprefix('model.')}"
    return (
        found
        or [n for n in (spec.canonical(other)[0],) if n != other]
        or [spec.canonical(stored)[0]]
    )


@pytest.mark.parametrize("name", [*CHECKPOINTS, *OTHERS])
def test_sums_and_hessians(name: str, tmp_path: Path) -> None:
    if name in CHECKPOINTS:
        folder = write_tiny_llama(tmp_path / "tiny", **CHECKPOINTS[name])
    else:
        folder = write_checkpoint(tmp_path / "tiny", **ALL[name])
    spec = spec_for(json.loads((folder / "config.json").read_text("utf-8")))
    with open_source(folder) as opened:
        known = {HEAD, *prepare(opened)[1].tensors}
    expected = {
        name: x
        for key, x in inputs_by_transformers(folder, IDS).items()
        for name in canonical(spec, key)
        if name in known
    }
    if json.loads((folder / "config.json").read_text("utf-8"))["tie_word_embeddings"]:
        expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    with open_source(folder) as opened:
        sample = Sample(IDS, "random", "", IDS.size, False)
        found = list(collect(prepare(opened)[1], sample, hessians=True))
    # transformers multiplies with this one outside of a module.
    steps = {n for one in found for n in one.names if n.endswith("dt_proj.weight")}
    assert {n for one in found for n in one.names} - steps == set(expected)
    for one in found:
        for matrix in set(one.names) - steps:
            x = expected[matrix].astype(np.float64)
            assert one.statistics.total == len(x)
            np.testing.assert_allclose(one.statistics.sums[0], (x * x).sum(0), rtol=1e-4)
            assert one.hessians is not None
            hessian = x.T @ x / len(x)
            np.testing.assert_array_equal(one.hessians[0], one.hessians[0].T)
            # A correlation may be zero: errors count against the columns that it is of.
            size = np.sqrt(np.outer(hessian.diagonal(), hessian.diagonal()))
            assert (np.abs(one.hessians[0] - hessian) / size).max() < 1e-4


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v32", "gemma4_text"]
)
def test_each_expert_has_sums_and_a_hessian(model_type: str, tmp_path: Path) -> None:
    """Against what a watch of the layers sees, summed here; and what does not go through experts
    against transformers."""
    counts = {"mixtral": "num_local_experts", "deepseek_v32": "n_routed_experts"}
    settings = {counts.get(model_type, "num_experts"): 24, "num_experts_per_tok": 1}
    if model_type == "deepseek_v32":
        settings |= {"first_k_dense_replace": 0, "norm_topk_prob": False}
    if model_type == "gemma4_text":
        own = {"enable_moe_block": True, "top_k_experts": 1, "moe_intermediate_size": 64}
        settings = {"num_experts": 24, "hidden_size_per_layer_input": 0, **own}
    folder = write_checkpoint(tmp_path / "model", model_type, **settings)
    expected = inputs_by_transformers(folder, IDS)
    inputs: dict[tuple[str, int], list[np.ndarray]] = {}

    def watch(names: tuple[str, ...], x: np.ndarray, expert: int, experts: int) -> None:
        for name in names:
            inputs.setdefault((name, expert), []).append(x.astype(np.float64))

    with open_source(folder) as opened:
        checkpoint = prepare(opened)[1]
        with LayerRunner(checkpoint, IDS, 1) as runner:
            runner.run(watch)
        sample = Sample(IDS, "random", "", IDS.size, False)
        found = [
            one for one in collect(checkpoint, sample, hessians=True) if "layers" in one.names[0]
        ]
    stacks = 0
    for one in found:
        statistics, hessians = one.statistics, one.hessians
        assert hessians is not None
        for name in one.names:
            # Both name a matrix alike, but for the experts and Mixtral's router.
            if name in expected:
                x = expected[name].astype(np.float64)
                np.testing.assert_allclose(statistics.sums[0], (x * x).sum(0), rtol=1e-4)
            empty = [np.zeros((0, statistics.sums.shape[1]))]
            seen = [np.concatenate(inputs.get((name, e), empty)) for e in range(statistics.experts)]
            assert [len(x) for x in seen] == statistics.counts.tolist()
            everyone = np.concatenate(seen)
            for x, sums, hessian in zip(seen, statistics.sums, hessians, strict=True):
                np.testing.assert_allclose(sums, (x * x).sum(0), rtol=1e-5)
                judged = x if len(x) >= FEWEST_TOKENS or len(seen) == 1 else everyone
                np.testing.assert_allclose(
                    hessian, judged.T @ judged / len(judged), rtol=1e-3, atol=1e-4
                )
            stacks += len(seen) > 1
    assert stacks == 2 * 3
    few = np.concatenate([one.statistics.few for one in found])
    assert few.any()
    assert not few.all()


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_a_calibration_is_that_of_llama_imatrix(model: str, tmp_path: Path) -> None:
    """tests/golden/make_imatrix.py made its files of these models and this text."""
    path = tmp_path / f"{model}.gguf"
    if model == "dense":
        folder = write_tiny_llama(tmp_path / "tiny", layers=1, hidden=128, intermediate=256)
        mlxedge.convert(folder, "gguf:f32", path)
    else:
        write_gguf_model(path, experts=4, hidden=64, intermediate=32, heads=2)
    (tmp_path / "text.txt").write_text(SENTENCES, encoding="utf-8")
    with open_source(path) as opened:
        spec, checkpoint = prepare(opened)
        golden = read_imatrix(GOLDEN / f"{model}.gguf", spec)
        taken = sample(
            checkpoint, SENTENCES, tokens=golden.tokens, context=golden.context, name="text.txt"
        )
        ours = calibrate(checkpoint, taken)
    assert golden.tokens == ours.tokens
    known = set(golden.tensors) & set(ours.tensors)
    # llama-imatrix leaves the head out unless told otherwise.
    assert set(ours.tensors) - known <= {"lm_head.weight", "model.embed_tokens.weight"}
    assert set(golden.tensors) == known
    for name in known:
        one, other = ours.tensors[name], golden.tensors[name]
        # A router's choice may be a near-tie, which another order of sums decides otherwise.
        assert np.abs(one.counts - other.counts).sum() <= 4
        np.testing.assert_allclose(one.sums, other.sums, rtol=2e-3, atol=5e-3 * other.sums.max())
