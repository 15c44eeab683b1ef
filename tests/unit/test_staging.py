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


def test_a_journal_without_its_data_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    stage = Staging(plan(path), "a")
    stage.finish_tensor(line("t1"), 4)
    stage.keep()
    (partial_dir(path) / "data" / "model.bin").unlink()
    assert Staging(plan(path), "a").done == {}


@pytest.mark.parametrize("target", ["gguf:q8_0", "mlx:4bit"])
def test_a_kill_while_publishing_leaves_no_journal(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the data got its name and before the rest was cleared away."""
    path = tmp_path / "m.gguf"
    stage = Staging(plan(path, target), "a")
    stage.write(0, 4, b"done")
    stage.finish_tensor(line("t1"), 4)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    stage.publish(force=False)
    monkeypatch.undo()
    assert partial_dir(path).exists()
    again = Staging(plan(path, target), "a")
    assert again.done == {}
    again.keep()


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    made = plan(tmp_path / "m", "mlx:4bit")
    made.path.mkdir()
    (made.path / "old.json").write_bytes(b"{}")
    stage = Staging(made, "a")
    made.path.rename(stage.dir / "replaced")  # and there the run was killed
    stage.keep()
    again = Staging(made, "another plan")
    assert (made.path / "old.json").exists()
    again.keep()


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(tmp_path / "m", "mlx:4bit")
    made.path.mkdir()
    (made.path / "old.json").write_bytes(b"{}")
    stage = Staging(made, "a")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Input/output"):
        stage.publish(force=True)
    stage.keep()
    assert (made.path / "old.json").exists()
    Staging(made, "b").keep()  # the lock is free again


def test_a_folder_with_more_than_a_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).write_bytes(b"")
    check_target(tmp_path / "m", force=True)
    (tmp_path / "m" / "thesis.tex").write_bytes(b"")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        check_target(tmp_path / "m", force=True)


def test_names_and_links_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"):
        check_target(tmp_path / ("x" * 240), force=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link to nothing"):
        check_target(tmp_path / "link", force=False)


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    stage = Staging(plan(tmp_path / "m.gguf"), "a")
    stage.discard()
    assert list(tmp_path.iterdir()) == []
