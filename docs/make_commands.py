"""Put the help texts of the commands into docs/commands.md, between its markers.

python docs/make_commands.py          # after a change of a command
python docs/make_commands.py --check  # fails if the page is out of date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from click.testing import CliRunner

from mlxedge.cli import COMMANDS, main

PAGE = Path(__file__).with_name("commands.md")
_BLOCK = re.compile(r"(<!-- help: ?([\w ]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(arguments: list[str]) -> str:
    """What ``mlxedge ARGUMENTS --help`` prints on a terminal of 90 columns."""
    done = CliRunner().invoke(
        main, [*arguments, "--help"], terminal_width=90, color=False, prog_name="mlxedge"
    )
    if done.exit_code != 0:
        raise RuntimeError(f"mlxedge {' '.join(arguments)} --help failed: {done.output}")
    return "\n".join(line.rstrip() for line in done.output.strip().splitlines())


def update(page: str) -> str:
    """``page`` with current help texts. Raises RuntimeError if a command has no block in it."""
    shown = []

    def block(match: re.Match[str]) -> str:
        arguments = match[2].split()
        shown.append(" ".join(arguments))
        return f"{match[1]}```text\n{help_text(arguments)}\n```\n{match[3]}"

    updated = _BLOCK.sub(block, page)
    if sorted(shown) != sorted(["", *COMMANDS]):
        raise RuntimeError(f"the page shows {shown}, the commands are {list(COMMANDS)}")
    return updated


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    new = update(old)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if old == new else "docs/commands.md is out of date: run docs/make_commands.py")
    PAGE.write_text(new, encoding="utf-8")
