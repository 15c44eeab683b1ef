"""A real Chromium without a window, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Under what names it is installed. Playwright's own download is not used.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_browser() -> str | None:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (str(_MAC) if _MAC.exists() else None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A running one. Raises OSError if there is none; tests/run.py says how to get it."""
    from playwright.sync_api import sync_playwright

    program = find_browser()
    if program is None:
        raise OSError("no Chromium on PATH")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        with contextlib.closing(running):
            yield running
