"""Pages that scripts write are current: what commands say of themselves, and all architectures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mlxedge.models import known_model_types

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_commands", DOCS / "make_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(maker: ModuleType) -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert maker.update(page) == page, "run: python docs/make_commands.py"


def test_a_command_without_a_block_is_noticed(maker: ModuleType) -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    with pytest.raises(RuntimeError, match="the page shows"):
        maker.update(page.replace("<!-- help: bench -->", ""))


def test_the_page_of_architectures_has_all_of_them() -> None:
    page = (DOCS / "architectures.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(known_model_types()), "run: python docs/make_architectures.py"
