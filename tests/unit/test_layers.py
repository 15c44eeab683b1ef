"""Layer by layer must be the whole model, to the bit."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.checkpoints import ALL, write_checkpoint
from oracles.tiny import write_tiny_llama

from mlxedge.encodings import F32, GGML, Affine, Encoding
from mlxedge.errors import (
    BadWeightsError,
    CorruptFileError,
    DiskFullError,
    OutputError,
    UsageError,
)
from mlxedge.layers import LayerRunner
from mlxedge.models.decoder import Decoder
from mlxedge.ops import Parts, load_reference
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.checkpoint import Checkpoint, SourceTensor, Tensors

GEMMA4_LARGE = "gemma4_text-no-inputs-keys-as-values"
IDS = np.random.default_rng(0).integers(3, 512, (3, 75))


def encoded(checkpoint: Checkpoint, kind: Encoding) -> Checkpoint:
    """With every matrix in another encoding."""
    ops = load_reference()

    def change(tensor: SourceTensor) -> SourceTensor:
        if len(tensor.shape) == 1:
            return tensor
        parts = ops.encode(ops.decode(tensor.read(), tensor.encoding), kind)

        def rows(start: int, stop: int) -> Parts:
            return {n: p.reshape(tensor.rows, -1)[start:stop].copy() for n, p in parts.items()}

        return replace(tensor, encoding=kind, read_rows=rows)

    return replace(
        checkpoint, tensors=Tensors({n: change(t) for n, t in checkpoint.tensors.items()})
    )


def edited(
    checkpoint: Checkpoint, name: str, edit: Callable[[np.ndarray], np.ndarray]
) -> Checkpoint:
    tensor = checkpoint.tensors[name]
    weights = edit(load_reference().decode(tensor.read(), tensor.encoding)).astype(np.float32)
    changed = replace(
        tensor,
        encoding=F32,
        shape=weights.shape,
        read_rows=lambda start, stop: {"weight": weights[start:stop].copy()},
    )
    return replace(checkpoint, tensors=Tensors({**checkpoint.tensors, name: changed}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = write_tiny_llama(tmp_path_factory.mktemp("layers") / "tiny", layers=3)
    with open_source(folder) as opened:
        yield prepare(opened)[1]


def whole(checkpoint: Checkpoint, ids: np.ndarray, results: int) -> list[np.ndarray]:
    decoder = Decoder(checkpoint, 2)
    try:
        found = []
        for row in ids.astype(np.int64):
            cache, logits = decoder.cache(), []
            for first in range(0, len(row), decoder.rows):
                piece = row[first : first + decoder.rows]
                left = max(0, first + len(piece) - (len(row) - results))
                logits.append(decoder.run(piece, first, cache, min(left, len(piece))))
            found.append(np.concatenate(logits))
        return found
    finally:
        decoder.close()


SHAPES: dict[str, dict[str, Any]] = {
    "untied-biases": {"tied": False, "attention_bias": True, "kv_heads": 4},
    "odd-widths": {"hidden": 72, "heads": 3, "kv_heads": 1, "intermediate": 100, "head_dim": 20},
    "window": {"model_type": "mistral", "sliding_window": 16, "dtype": "bf16"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "dtype": "f16"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_whole_model(name: str, tmp_path: Path) -> None:
    with open_source(write_tiny_llama(tmp_path / "tiny", layers=3, **SHAPES[name])) as opened:
        made = prepare(opened)[1]
        with LayerRunner(made, IDS, 2) as runner:
            found = list(runner.logits(40))
        for ours, theirs in zip(found, whole(made, IDS, 40), strict=True):
            np.testing.assert_array_equal(ours, theirs)


OTHERS = (
    *("gemma3_text", "granite", "phi3", "cohere2", "olmo2", "apertus", "ministral3", "phi"),
    *("gpt2", "gpt_neox", "gpt_bigcode", "internlm2", "bloom", "mpt"),
    *("lfm2", "mamba", "mamba2", "granitemoehybrid", "nemotron_h", "falcon_h1", "jamba"),
    *("deepseek_v32", "minicpm3", "gemma4_text", GEMMA4_LARGE, "gemma4_text-experts"),
    "gemma3n_text-shared",
)


@pytest.mark.parametrize("name", OTHERS)
def test_equals_the_whole_model_of_other_architectures(name: str, tmp_path: Path) -> None:
    with open_source(write_checkpoint(tmp_path / "saved", **ALL[name])) as opened:
        checkpoint = prepare(opened)[1]
        with LayerRunner(checkpoint, IDS, 2) as runner:
            found = list(runner.logits(IDS.shape[1]))
        for one, expected in zip(found, whole(checkpoint, IDS, IDS.shape[1]), strict=True):
            np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("encoding", [GGML["q4_k"], Affine(4, 64, "f16"), GGML["iq4_nl"]], ids=str)
@pytest.mark.parametrize("results", [1, 20, 75])
def test_equals_the_whole_model_quantized(
    checkpoint: Checkpoint, encoding: Encoding, results: int
) -> None:
    """iq4_nl has no kernel of its own, so NumPy computes its products."""
    made = encoded(checkpoint, encoding)
    with LayerRunner(made, IDS, 2) as runner:
        found = list(runner.logits(results))
    for ours, theirs in zip(found, whole(made, IDS, results), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_long_sequences_go_in_pieces(checkpoint: Checkpoint) -> None:
    ids = np.random.default_rng(1).integers(3, 512, (1, 1025))
    with LayerRunner(checkpoint, ids) as runner:
        (found,) = runner.logits(600)
    np.testing.assert_array_equal(found, whole(checkpoint, ids, 600)[0])


def test_threads_files_and_pieces_change_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"threads": 1},
        {"threads": 3},
        {"threads": 2, "memory_bytes": 0, "folder": tmp_path},
    ]
    found = []
    for arguments in settings:
        with LayerRunner(checkpoint, IDS, **arguments) as runner:
            found.append(list(runner.logits(31)))
        with LayerRunner(checkpoint, IDS, **arguments) as runner:
            pieces = list(runner.logits(31, most=8))
            assert {len(p) for p in pieces} == {7, 8}
            found.append(np.split(np.concatenate(pieces), 3))
    for other in found[1:]:
        np.testing.assert_array_equal(np.stack(other), np.stack(found[0]))
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_hidden_states_is_one_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Full(io.RawIOBase):
        def seek(self, *place: int) -> int:
            return 0

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with LayerRunner(checkpoint, IDS, 1, folder=tmp_path, memory_bytes=0) as runner:
        runner.states._file.close()
        runner.states._file = Full()
        with pytest.raises(DiskFullError, match="230400 bytes of hidden states cannot be kept"):
            runner.run()
    with pytest.raises(OutputError, match=r"hidden states cannot be kept among the temp.* No such"):
        LayerRunner(checkpoint, IDS, 1, folder=tmp_path / "nowhere", memory_bytes=0)


def test_taps_show_what_goes_into_each_matrix(checkpoint: Checkpoint) -> None:
    """The product of what was seen with the matrices is what the next tap's input is made of; here
    the head's: logits are its product with the table."""
    seen: dict[tuple[str, ...], list[np.ndarray]] = {}

    def watch(names: tuple[str, ...], x: np.ndarray, expert: int, experts: int) -> None:
        assert (expert, experts) == (0, 1)
        seen.setdefault(names, []).append(x.copy())

    with LayerRunner(checkpoint, IDS, 2) as runner:
        runner.run(watch)
        runner.watch_head(watch)
        logits = list(runner.logits(75))
    names = [name for group in seen for name in group]
    matrices = [n for n, t in checkpoint.tensors.items() if len(t.shape) == 2]
    assert sorted(names) == sorted(matrices)
    assert names[-1] == "model.embed_tokens.weight"
    assert ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight") in seen
    for group, rows in seen.items():
        cols = checkpoint.tensors[group[0]].shape[1]
        assert [r.shape for r in rows] == [(75, cols)] * 3
    table = checkpoint.tensors["model.embed_tokens.weight"].read()["weight"]
    for x, expected in zip(seen[(names[-1],)], logits, strict=True):
        np.testing.assert_allclose(x @ table.T, expected, rtol=0, atol=1e-4)


