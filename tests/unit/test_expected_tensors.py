"""A conversion starts only if the weights are the model that config.json describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from oracles.architectures_moe import REMOTE_CODE
from oracles.checkpoints import write_checkpoint
from oracles.tiny import write_tiny_llama
from safetensors.numpy import load_file, save_file

from mlxedge.conversion import convert, plan_conversion
from mlxedge.errors import CorruptFileError, MlxedgeError, UnsupportedModelError, UsageError
from mlxedge.models import known_model_types, normalise, spec_for
from mlxedge.plan import Plan
from mlxedge.prepare import prepare
from mlxedge.sources import open_source
from mlxedge.sources.checkpoint import Checkpoint
from mlxedge.sources.folder import read_base_model
from mlxedge.sources.recasts import to_world
from mlxedge.targets import parse_target

Weights = dict[str, np.ndarray]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FORMATS = ("gguf:q8_0", "mlx:4bit", "hf:f32")


def tiny(folder: Path, change: Callable[[Weights], Any] = lambda w: None, **config: Any) -> Path:
    """A small model whose weights ``change`` has changed, and ``config`` laid over its config."""
    write_tiny_llama(folder, model_type=config.pop("model_type", "llama"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8")) | config
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}), "utf-8")
    return folder


def plan(folder: Path, *targets: str, **options: Any) -> tuple[Plan, Checkpoint]:
    with open_source(folder) as source:
        return plan_conversion(
            source, [parse_target(t) for t in targets], folder.parent / "out", **options
        )


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        (lambda w: w.pop(K_PROJ), {}, f"1 tensor is missing .{K_PROJ}"),
        (lambda w: None, {"num_hidden_layers": 3}, r"9 tensors are missing .*layers\.2\..*, …"),
        (lambda w: None, {"num_hidden_layers": 500}, "num_hidden_layers is 500"),
        (
            lambda w: w.update({NORM: w[NORM][:-2]}),
            {},
            rf"{NORM} is \[254\] and should be \[256\]",
        ),
        (
            lambda w: w.update({n.removeprefix("model."): w.pop(n) for n in list(w)}),
            {},
            r"20 tensors are missing .*20 tensors are not part of it \(embed_tokens",
        ),
        (lambda w: None, {"vocab_size": 511}, r"\[512, 256\] and should be \[511, 256\]"),
        (lambda w: w.update({NORM: np.zeros(0, np.float32)}), {}, r"is \[0\] and should be"),
        (lambda w: None, {"attention_bias": True}, r"missing .*q_proj\.bias"),
        (lambda w: None, {"tie_word_embeddings": False}, f"missing .{HEAD}"),
    ],
    ids=[
        "tensor missing", "layer missing", "layers far too many", "norm of another shape",
        "no prefix", "vocabulary", "empty tensor", "biases missing", "head missing",
    ],
)  # fmt: skip
def test_weights_that_are_not_the_model_are_refused(
    tmp_path: Path,
    change: Callable[[Weights], Any],
    config: dict[str, Any],
    says: str,
    target: str,
) -> None:
    folder = tiny(tmp_path / "tiny", change, **config)
    with pytest.raises(CorruptFileError, match=says) as caught:
        plan(folder, target)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize(
    ("extra", "config"),
    [("model.layers.0.self_attn.sinks", {}), (None, {"num_hidden_layers": 1})],
    ids=["unknown", "layer too many"],
)
def test_tensors_beyond_the_model_are_refused(
    tmp_path: Path, extra: str | None, config: dict[str, Any], target: str
) -> None:
    def change(weights: Weights) -> None:
        if extra:
            weights[extra] = np.ones(4, np.float32)

    folder = tiny(tmp_path / "tiny", change, **config)
    with pytest.raises(UnsupportedModelError, match="not part of it"):
        plan(folder, target)


#: What transformers calls otherwise than files on the Hub as it saves a model.
RENAMED = {"kimi_linear": ("layers.0.block_sparse_moe.", "layers.0.mlp.")}


@pytest.mark.parametrize("model_type", [t for t in known_model_types() if t not in REMOTE_CODE])
def test_expected_tensors_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    fixed_heads = {
        *("baichuan", "bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "helium"),
        *("internlm2", "jamba", "mamba", "mamba2", "mpt", "olmoe", "phi", "qwen", "qwen2"),
        *("qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "stablelm"),
    }
    settings = {"head_dim": 48} if model_type not in fixed_heads else {}
    if model_type == "llama":
        settings |= {"attention_bias": True, "mlp_bias": True}
    if model_type.endswith("_moe"):
        settings |= {"mlp_only_layers": [1]}
    folder = write_checkpoint(tmp_path / "saved", model_type, **settings)
    with open_source(folder) as opened:
        spec, checkpoint = prepare(opened)
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        assert spec.expected(checkpoint.config) == shapes

        # And back: by the names that transformers gave them, or several in one.
        def named(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
            return spec.to_stored(name, (*shape, 1)[0])

        made = to_world(spec, checkpoint.config, checkpoint.tensors, "stored")
        apart = [n for name, shape in shapes.items() for n in named(name, shape)]
        joined = [n for tensor in made.values() for n in named(tensor.name, tensor.shape)]
        saved = sorted(n.replace(*RENAMED.get(model_type, ("", ""))) for n in opened.tensors)
        assert saved in (sorted(apart), sorted(joined))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda w: w.pop(EXPERT.format(2)), CorruptFileError, "down_proj.weight has no expert 2"),
        (lambda w: w.pop(EXPERT.format(3)), CorruptFileError, r"is \[3, .* should be \[4, "),
        (
            lambda w: w.update({EXPERT.format(1): w[EXPERT.format(1)][:-1]}),
            CorruptFileError,
            "has experts that differ",
        ),
        (
            lambda w: w.update({EXPERT.format(0): w[EXPERT.format(0)].astype(np.float16)}),
            CorruptFileError,
            "has experts that differ",
        ),
    ],
    ids=["one missing", "last missing", "shape", "dtype"],
)
def test_experts_that_are_not_whole_are_refused(
    tmp_path: Path, change: Callable[[Weights], Any], error: type[MlxedgeError], says: str
) -> None:
    folder = write_checkpoint(tmp_path / "saved", "mixtral")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=says):
        plan(folder, "mlx:4bit")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_local_experts": 0}, r"num_experts \('0'\)"),
        ({"num_local_experts": None}, "num_experts"),
        ({"num_experts_per_tok": 9}, "exceeds num_experts"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
    ],
)
def test_experts_that_make_no_sense_are_refused(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    folder = write_checkpoint(tmp_path / "saved", "qwen3_moe")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    with pytest.raises(UnsupportedModelError, match=says):
        plan(folder, "mlx:4bit")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_key_value_heads": "2"}, r"num_key_value_heads \('2'\)"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"vocab_size": ...}, r"vocab_size \('absent'\)"),
        ({"hidden_size": 256.0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"head_dim": -64}, "head_dim"),
        ({"head_dim": 63}, "odd"),
        ({"head_dim": ..., "num_attention_heads": 6}, "does not divide into 6"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"rope_theta": "big"}, "rotary"),
        ({"rope_scaling": "linear"}, "rotary"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rotary"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rotary"),
        ({"layer_types": 3}, "layer_types"),
    ],
)
@pytest.mark.parametrize("target", FORMATS)
def test_configs_that_make_no_sense_are_refused(
    tmp_path: Path, config: dict[str, Any], says: str, target: str
) -> None:
    folder = tiny(tmp_path / "tiny", **config)
    with pytest.raises(UnsupportedModelError, match=says):
        plan(folder, target)


@pytest.mark.parametrize("epsilon", [None, ...], ids=["null", "absent"])
def test_an_epsilon_left_open_is_transformers_default(tmp_path: Path, epsilon: Any) -> None:
    folder = tiny(tmp_path / "tiny", rms_norm_eps=epsilon)
    made, _ = plan(folder, "mlx:f32", "hf:f32", "gguf:f32")
    for output in made.outputs[:2]:
        assert json.loads(output.files["config.json"])["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"dtype": "F16"}])
def test_unknown_options_are_usage_errors(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="choose from"):
        plan(tiny(tmp_path / "tiny"), "mlx:4bit", **options)


def test_a_second_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "tiny", lambda w: w.update({HEAD: w[TABLE].copy()}))
    _, checkpoint = plan(folder, *FORMATS)
    assert HEAD not in checkpoint.tensors
    assert checkpoint.config["tie_word_embeddings"] is True


def test_a_tied_head_that_differs_is_kept(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights[HEAD] = weights[TABLE].copy()
        weights[HEAD][-1, -1] += 1  # the last weight of all

    folder = tiny(tmp_path / "tiny", change)
    made, checkpoint = plan(folder, *FORMATS)
    assert checkpoint.config["tie_word_embeddings"] is False
    for output in made.outputs:
        assert HEAD in [t.source for t in output.tensors]
    assert json.loads(made.outputs[1].files["config.json"])["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": ..., "max_position_embeddings": 8192}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 2048}, None),
        ({"model_type": "llama", "sliding_window": 64}, None),
    ],
)
def test_no_context_beyond_the_window_is_declared(
    tmp_path: Path, config: dict[str, Any], window: int | None
) -> None:
    made, checkpoint = plan(tiny(tmp_path / "tiny", **config), "gguf:f32", "mlx:f32", "hf:f32")
    declared = window or checkpoint.config["max_position_embeddings"]
    spec = spec_for(checkpoint.config)
    assert spec.gguf_metadata(checkpoint.config)["llama.context_length"].value == declared
    written = json.loads(made.outputs[1].files["config.json"])
    assert written["max_position_embeddings"] == declared
    said = ["up to" in " ".join(output.notes) for output in made.outputs]
    assert said == [bool(window), bool(window), False]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 64),
        ({"use_sliding_window": True, "max_window_layers": 1}, 64),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
        ({"use_sliding_window": True}, None),  # from layer 28 on, and there are two
        (
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            64,
        ),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_windows_of_qwen(model_type: str, settings: dict[str, Any], window: int | None) -> None:
    config = normalise(
        {
            "model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 80,
            "max_position_embeddings": 512, "sliding_window": 64, **settings,
        },
        [],
    )  # fmt: skip
    assert spec_for(config).window(config, "gguf") == window


@pytest.mark.parametrize("target", ["gguf:f32", "mlx:f32"])
def test_yarn_without_truncation_is_refused(tmp_path: Path, target: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    plan(tiny(tmp_path / "plain", rope_scaling=yarn), target)
    folder = tiny(tmp_path / "tiny", rope_scaling=yarn | {"truncate": False})
    with pytest.raises(UnsupportedModelError, match="truncate"):
        plan(folder, target)
    plan(folder, "hf:f32")


def test_a_folder_without_a_tokenizer_is_said_to_lack_one(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "tiny")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    made, _ = plan(folder, "mlx:4bit", "gguf:q8_0")
    assert all("no tokenizer" in " ".join(output.notes) for output in made.outputs)


def test_gguf_says_what_the_model_is_based_on_and_how_to_sample(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "tiny")
    (folder / "README.md").write_text("---\nbase_model: some-org/Some-Model-1B\n---\n", "utf-8")
    sampling = {"temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": None}
    (folder / "generation_config.json").write_text(json.dumps(sampling), "utf-8")
    convert(folder, "gguf:f32", tmp_path / "tiny.gguf")
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    keys = gguf.Keys.General
    said = {
        keys.BASE_MODEL_COUNT: 1,
        keys.BASE_MODEL_NAME.format(id=0): "Some Model 1B",
        keys.BASE_MODEL_ORGANIZATION.format(id=0): "some org",
        keys.BASE_MODEL_REPO_URL.format(id=0): "https://huggingface.co/some-org/Some-Model-1B",
        keys.SAMPLING_TEMP: 0.5,
        keys.SAMPLING_TOP_K: 20,
        keys.SAMPLING_TOP_P: 0.75,
    }
    assert {key: fields[key].contents() for key in said} == said
    assert keys.SAMPLING_MIN_P not in fields
    with open_source(tmp_path / "tiny.gguf") as back:
        assert back.base_model == "some-org/Some-Model-1B"


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("base_model: a/b", "a/b"),
        ("base_model: 'a/b-1.5' # of old", "a/b-1.5"),
        ("base_model:\n- a/b\n- c/d", "a/b"),
        ("base_model:\n  - https://huggingface.co/a/b", "a/b"),
        ("base_model: [a/b, c/d]", "a/b"),
        ("base_model: nothing", None),
        ("base_model: ../../etc/passwd", None),
        ("base_model:\nlicense: a/b", None),
        ("base_model_relation: a/b", None),
    ],
)
def test_the_base_model_of_a_card(tmp_path: Path, text: str, base: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{text}\n---\nbase_model: x/y\n")
    assert read_base_model(tmp_path) == base


def test_hostile_tensor_names_stay_on_one_line(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights["evil\n\x1b[31m" + "x" * 5000] = np.ones(4, np.float32)

    with pytest.raises(MlxedgeError) as caught:
        plan(tiny(tmp_path / "tiny", change), "gguf:q8_0")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
