"""Calibrate a model into an imatrix file, and Hessians beside it, so that a kill costs a layer.

Beside an output ``NAME`` stands ``.NAME.partial/`` while it is made: ``run.json``, which tells what
is run on what; in ``layers/`` the statistics of each finished layer; ``states-K.bin``, the hidden
states after K layers; and a lock. The next run of the same goes on after the last finished layer,
one of anything else starts clean. The file, and the folder of Hessians, get their final names at
the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlxedge.calibration.collect import as_calibration, collect_head, collect_layer
from mlxedge.calibration.imatrix import write_imatrix
from mlxedge.calibration.states import restore_states, states_files, write_states
from mlxedge.calibration.store import (
    hessian_folder,
    layer_file,
    model_fingerprint,
    read_layer,
    write_layer,
)
from mlxedge.calibration.texts import Sample, sample
from mlxedge.errors import MlxedgeError, OutputError
from mlxedge.layers import LayerRunner, ProgressHook
from mlxedge.models.shape import shape_of
from mlxedge.outputs.staging import check_target, lock_partial, os_errors, partial_dir
from mlxedge.prepare import check_weights, prepare
from mlxedge.version import VERSION

if TYPE_CHECKING:
    from mlxedge.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class CalibrationReport:
    """What was made: ``path``, and ``hessians`` if asked for; on which text; and ``resumed``, how
    many layers an earlier run had finished."""

    path: Path
    hessians: Path | None
    text: str
    text_sha256: str
    tokens: int
    context: int
    bos: bool
    layers: int
    resumed: int
    nbytes: int


def calibrate_to_file(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    text: str | None = None,
    text_name: str = "text",
    tokens: int | Literal["all"] | None = None,
    context: int | None = None,
    hessians: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: ProgressHook | None = None,
) -> CalibrationReport:
    """Run a text through ``checkpoint``, layer by layer from disk, and write the importance of the
    inputs of its matrices to ``out``, an imatrix file as llama-imatrix writes it: GGUF, or the
    older format if its name ends in .dat.

    ``text``, ``tokens`` and ``context`` are as for :func:`mlxedge.calibration.texts.sample`. With
    ``hessians`` a folder ``out.hessians`` is left beside it, for ``quality="best"``. Memory holds
    one layer, its statistics and the hidden states, up to 1 GiB of them.

    Raises OutputExistsError if something is at ``out`` and not ``force``, OutputError or
    DiskFullError if it cannot be written, UnsupportedModelError and CorruptFileError for a model
    that cannot be run, and what ``sample`` and ``LayerRunner`` do.
    """
    out = Path(out)
    spec, checkpoint = prepare(checkpoint)
    check_weights(spec, checkpoint)
    if out.is_dir():
        raise OutputError(f"{out} is a folder: -o takes the name of the file")
    taken = sample(
        checkpoint, text, name=text_name, tokens=tokens, context=context, varied=hessians
    )
    with _Run(out, checkpoint, taken, hessians, force) as run:
        resumed = run.done
        if not run.complete:
            _collect(run, checkpoint, taken, hessians, threads, progress)
            found = (one for path in run.layer_files() for one in read_layer(path, False)[0])
            with os_errors(out):
                legacy = out.suffix == ".dat"
                made = as_calibration(found, taken)
                write_imatrix(run.made, made, spec, legacy, checkpoint.config)
        run.publish()
    folder = hessian_folder(out) if hessians else None
    files = [out, *(folder.iterdir() if folder else [])]
    return CalibrationReport(
        path=out,
        hessians=folder,
        text=taken.text,
        text_sha256=taken.sha256,
        tokens=taken.tokens,
        context=taken.context,
        bos=taken.bos,
        layers=run.layers,
        resumed=resumed,
        nbytes=sum(file.stat().st_size for file in files),
    )


def _collect(
    run: _Run,
    checkpoint: Checkpoint,
    taken: Sample,
    hessians: bool,
    threads: int | None,
    progress: ProgressHook | None,
) -> None:
    with LayerRunner(checkpoint, taken.ids, threads, folder=run.dir) as runner:
        if run.done:
            with os_errors(run.out):
                restore_states(run.dir, runner, run.done)
        while runner.done < runner.shape.layers:
            layer = runner.done
            found = collect_layer(runner, hessians, progress)
            with os_errors(run.out):
                write_layer(run.layer(layer), found, run.about)
                write_states(run.dir, runner)
            del found
        head = collect_head(runner, hessians)
        with os_errors(run.out):
            write_layer(run.layer(None), head, run.about)
        if progress:
            total = runner.shape.layers * runner.sequences
            progress(total, total, "")


class _Run:
    """The half-finished state of a calibration. ``done`` layers are there from an earlier run, or
    all is, and only the final names are missing (``complete``)."""

    def __init__(
        self, out: Path, checkpoint: Checkpoint, taken: Sample, hessians: bool, force: bool
    ) -> None:
        self.out, self.dir = out, partial_dir(out)
        self.made = self.dir / f"made{out.suffix}"
        self.layers: int = checkpoint.config["num_hidden_layers"]
        self.done = 0
        self._published = False
        self._layers_dir = self.dir / "layers"
        self._hessians = hessians
        self._states_bytes = 4 * taken.ids.size * shape_of(checkpoint.config).stream
        self.about = {
            "model": model_fingerprint(checkpoint, taken.context),
            "text": taken.text,
            "text_sha256": taken.sha256,
            "tokens": str(taken.tokens),
            "context": str(taken.context),
        }
        ids = hashlib.sha256(taken.ids.tobytes()).hexdigest()
        own = {"mlxedge": VERSION, "ids": ids, "hessians": str(hessians)}
        self._key = self.about | own
        check_target(out, force)
        # A kill between the two last steps leaves Hessians of ours under their final name.
        half_published = self.complete and not self._layers_dir.exists()
        if not half_published:
            check_target(hessian_folder(out), force)

    @property
    def complete(self) -> bool:
        return self.made.is_file() and self._same()

    def layer(self, layer: int | None) -> Path:
        return self._layers_dir / layer_file(layer)

    def layer_files(self) -> list[Path]:
        return [self.layer(layer) for layer in [*range(self.layers), None]]

    def __enter__(self) -> _Run:
        with os_errors(self.out):
            self._lock = lock_partial(self.dir, self.out)
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """What is done is kept, but for a failure that the next run would meet again. The lock is
        released last: another run that has it may fill the folder."""
        again = isinstance(error, MlxedgeError) and not isinstance(error, OutputError)
        if self._published or again or not self._kept():
            shutil.rmtree(self.dir, ignore_errors=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            self.dir.rmdir()  # where an open lock could not be removed

    def _same(self) -> bool:
        try:
            key = json.loads((self.dir / _KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(key == self._key)

    def _open(self) -> None:
        replaced, folder = self.dir / _REPLACED, hessian_folder(self.out)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        if not self._same():
            for stale in self.dir.iterdir():
                if stale.name != "lock":
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            (self.dir / _KEY).write_text(json.dumps(self._key), encoding="utf-8")
        if self.complete:
            self.done = self.layers
            return
        self._layers_dir.mkdir(exist_ok=True)
        self.done = next(iter(states_files(self.dir, self._states_bytes)), 0)
        if not all(self.layer(layer).is_file() for layer in range(self.done)):
            self.done = 0

    def publish(self) -> None:
        """Give everything its final name; begun again, it does what is left. Hessians that stood
        there are of the file that is replaced, so they go with it."""
        with os_errors(self.out):
            with self.made.open("rb+") as file:
                os.fsync(file.fileno())
            if self._layers_dir.exists():
                folder = hessian_folder(self.out)
                if folder.exists():
                    folder.rename(self.dir / _REPLACED)
                if self._hessians:
                    self._layers_dir.rename(folder)
            self.made.replace(self.out)
            self._published = True

    def _kept(self) -> bool:
        return any(self.dir.glob("states-*.bin")) or self.made.exists()


_KEY, _REPLACED = "run.json", "replaced"
