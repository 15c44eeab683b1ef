"""Byte ranges of a file on the Hub, by the client's own HTTP session."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from mlxedge.errors import MlxedgeError, NetworkError
from mlxedge.sources.hub import translated
from mlxedge.sources.hub_download import Cancelled, TransportError
from mlxedge.version import VERSION

#: Requests in a row that may bring nothing.
TRIES = 6
#: Seconds before a request is made again; doubled each time, up to the longest.
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
#: A server that is busy may say for how long, up to this many seconds.
_LONGEST_ASKED = 300.0
#: What a server answers that may answer otherwise the next time.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class HubPath:
    """A file of ``repo`` at ``commit``."""

    repo: str
    commit: str
    name: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"

    @contextlib.contextmanager
    def request(self, start: int, end: int) -> Iterator[Any]:
        """The answer to a request for bytes ``start:end``, whatever of them it holds.

        Raises the client's errors.
        """
        headers = {
            **build_hf_headers(library_name="mlxedge", library_version=VERSION),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        with get_session().stream(
            "GET",
            hf_hub_url(self.repo, self.name, revision=self.commit),
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
        ) as response:
            hf_raise_for_status(response)
            yield response

    def pieces(
        self,
        start: int,
        end: int,
        stop: threading.Event,
        check: Callable[[Any], None] = lambda response: None,
    ) -> Iterator[bytes]:
        """Bytes ``start:end`` as they come. What breaks off is asked for again from there.
        ``check`` may refuse an answer by an error of ours.

        Raises Cancelled once ``stop`` is set, NetworkError after ``TRIES`` requests without a byte
        of the range, and what says that the file must not be read.
        """
        failed, at = 0, start
        while at < end:
            before, asked_to_wait = at, 0.0
            try:
                with self.request(at, end) as response:
                    check(response)
                    why = _objection(response, at)
                    for piece in () if why else response.iter_bytes():
                        if stop.is_set():
                            raise Cancelled(self.name)
                        if at == end:
                            break  # more than was asked for; else the connection is kept
                        piece = piece[: end - at]
                        at += len(piece)
                        yield piece
                    why = why or "the answer ended early"
            except (MlxedgeError, Cancelled):
                raise
            except Exception as error:
                why = self._passing(error)
                asked_to_wait = _retry_after(error)
            if at == end:
                return
            failed = 0 if at > before else failed + 1
            if failed == TRIES:
                raise NetworkError(
                    f"{self}: bytes {at} to {end} did not come in {TRIES} tries ({why}); run the "
                    "same command again: it goes on, and what it has finished is kept"
                )
            delay = min(FIRST_DELAY * 2**failed, LONGEST_DELAY)
            if stop.wait(max(delay if failed else 0.0, asked_to_wait)):
                raise Cancelled(self.name)

    def _passing(self, error: Exception) -> str:
        """What went wrong, if it may go right the next time; else raises it."""
        if isinstance(error, HfHubHTTPError):
            if error.response.status_code in _PASSING:
                return f"status {error.response.status_code}"
        elif isinstance(error, (TransportError, OSError)):
            return str(error).strip().partition("\n")[0] or type(error).__name__
        with translated(self.repo, self.commit):
            raise error


def answered_range(response: Any) -> tuple[int, int] | None:
    """Where the bytes of an answer begin, and the size of the file; ``None`` for a server that
    says neither, or sends the file from its beginning."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (int(found[1]), int(found[3])) if response.status_code == 206 and found else None


def _objection(response: Any, start: int) -> str | None:
    found = answered_range(response)
    if found is None or found[0] != start:
        return "the server did not send the range that was asked for"
    return None


def _retry_after(error: Exception) -> float:
    """Seconds that the server asks to wait."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_ASKED) if asked.isdigit() else 0.0
