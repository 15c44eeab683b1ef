"""The shape of the code: imports go one way, packages are complete, nothing loads too early."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Each room may import from rooms above it, and from itself.
LAYERS = (
    {"errors", "version", "gguf_values", "texts"},
    {"encodings"},
    {"ops", "grids", "targets", "recipes", "sampling", "tokenizer"},
    {"accel", "fallback"},
    {"models"},
    {"sources", "plan"},
    {"outputs", "engines", "prepare", "layers"},
    {"report"},
    {"record", "calibration"},
    {"guidance"},
    {"pipeline", "generate"},
    {"conversion", "evaluate"},
    {"inspect", "demo"},
    {"bench"},
    {"cli"},
    {"__main__", "__init__"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
#: Reached through ``ops`` only.
BACKENDS = {"accel", "fallback"}
#: The one name that each backend's room is known by, as text, in ``ops``.
LOADER = "ops"


def modules() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module."""
    for file in sorted((ROOT / "mlxedge").rglob("*.py")):
        yield file.relative_to(ROOT / "mlxedge").parts[0].removesuffix(".py"), file
    for file in sorted((ROOT / "fallback").glob("*.py")):
        yield "fallback", file


def imports(file: Path, at_runtime: bool = True) -> Iterator[str]:
    """The rooms of mlxedge that a module imports, but for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if at_runtime and node in skipped:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "mlxedge":
                names = [f"mlxedge.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("mlxedge."):
                yield name.split(".")[1]


def test_imports_go_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {target}"
        for room, file in modules()
        for target in imports(file)
        if target != room and RANK[target] >= RANK[room]
    ]
    assert wrong == []


def test_backends_are_reached_through_ops_only() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {target}"
        for room, file in modules()
        for target in imports(file, at_runtime=False)
        if target in BACKENDS and target != room
    ]
    assert wrong == []
    mentions = {
        room
        for room, file in modules()
        if room not in BACKENDS
        and any(f'"mlxedge.{b}' in file.read_text(encoding="utf-8") for b in BACKENDS)
    }
    assert mentions == {LOADER}


def test_fallback_is_never_imported_by_its_plain_name() -> None:
    files = [
        p for d in ("mlxedge", "fallback", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [n for n in names if n.split(".")[0] == "fallback"], file


def test_every_package_is_packed() -> None:
    """One that is left out of the list is left out of the wheel, in silence."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "mlxedge").rglob("__init__.py")
    }
    assert set(listed) == found | {"mlxedge.fallback"}


@pytest.mark.parametrize(
    "statement",
    ["import mlxedge", "from mlxedge.cli import main; main(['--help'])", "import mlxedge.sources"],
)
def test_nothing_heavy_is_loaded_early(statement: str) -> None:
    code = (
        "import sys\n"
        f"try:\n    {statement}\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'mlx', 'numba', 'rich', 'huggingface_hub', 'tokenizers', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_library_never_prints_and_never_exits() -> None:
    for room, file in modules():
        if room in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "sys.exit", "exit", "quit"), f"{file}: {called}"


def test_the_public_names_exist() -> None:
    import mlxedge

    for name in mlxedge.__all__:
        assert getattr(mlxedge, name) is not None
    # The function must win over a module of the same name, whichever is imported first.
    import mlxedge.pipeline

    assert callable(mlxedge.convert)
    assert not hasattr(mlxedge, "torch")
