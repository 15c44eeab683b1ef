"""Every error that mlxedge raises on purpose.

Each class is also the builtin that fits, so callers may catch either::

    MlxedgeError
    ├── UsageError(ValueError)                  an argument makes no sense; exit status 2
    ├── SourceError
    │   ├── SourceNotFoundError(FileNotFoundError)
    │   ├── AccessDeniedError(PermissionError)  gated or private repository
    │   ├── NetworkError(ConnectionError)       offline, or the Hub did not answer
    │   ├── CorruptFileError(ValueError)        truncated, lying or hostile file
    │   └── UnsafeFileError(ValueError)         pickle, remote code, path outside the folder
    ├── UnsupportedModelError(NotImplementedError)
    ├── UnsupportedEncodingError(NotImplementedError)
    ├── TokenizerError(ValueError)
    ├── BadWeightsError(ValueError)             NaN or infinite weights
    ├── OutputError(OSError)
    │   ├── OutputExistsError(FileExistsError)
    │   └── DiskFullError
    ├── BackendError(RuntimeError)              a backend is missing or unusable here
    └── TemplateError(ValueError)               a chat template failed or misbehaved

A message says what is wrong, where, and what to do about it, in one line.
"""

from __future__ import annotations

from pathlib import Path


class MlxedgeError(Exception):
    """Root of every deliberate error. ``exit_status`` is what the command line exits with."""

    exit_status = 1


class UsageError(MlxedgeError, ValueError):
    exit_status = 2


class SourceError(MlxedgeError):
    pass


class SourceNotFoundError(SourceError, FileNotFoundError):
    pass


class AccessDeniedError(SourceError, PermissionError):
    pass


class NetworkError(SourceError, ConnectionError):
    pass


class CorruptFileError(SourceError, ValueError):
    """A file contradicts its own format.

    ``path`` names the file, ``offset`` the byte at which reading failed (``None`` if unknown).
    """

    def __init__(self, path: str | Path, problem: str, offset: int | None = None) -> None:
        self.path = Path(path)
        self.problem = problem
        self.offset = offset
        where = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{path}: {problem}{where}")


class UnsafeFileError(SourceError, ValueError):
    pass


class UnsupportedModelError(MlxedgeError, NotImplementedError):
    pass


class UnsupportedEncodingError(MlxedgeError, NotImplementedError):
    pass


class TokenizerError(MlxedgeError, ValueError):
    pass


class BadWeightsError(MlxedgeError, ValueError):
    pass


class OutputError(MlxedgeError, OSError):
    pass


class OutputExistsError(OutputError, FileExistsError):
    pass


class DiskFullError(OutputError):
    pass


class BackendError(MlxedgeError, RuntimeError):
    pass


class TemplateError(MlxedgeError, ValueError):
    pass
