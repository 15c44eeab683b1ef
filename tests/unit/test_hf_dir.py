"""Hugging Face folders: what is read, which file a tensor comes from, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxedge.encodings import BF16, F16, F32
from mlxedge.errors import (
    CorruptFileError,
    MlxedgeError,
    SourceNotFoundError,
    UnsafeFileError,
    UnsupportedEncodingError,
    UsageError,
)
from mlxedge.sources import fetch, open_source

CONFIG = {"model_type": "llama", "hidden_size": 8}
TENSORS = {
    "model.embed_tokens.weight": np.arange(32, dtype=np.float32).reshape(4, 8),
    "model.layers.0.mlp.down_proj.weight": np.ones((8, 8), np.float16),
    "model.norm.weight": np.ones(8, ml_dtypes.bfloat16),
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-LM"
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    """The folder's tensors in two files; ``weight_map`` replaces the true index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = list(TENSORS)
    owner = {names[0]: SHARDS[0], names[1]: SHARDS[1], names[2]: SHARDS[1]}
    for shard in SHARDS:
        save_file({n: TENSORS[n] for n in names if owner[n] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map or owner}
    write_json(folder / "model.safetensors.index.json", index)


def same_tensors(folder: Path) -> None:
    with open_source(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        for name, array in TENSORS.items():
            got = checkpoint.tensors[name].read()["weight"]
            assert got.dtype == array.dtype
            assert np.array_equal(got.reshape(array.shape), array)


def test_a_folder_with_one_file(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "chat_template.jinja").write_bytes(b"{{ x }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_bytes(b"tool")
    (folder / "README.md").write_text("---\nlicense: 'mit'\n---\nlicense: none of this\n")
    same_tensors(folder)
    with open_source(str(folder)) as checkpoint:
        assert checkpoint.name == "Tiny-LM"
        assert checkpoint.config == CONFIG
        assert checkpoint.generation_config == {"eos_token_id": 2}
        assert checkpoint.license == "mit"
        assert checkpoint.tokenizer is not None
        assert checkpoint.tokenizer.files == {
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"{{ x }}",
            "additional_chat_templates/tool.jinja": b"tool",
        }
        assert [checkpoint.tensors[name].encoding for name in TENSORS] == [F32, F16, BF16]
        origin = checkpoint.origin
        assert (origin.kind, origin.path, origin.repo) == ("hf", folder, None)
        assert {p.name for p in origin.files} >= {"config.json", "model.safetensors"}
        assert all(p.is_file() for p in origin.files)


def test_no_tokenizer_and_no_licence(folder: Path) -> None:
    with open_source(folder) as checkpoint:
        assert checkpoint.tokenizer is None
        assert checkpoint.license is None
        assert checkpoint.generation_config == {}


def test_shards_and_index(folder: Path) -> None:
    write_shards(folder)
    same_tensors(folder)
    (folder / "model.safetensors.index.json").unlink()
    same_tensors(folder)


def test_any_single_file_will_do(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    same_tensors(folder)


def test_an_unlisted_tensor_of_a_shard_is_read_too(folder: Path) -> None:
    names = list(TENSORS)
    write_shards(folder, {names[0]: SHARDS[0], names[1]: SHARDS[1]})
    same_tensors(folder)


def test_the_index_decides_between_two_copies(folder: Path) -> None:
    write_shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stale = {name: array + 1 for name, array in TENSORS.items()}
    first = {n: TENSORS[n] if index["weight_map"][n] == SHARDS[0] else stale[n] for n in TENSORS}
    save_file(first, folder / SHARDS[0])
    same_tensors(folder)


def test_a_snapshot_in_the_cache_is_named_after_its_repository(folder: Path) -> None:
    snapshot = folder.parent / "models--org--Some-LM" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    with open_source(snapshot) as checkpoint:
        assert checkpoint.name == "Some-LM"


def test_links_out_of_the_folder_are_fine(folder: Path) -> None:
    """The Hub's cache is made of them."""
    blob = folder.parent / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    same_tensors(folder)


def test_unsupported_code_is_not_run(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    write_json(
        folder / "config.json", CONFIG | {"auto_map": {"AutoModel": "modeling_evil.EvilModel"}}
    )
    same_tensors(folder)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _put(name: str, content: bytes) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return put


def _index(weight_map: Any) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        write_shards(folder)
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})

    return put


def _shards_then(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        write_shards(folder)
        change(folder)

    return both


def _without_weights(*extra: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in extra:
            (folder / name).write_bytes(b"\x80\x04.")

    return change


def _unnumbered(folder: Path) -> None:
    save_file({"a": np.ones(1, np.float32)}, folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")


def _in_two(folder: Path) -> None:
    write_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / SHARDS[0], folder / SHARDS[1])


A = "model.embed_tokens.weight"
BAD: dict[str, tuple[Callable[[Path], None], type[MlxedgeError], str]] = {
    "no-config": (_remove("config.json"), SourceNotFoundError, "no config.json"),
    "config-cut": (_put("config.json", b'{"model_type": '), CorruptFileError, "byte 15"),
    "config-utf8": (_put("config.json", b'{"a": "\xff"}'), CorruptFileError, "UTF-8"),
    "config-list": (_put("config.json", b"[]"), CorruptFileError, "not a JSON object"),
    "config-deep": (_put("config.json", b'{"a":' * 99_999), CorruptFileError, "not sane JSON"),
    "generation": (_put("generation_config.json", b"x"), CorruptFileError, "generation_config"),
    "no-weights": (_without_weights(), SourceNotFoundError, "no safetensors"),
    "pickle": (_without_weights("pytorch_model.bin"), UnsafeFileError, "pytorch_model.bin"),
    "pickle-pth": (_without_weights("consolidated.00.pth"), UnsafeFileError, "safetensors version"),
    "gguf": (_without_weights("m-Q4_0.gguf"), SourceNotFoundError, "m-Q4_0.gguf"),
    "two-files": (_unnumbered, SourceNotFoundError, "a.safetensors, b.safetensors"),
    "shard-missing": (_shards_then(_remove(SHARDS[1])), SourceNotFoundError, SHARDS[1]),
    "number-missing": (
        _shards_then(
            lambda f: (
                [(f / n).unlink() for n in (SHARDS[0], "model.safetensors.index.json")] and None
            )
        ),
        SourceNotFoundError,
        SHARDS[0],
    ),
    "index-tensor": (_index({A: SHARDS[1]}), CorruptFileError, f"{SHARDS[1]}: tensor {A}"),
    "index-empty": (_index({}), CorruptFileError, "weight_map"),
    "index-list": (_index([1]), CorruptFileError, "weight_map"),
    "index-number": (_index({A: 3}), CorruptFileError, "weight_map"),
    "index-parent": (_index({A: "../x.safetensors"}), UnsafeFileError, "'../x.safetensors'"),
    "index-inner": (_index({A: "a/../../x.safetensors"}), UnsafeFileError, "outside"),
    "index-absolute": (_index({A: "/etc/x.safetensors"}), UnsafeFileError, "outside"),
    "index-drive": (_index({A: "C:x.safetensors"}), UnsafeFileError, "outside"),
    "index-backslash": (_index({A: "..\\x.safetensors"}), UnsafeFileError, "outside"),
    "index-nul": (_index({A: "\0.safetensors"}), UnsafeFileError, "outside"),
    "index-pickle": (_index({A: "pytorch_model.bin"}), UnsafeFileError, "never pickles"),
    "in-two-shards": (_in_two, CorruptFileError, f"{A} is also in {SHARDS[0]}"),
    "header": (_put("model.safetensors", b"\0" * 8), CorruptFileError, "not JSON"),
    "method": (
        _put("config.json", b'{"quantization_config": {"quant_method": "hqq"}}'),
        UnsupportedEncodingError,
        "hqq",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(folder: Path, case: str) -> None:
    change, error, words = BAD[case]
    change(folder)
    with pytest.raises(error) as caught:
        open_source(folder)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("model.safetensors", UsageError, "give its folder"),
        ("pytorch_model.bin", UnsafeFileError, "pickle"),
        ("notes.txt", CorruptFileError, "not a GGUF file"),
    ],
)
def test_a_file_that_is_not_a_model(
    folder: Path, spec: str, error: type[MlxedgeError], words: str
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "notes.txt").write_bytes(b"some notes")
    with pytest.raises(error, match=words):
        open_source(folder / spec)


@pytest.mark.parametrize("spec", ["nothing-here", "./nothing", "a/b/c", "/no/such/folder", ""])
def test_neither_a_path_nor_a_hub_id(spec: str, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SourceNotFoundError, match="Hub id"):
        open_source(spec)
    with pytest.raises(SourceNotFoundError, match="Hub id"):
        fetch(spec)


def test_a_path_is_never_asked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "org" / "name")