def test_goes_on_from_hidden_states(checkpoint: Checkpoint) -> None:
    with LayerRunner(checkpoint, IDS, 2) as runner:
        runner.step()
        kept = [runner.states.read(i) for i in range(3)]
        expected = list(runner.logits(5))
    with LayerRunner(checkpoint, IDS, 2) as runner:
        runner.restore(1, lambda i: kept[i])
        np.testing.assert_array_equal(np.stack(list(runner.logits(5))), np.stack(expected))


def test_reads_one_layer_at_a_time(checkpoint: Checkpoint) -> None:
    """Nothing of layer 2 is read before layer 1 is done, and of the table only rows of tokens."""
    read: list[tuple[str, int]] = []

    def spy(tensor: SourceTensor) -> SourceTensor:
        def rows(start: int, stop: int) -> Parts:
            read.append((tensor.name, stop - start))
            return tensor.read_rows(start, stop)

        return replace(tensor, read_rows=rows)

    spied = replace(checkpoint, tensors=Tensors({n: spy(t) for n, t in checkpoint.tensors.items()}))
    ids = np.array([[5, 500, 5, 200]])
    with LayerRunner(spied, ids, 1) as runner:
        for layer in range(3):
            runner.step()
            assert not [n for n, _ in read if n.startswith(f"model.layers.{layer + 1}.")]
        assert [rows for name, rows in read if name == "model.embed_tokens.weight"] == [1, 1, 1]


