"""Loading and generating, on a tiny random model."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from oracles.tiny import write_tiny_llama

import mlxedge
from mlxedge.errors import CorruptFileError, TokenizerError, UnsupportedModelError, UsageError
from mlxedge.generate import Model, Sampling
from mlxedge.sources import open_source

PROMPT = [{"role": "user", "content": "Where does the river bend?"}]


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return mlxedge.load(tiny, engine="numpy", threads=2)


def test_a_stream_is_greedy_and_counts(model: Model) -> None:
    tokens = model.encode_prompt(PROMPT)
    stream = model.stream(tokens, max_tokens=12)
    chunks = list(stream)
    expected = list(tokens)
    for chunk in chunks:
        assert chunk.token == int(model.logits(expected)[-1].argmax())
        expected.append(chunk.token)
    assert [c.finish for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    # A random model may well end its answer early.
    ended = chunks[-1].token in model.end_ids
    assert ended or len(chunks) == 12
    assert chunks[-1].finish == stream.finish == ("stop" if ended else "length")
    assert stream.stats.prompt_tokens == len(tokens)
    assert stream.stats.generated_tokens == len(chunks)
    assert stream.stats.prefill_tps
    assert stream.stats.decode_tps
    text = model.tokenizer.decode([c.token for c in chunks if c.finish != "stop"])
    assert "".join(c.text for c in chunks) == text
    assert model.generate(PROMPT, max_tokens=12) == text


def test_one_token_has_no_decode_speed(model: Model) -> None:
    stream = model.stream([5, 6], max_tokens=1)
    assert [c.finish for c in stream] == ["length"]
    assert stream.stats.decode_tps is None


def test_sampling_repeats_with_a_seed(model: Model) -> None:
    def draw(seed: int) -> str:
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        return model.generate(PROMPT, max_tokens=16, sampling=sampling)

    assert draw(1) == draw(1) != draw(2)


def test_an_end_token_stops(model: Model, tmp_path: Path, tiny: Path) -> None:
    """Whatever the model says third is made the end."""
    said = [c.token for c in model.stream([7, 8, 9], max_tokens=3)]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [said[2]]}))
    with mlxedge.load(folder, engine="numpy") as ending:
        chunks = list(ending.stream([7, 8, 9], max_tokens=10))
    first = said.index(said[2])
    assert [c.token for c in chunks] == said[: first + 1]
    assert chunks[-1].finish == "stop"


def test_a_session_reuses_what_it_has(model: Model) -> None:
    tokens = list(range(3, 40))
    session = model.session()
    first = model.stream(tokens, max_tokens=5, session=session)
    said = [c.token for c in first]
    assert session.tokens == tokens + said
    longer = [*tokens, *said, 50, 51]
    again = model.stream(longer, max_tokens=5, session=session)
    found = [c.token for c in again]
    # The last token of the first answer was not computed yet.
    assert (again.stats.reused_tokens, again.stats.prompt_tokens) == (len(tokens) + 4, 3)
    fresh = model.stream(longer, max_tokens=5)
    assert found == [c.token for c in fresh]
    assert fresh.stats.reused_tokens == 0


def test_a_session_forgets_what_differs(model: Model) -> None:
    session = model.session()
    list(model.stream(list(range(3, 30)), max_tokens=3, session=session))
    other = [*range(3, 13), 99, *range(14, 25)]
    stream = model.stream(other, max_tokens=6, session=session)
    found = [c.token for c in stream]
    assert stream.stats.reused_tokens == 10
    assert found == [c.token for c in model.stream(other, max_tokens=6)]


def test_the_same_prompt_again_costs_one_token(model: Model) -> None:
    session = model.session()
    tokens = list(range(3, 30))
    first = [c.token for c in model.stream(tokens, max_tokens=4, session=session)]
    again = model.stream(tokens, max_tokens=4, session=session)
    assert [c.token for c in again] == first
    assert again.stats.prompt_tokens == 1


def test_an_abandoned_stream_leaves_a_usable_session(model: Model) -> None:
    session = model.session()
    stream = model.stream([4, 5, 6], max_tokens=20, session=session)
    said = [next(stream).token for _ in range(3)]
    stream.close()
    assert session.tokens == [4, 5, 6, *said]
    logits = session.feed([9])
    truth = model.logits([4, 5, 6, *said, 9])[-1]
    np.testing.assert_allclose(logits, truth, atol=1e-4)
    session.reset()
    np.testing.assert_allclose(session.feed([4]), model.logits([4])[0], atol=1e-4)


def test_the_context_is_a_limit(model: Model) -> None:
    most = model.context_length
    with pytest.raises(UsageError, match="do not fit the model's context"):
        model.stream([5] * (most + 1))
    chunks = list(model.stream([5] * (most - 2), max_tokens=10))
    assert len(chunks) == 3
    assert chunks[-1].finish == "length"


@pytest.mark.parametrize("tokens", [[], [512], [-1], [3, 4, 10**9]])
def test_impossible_prompts(model: Model, tokens: list[int]) -> None:
    with pytest.raises(UsageError):
        model.stream(tokens)
    with pytest.raises(UsageError):
        model.logits(tokens)


def test_senseless_arguments(model: Model, tiny: Path) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        model.stream([3], max_tokens=0)
    with pytest.raises(UsageError, match="threads"):
        mlxedge.load(tiny, threads=0)
    with pytest.raises(UsageError, match="unknown engine"):
        mlxedge.load(tiny, engine="torch")


def test_text_is_a_message_unless_raw(model: Model) -> None:
    text = "The capital of France is"
    assert model.encode_prompt(text, raw=True) == model.tokenizer.encode(text)
    assert model.encode_prompt(text) == model.encode_prompt([{"role": "user", "content": text}])


def test_without_a_tokenizer_there_are_only_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with mlxedge.load(folder, engine="numpy") as model:
        assert len(list(model.stream([3, 4], max_tokens=2))) >= 1
        with pytest.raises(TokenizerError, match="no tokenizer"):
            model.encode_prompt("text")


def test_a_checkpoint_can_be_loaded_and_is_closed(tiny: Path) -> None:
    checkpoint = open_source(tiny)
    closed = []
    was = checkpoint.on_close
    checkpoint.on_close = lambda: (closed.append(True), was())[1]
    with mlxedge.load(checkpoint, engine="numpy") as model:
        assert closed
        assert model.logits([3]).shape == (1, 512)


def test_a_closed_model_says_so_and_a_forgotten_one_ends_its_threads(tiny: Path) -> None:
    model = mlxedge.load(tiny, engine="numpy", threads=3)
    assert model.logits([3]).shape == (1, 512)
    model.close()
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.logits([3])
    before = set(threading.enumerate())
    forgotten = mlxedge.load(tiny, engine="numpy", threads=4)
    forgotten.logits([3])
    new = set(threading.enumerate()) - before
    assert len(new) == 3
    del forgotten
    gc.collect()
    for thread in new:
        thread.join(timeout=30)
        assert not thread.is_alive()


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    edit_config(folder, hidden_act="mish")
    with pytest.raises(UnsupportedModelError, match="mish"):
        mlxedge.load(folder, engine="numpy")
    edit_config(folder, hidden_act="silu", rope_scaling={"rope_type": "longrope", "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="longrope"):
        mlxedge.load(folder, engine="numpy")


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    edit_config(folder, intermediate_size=1024)
    with pytest.raises(CorruptFileError, match=r"gate_proj.weight is \[512, 256\] and should be"):
        mlxedge.load(folder, engine="numpy")
    edit_config(folder, intermediate_size=512, num_hidden_layers=3)
    with pytest.raises(CorruptFileError, match=r"missing.*layers\.2"):
        mlxedge.load(folder, engine="numpy")


@pytest.mark.parametrize("model_type", ["brontosaurus", "foo"])
def test_an_architecture_that_is_not_known_is_not_run_as_llama(
    tmp_path: Path, model_type: str
) -> None:
    """Its tensors may be called like llama's and mean something else."""
    folder = write_tiny_llama(tmp_path / "tiny")
    edit_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=f"{model_type}.*known: .*llama"):
        mlxedge.load(folder, engine="numpy")


def test_layers_that_the_config_leaves_out_are_noticed(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1"):
        mlxedge.load(folder, engine="numpy")
