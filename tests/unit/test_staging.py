"""Nothing under the final name before it is complete; resume from the journal; clear errors."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mlxedge.errors import DiskFullError, OutputError, OutputExistsError
from mlxedge.outputs.staging import Staging, check_target, os_errors, partial_dir, write_at
from mlxedge.plan import DataFile, OutputPlan
from mlxedge.targets import parse_target


def plan(path: Path, target: str = "gguf:q8_0") -> OutputPlan:
    data = [DataFile("model.bin", b"head", 12, ((8, b"last"),))]
    return OutputPlan(parse_target(target), path, "label", [], data, {})


def line(name: str) -> dict[str, object]:
    return {"tensor": name, "squared_error": 0.0, "squared_weights": 1.0}


def test_a_file_appears_whole_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.gguf"
    stage = Staging(plan(path), "a")
    stage.write(0, 4, b"body")
    assert not path.exists()
    stage.publish(force=False)
    assert path.read_bytes() == b"headbodylast"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    made = plan(tmp_path / "m", "mlx:4bit")
    made.files["config.json"] = b"{}"
    stage = Staging(made, "a")
    stage.publish(force=False)
    assert sorted(p.name for p in made.path.iterdir()) == ["config.json", "model.bin"]


def test_the_same_plan_resumes_and_another_starts_clean(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    stage = Staging(plan(path), "a")
    stage.write(0, 4, b"done")
    stage.finish_tensor(line("t1"), 4)
    stage.keep()
    assert not path.exists()

    journal = partial_dir(path) / "journal.jsonl"
    with journal.open("a") as file:
        file.write('{"tensor": "t2", "squa')  # a kill in the middle of a line
    again = Staging(plan(path), "a")
    assert list(again.done) == ["t1"]
    assert again.resumed_tensors == 1
    again.finish_tensor(line("t3"), 4)
    again.keep()
    lines = [json.loads(text) for text in journal.read_text().splitlines()]
    assert [entry.get("tensor") for entry in lines] == [None, "t1", "t3"]

    other = Staging(plan(path), "b")
    assert other.done == {}
    other.publish(force=False)
    assert path.read_bytes() == b"head" + bytes(4) + b"last"


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    stage = Staging(plan(tmp_path / "m.gguf"), "a")
    with pytest.raises(OutputError, match="another run"):
        Staging(plan(tmp_path / "m.gguf"), "a")
    stage.keep()


def test_an_existing_target_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="--force"):
        check_target(path, force=False)
    check_target(path, force=True)
    stage = Staging(plan(path), "a")
    with pytest.raises(OutputExistsError):
        stage.publish(force=False)
    stage.keep()
    assert path.read_bytes() == b"old"


def test_force_replaces_files_and_folders(tmp_path: Path) -> None:
    file, folder = tmp_path / "m.gguf", tmp_path / "m"
    file.write_bytes(b"old")
    folder.mkdir()
    (folder / "stale").write_bytes(b"old")
    Staging(plan(file), "a").publish(force=True)
    Staging(plan(folder, "mlx:4bit"), "a").publish(force=True)
    assert file.read_bytes().startswith(b"head")
    assert [p.name for p in folder.iterdir()] == ["model.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gguf"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(OutputError, match="is a file"):
        check_target(tmp_path / "f" / "m.gguf", force=False)


def test_system_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="free some space"), os_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="Read-only"), os_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")


def test_write_at_writes_everything(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    try:
        write_at(fd, b"abc", 2)
    finally:
        os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"\0\0abc"
