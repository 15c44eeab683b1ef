"""The program around the commands: lazy loading, errors, exit statuses, JSON, ui."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mlxedge import errors
from mlxedge.cli import COMMANDS, main, ui
from mlxedge.version import VERSION

HEAVY = {"numpy", "rich", "mlx", "numba", "tokenizers", "huggingface_hub", "jinja2", "ml_dtypes"}

#: Runs the program, then lists the modules that it loaded.
LOADED = """
import sys
from mlxedge.cli import main
try:
    main()
finally:
    print("loaded", *sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"]])
def test_the_program_loads_no_command(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=False
    )
    loaded = done.stderr.split("loaded ")[1].split()
    assert not HEAVY & set(loaded)
    assert not [m for m in loaded if m.startswith("mlxedge.cli.")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, name, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stderr.split("loaded ")[1].split())


def test_import_of_the_package_loads_nothing() -> None:
    code = "import sys, mlxedge; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not (HEAVY | {"click"}) & set(loaded.stdout.split())


def test_help_lists_every_command_and_each_exists() -> None:
    help_text = CliRunner().invoke(main, ["--help"]).output
    for name, (place, summary) in COMMANDS.items():
        assert name in help_text
        assert summary in " ".join(help_text.split())
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        assert command.help, f"{name} does not say what it does"


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"mlxedge {VERSION}\n"


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
def failing(name: str, as_json: bool) -> None:
    """Fail as told."""
    if name == "corrupt":
        raise errors.CorruptFileError("model.gguf", "bad\x1b[31m magic", 4)
    if name == "disk":
        raise errors.DiskFullError("the disk is full")
    if name == "usage":
        raise errors.UsageError("that makes\nno sense")
    if name == "system":
        raise PermissionError(13, "Permission denied", "/nowhere")
    if name == "memory":
        raise MemoryError
    if name == "interrupt":
        raise KeyboardInterrupt
    if name == "bug":
        raise ZeroDivisionError("by zero")


@pytest.fixture
def with_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("failing_command")
    module.command = failing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "fail", ("failing_command:command", "Fail."))


CASES = [
    (
        "corrupt",
        1,
        "CorruptFileError",
        "error: model.gguf: bad\\x1b[31m magic at byte 4; download or copy the file again",
    ),
    ("disk", 1, "DiskFullError", "error: the disk is full"),
    ("usage", 2, "UsageError", "error: that makes no sense"),
    ("system", 1, "PermissionError", "error: /nowhere: Permission denied"),
    (
        "memory",
        1,
        "MemoryError",
        "error: out of memory: close other programs, or use fewer --threads",
    ),
    ("interrupt", 130, "KeyboardInterrupt", "interrupted"),
]


@pytest.mark.usefixtures("with_failing")
@pytest.mark.parametrize(("name", "status", "kind", "line"), CASES)
def test_an_error_is_one_line(name: str, status: int, kind: str, line: str) -> None:
    done = CliRunner().invoke(main, ["fail", name])
    assert done.exit_code == status
    assert done.stdout == ""
    assert done.stderr.strip() == line


@pytest.mark.usefixtures("with_failing")
@pytest.mark.parametrize(("name", "status", "kind", "line"), CASES)
def test_with_json_the_error_is_json_too(name: str, status: int, kind: str, line: str) -> None:
    done = CliRunner().invoke(main, ["fail", name, "--json"])
    assert done.exit_code == status
    message = line.removeprefix("error: ")
    assert json.loads(done.stdout) == {"error": message, "kind": kind}
    assert done.stderr.strip() == line


