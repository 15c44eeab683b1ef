"""Tokenizer files made from GGUF, and chat templates, as transformers sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracles.hard_text import HARD
from oracles.vocabularies import byte_level_files, byte_level_metadata, sentencepiece_metadata
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlxedge.gguf_values import Metadata
from mlxedge.sources.gguf import read_gguf
from mlxedge.tokenizer import Tokenizer, TokenizerSpec, from_gguf, load

MESSAGES = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the capital of <France>? 🗼"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And of Japan?"},
]


def both(spec: TokenizerSpec, folder: Path) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    for name, raw in spec.files.items():
        (folder / name).write_bytes(raw)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load(spec), AutoTokenizer.from_pretrained(folder)


def metadata_of(name: str, smollm2: Path) -> Metadata:
    if name == "smollm2":
        return read_gguf(smollm2).metadata
    return sentencepiece_metadata() if name == "llama" else byte_level_metadata(name, add_bos=True)


@pytest.mark.parametrize("name", ["smollm2", "llama", "qwen2", "llama-bpe", "default"])
def test_files_from_gguf_load_in_transformers(name: str, smollm2: Path, tmp_path: Path) -> None:
    ours, theirs = both(from_gguf(metadata_of(name, smollm2)), tmp_path)
    for text in HARD:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("prompt", [True, False])
def test_the_chat_template_of_a_real_model(prompt: bool, smollm2: Path, tmp_path: Path) -> None:
    ours, theirs = both(from_gguf(read_gguf(smollm2).metadata), tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert ours.render_chat(MESSAGES, add_generation_prompt=prompt) == expected


TEMPLATES = {
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "whitespace": "{% for m in messages %}\n  {%- if loop.first %}\n<{{ m.role }}>\n  {% endif %}\n"
    "{{ m['content'] | trim }}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% continue %}{% endif %}"
    "{{ m.role }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro show(m, end='!') -%}[{{ m.role }}: {{ m.content }}]{{ end }}{%- endmacro %}"
    "{% for m in messages %}{{ show(m) ~ show(m, end='?') }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') | upper }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ 'a,b,c'.split(',') | reverse | join('-') }}{{ '%s=%5.2f' % ('x', 1.5) }}"
    "{{ '{:>8}|{!r}'.format('x', 'y') }}{{ 'a\\nb' | indent(4, first=true) }}"
    "{{ 'aXbX' | replace('X', 'yy') }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [3, 1] | sort | sum }}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{{ nothing | default('x') }}"
    "{{ tools is none }}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].content }}"
    "{{ messages[-1]['role'] }}",
    "tuples": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{% set a, b = 1, 2 %}"
    "{{ a + b }}{{ (1, 2) }}{{ [1, [2]] }}{{ {'k': none} }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}",
    "set block": "{% set text %}{% for m in messages %}{{ m.content }}\n{% endfor %}{% endset %}"
    "{{ text }}",
    "special tokens": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    "safe": "{{ '<b>' | safe }}{{ '<b>' | e }}{{ '<b>' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, tmp_path: Path) -> None:
    files = byte_level_files(config={"chat_template": TEMPLATES[name]})
    ours, theirs = both(TokenizerSpec(files), tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(MESSAGES) == expected
    assert expected