def test_refusals(checkpoint: Checkpoint) -> None:
    for ids, message in (
        (np.zeros((2, 0)), "not empty"),
        (np.zeros(5), "must be"),
        (np.full((1, 4), 512), "token 512 is not"),
        (np.full((1, 4), -1), "token -1 is not"),
        (np.zeros((1, 2049)), "2049 tokens do not fit"),
    ):
        with pytest.raises(UsageError, match=message):
            LayerRunner(checkpoint, ids.astype(np.int64))
    with LayerRunner(checkpoint, IDS, 1) as runner, pytest.raises(UsageError, match="76 results"):
        next(runner.logits(76))


def test_what_is_not_finite_names_its_layer(checkpoint: Checkpoint) -> None:
    def huge(weights: np.ndarray) -> np.ndarray:
        return weights * np.float32(1e30)

    broken = edited(checkpoint, "model.layers.1.mlp.down_proj.weight", huge)
    broken = edited(broken, "model.layers.1.mlp.up_proj.weight", huge)
    with LayerRunner(broken, IDS, 2) as runner:
        runner.step()
        with pytest.raises(BadWeightsError, match="the activations of layer 1 are not finite"):
            runner.step()


def test_a_missing_or_misshapen_tensor(checkpoint: Checkpoint) -> None:
    kept = {n: t for n, t in checkpoint.tensors.items() if "1.mlp.up" not in n}
    smaller = replace(checkpoint, tensors=Tensors(kept))
    missing = r"layers\.1\.mlp\.up_proj\.weight is missing"
    with LayerRunner(smaller, IDS, 1) as runner, pytest.raises(CorruptFileError, match=missing):
        runner.run()
    shorter = edited(checkpoint, "model.layers.0.self_attn.q_proj.weight", lambda w: w[:-1])
    with LayerRunner(shorter, IDS, 1) as runner, pytest.raises(CorruptFileError, match="255, 256"):
        runner.run()