@pytest.mark.usefixtures("with_failing")
def test_a_bug_asks_to_be_reported_and_debug_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(main, ["fail", "bug"])
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "error: internal error: ZeroDivisionError: by zero; please report"
    )
    assert len(done.stderr.splitlines()) == 1
    for arguments, environment in ([["--debug"], {}], [[], {"MLXEDGE_DEBUG": "1"}]):
        done = CliRunner().invoke(main, [*arguments, "fail", "bug"], env=environment)
        assert done.exit_code == 1
        assert "Traceback (most recent call last)" in done.stderr
        assert 'raise ZeroDivisionError("by zero")' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nonsense"], "No such option"),
        (["nonsense"], "no command 'nonsense': choose from convert, inspect"),
        (["--debug"], "Missing command"),
        (["fetch"], "Missing argument 'REPO'"),
        (["inspect", "a", "b"], "unexpected extra argument"),
        (["generate", "m", "hi", "--temp", "-1"], "Invalid value for '--temp'"),
        (["bench"], "Missing argument"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments: list[str], problem: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert problem in line
    assert "--help)" in line
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(done.stdout)["kind"] == "UsageError"


def test_json_after_two_dashes_is_no_option() -> None:
    done = CliRunner().invoke(main, ["fetch", "--", "--json"])
    assert done.exit_code == 1
    assert done.stdout == ""


def test_a_closed_pipe_is_quiet(smollm2: Path) -> None:
    command = f'"{sys.executable}" -m mlxedge inspect "{smollm2}" --full --json | head -c 1'
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.stdout == b"{"
    assert done.stderr == b""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_ends_with_130() -> None:
    code = (
        "import os, signal, threading\n"
        "from mlxedge.cli import main\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", "nowhere", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.wait(60) == 130
        out, err = process.communicate()
        assert (out, err.split()) == (b"", [b"interrupted"])
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (98_148_544, "98.1 MB"), (999_600, "1.00 MB"),
     (4_920_000_000, "4.92 GB"), (140e9, "140 GB"), (2.5e12, "2.50 TB")],
)  # fmt: skip
def test_sizes(nbytes: float, text: str) -> None:
    assert ui.size(nbytes) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (1000, "1.0 k"), (134_515_008, "134.5 M"), (999_960, "1.0 M"), (7.24e9, "7.2 B")],
)
def test_counts(number: float, text: str) -> None:
    assert ui.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (187, "3:07 min"), (3720, "1:02 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert ui.duration(seconds) == text


def test_a_table_aligns_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ui.table(["name", "size", "note"], [["a" * 90, "1.00 MB", ""], ["b", "900 B", "x"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "name" + " " * 86 + "     size  note",
        "a" * 90 + "  1.00 MB",
        "b" + " " * 89 + "    900 B  x",
    ]


def test_nothing_steers_a_terminal() -> None:
    assert ui.printable("a\x1b[2Jb\nc\udcff é") == "a\\x1b[2Jb\\nc\\udcff é"


def test_progress_is_silent_off_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with ui.progress("converting", unit="weights") as update:
        update(1, 2, "a")
    with ui.progress_beside("converting", "weights", "calibrating") as updates:
        for update in updates:
            update(1, 2, "a")
    with ui.file_progress() as report:
        report("model.safetensors", 5, 10)
    assert capfd.readouterr() == ("", "")
    assert "rich" not in sys.modules or not sys.stderr.isatty()


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("color", [True, False])
def test_progress_on_a_terminal(color: bool) -> None:
    """Drawn on stderr, with percentage, speed and time left; NO_COLOR takes the colours away."""
    import pty

    code = (
        "import time\n"
        "from mlxedge.cli import ui\n"
        "with ui.progress('converting', unit='weights') as update:\n"
        "    for i in range(8):\n"
        "        update(i * 1000, 8000, f'layer {i}'); time.sleep(0.15)\n"
        "with ui.progress_beside('quantizing', 'weights', 'calibrating') as (update, beside):\n"
        "    time.sleep(0.3); update(0, 8000, ''); beside(1, 2, 'layer 9'); time.sleep(0.3)\n"
        "    beside(2, 2, ''); time.sleep(0.3)\n"
        "with ui.file_progress() as report:\n"
        "    for i in range(5):\n"
        "        report('model.safetensors', i * 10**6, 8 * 10**6); time.sleep(0.15)\n"
    )
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "120"} | (
        {} if color else {"NO_COLOR": "1"}
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    out, _ = process.communicate()
    os.close(ours)
    text = drawn.decode()
    assert process.returncode == 0, text
    assert out == b""
    for part in ("converting", "weights/s", "left", "layer 3", "model.safetensors", "MB/s"):
        assert part in text
    assert "calibrating" in text.partition("quantizing")[2]
    assert "layer 9" in text
    assert "calibrating" not in text.partition("quantizing")[0]
    assert ("\x1b[38;5" in text or "\x1b[3" in text) == color
