"""Roles and chat templates as gguf-py, on which llama.cpp's converter rests, writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from oracles.vocabularies import byte_level_files

from mlxedge.tokenizer import TokenizerSpec, to_gguf

NAMED = [
    {"name": "default", "template": "main {{ messages }}"},
    {"name": "tool_use", "template": "tools {{ tools }}"},
    {"name": "r-a.g é", "template": "documents"},
]
NAMES = "tokenizer.chat_templates"
FOLDERS: dict[str, dict[str, Any]] = {
    "none": {},
    "one": {"tokenizer_config.json": {"chat_template": "only"}},
    "several": {"tokenizer_config.json": {"chat_template": NAMED}},
    "without default": {"tokenizer_config.json": {"chat_template": NAMED[1:]}},
    "file": {"chat_template.jinja": "file"},
    "json file": {"chat_template.json": json.dumps({"chat_template": "processor"})},
    "more files": {
        "chat_template.jinja": "file",
        "additional_chat_templates/tool_use.jinja": "tools",
    },
    "roles": {
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>"},
            "pad_token": "<|endoftext|>",
            "add_bos_token": True,
            "add_eos_token": False,
        }
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_metadata_is_gguf_pys(name: str, tmp_path: Path) -> None:
    files = byte_level_files()
    settings = {**json.loads(files["tokenizer_config.json"]), "add_bos_token": False}
    for path, made in FOLDERS[name].items():
        if isinstance(made, dict):
            settings |= made
        else:
            files[path] = made.encode()
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    for path, raw in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(raw)
    writer = gguf.GGUFWriter(None, "llama")
    gguf.SpecialVocab(tmp_path, load_merges=True).add_to_gguf(writer)
    theirs = {key: value.value for key, value in writer.kv_data[0].items() if "tokenizer" in key}
    ours = {
        key: np.asarray(value.value, object).tolist() if value.kind == "array" else value.value
        for key, value in to_gguf(TokenizerSpec(files), {}).items()
    }
    for found in (theirs, ours):  # gguf-py keeps the names in a set
        found[NAMES] = sorted(found.get(NAMES, ()))
    assert theirs
    assert {key: ours.get(key) for key in theirs} == theirs
    templates = {key for key in ours if "chat_template" in key}
    assert templates == {key for key in theirs if "chat_template" in key}
