"""The command line: parse, call, print.

``main`` is the entry point. Its subcommands are a table of names; a command's module, and with it
NumPy, rich and everything else, is imported when that command runs. Errors are caught here, once:

=====================  ===========================================================  ===========
what                   on stderr                                                    exit status
=====================  ===========================================================  ===========
``MlxedgeError``       ``error: `` and its message                                  1, usage 2
wrong arguments        ``error: `` and what is wrong                                2
an error of the system ``error: `` and the file                                     1
anything else          ``error: internal error`` and how to report it               1
Ctrl-C                 ``interrupted``                                              130
=====================  ===========================================================  ===========

Each is one line. With ``--json`` the same error is also on stdout, as one object: ``{"error":
message, "kind": class}``. ``--debug`` or ``MLXEDGE_DEBUG`` adds the traceback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mlxedge.errors import CorruptFileError, MlxedgeError
from mlxedge.version import VERSION

#: Every subcommand, in the order of the help text: name → (module:attribute, what it does).
COMMANDS = {
    "convert": ("mlxedge.cli.convert:command", "Convert a model to MLX and GGUF."),
    "inspect": ("mlxedge.cli.inspect:command", "Show what a model file or folder holds."),
    "fetch": ("mlxedge.cli.fetch:command", "Download a model from the Hub."),
    "generate": ("mlxedge.cli.generate:command", "Continue a prompt with a model."),
    "chat": ("mlxedge.cli.chat:command", "Talk with a model."),
    "calibrate": ("mlxedge.cli.calibrate:command", "Find out which weights of a model matter."),
    "evaluate": ("mlxedge.cli.evaluate:command", "Measure how well models predict a text."),
    "bench": ("mlxedge.cli.bench:command", "Measure how fast models run here."),
    "compare": ("mlxedge.cli.compare:command", "Compare records of bench."),
    "predict": ("mlxedge.cli.predict:command", "Predict whether a model runs on a Mac."),
    "demo": ("mlxedge.cli.demo:command", "Take the model that ships with mlxedge through it all."),
}
ISSUES = "https://github.com/mlxedge/mlxedge/issues"
INTERRUPTED = 130


class Program(click.Group):
    """A group that imports a subcommand when it is wanted, and turns errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}: choose from {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # A character that a terminal cannot show must not end a run.
                stream.reconfigure(errors="backslashreplace")
        # click expands wildcards on Windows only if it takes the arguments itself.
        args = args if arguments else ["--help"]
        prog_name = prog_name or "mlxedge"
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (Exception, KeyboardInterrupt) as error:
            _fail(error, arguments)
        # Without standalone mode click returns the status of --help and --version, or what the
        # command returned, which here is nothing.
        sys.exit(status or 0)


def _fail(error: BaseException, arguments: list[str]) -> NoReturn:
    """Say what went wrong, as the table above has it, and exit."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options or bool(os.environ.get("MLXEDGE_DEBUG"))
    message, status = _explain(error)
    if debug and not isinstance(error, (click.ClickException, click.Abort)):
        import traceback

        traceback.print_exception(error)
    try:
        if status == INTERRUPTED:
            click.echo(message, err=True)
        else:
            click.echo(f"error: {message}", err=True)
        if "--json" in options:
            click.echo(json.dumps({"error": message, "kind": _kind(error)}))
    except BrokenPipeError:
        pass
    sys.exit(status)


#: Files that come by download, and break off.
_WEIGHTS = (".gguf", ".safetensors")


def _explain(error: BaseException) -> tuple[str, int]:
    """One line for ``error``, and the exit status."""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted", INTERRUPTED
    if isinstance(error, CorruptFileError) and error.path.suffix in _WEIGHTS:
        return _one_line(f"{error}; download or copy the file again"), error.exit_status
    if isinstance(error, MlxedgeError):
        return _one_line(str(error)), error.exit_status
    if isinstance(error, click.UsageError):
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _one_line(error.format_message()).removesuffix(".") + where, error.exit_code
    if isinstance(error, click.ClickException):
        return _one_line(error.format_message()), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory: close other programs, or use fewer --threads", 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _one_line(f"{where}{error.strerror}"), 1
    return (
        _one_line(
            f"internal error: {type(error).__name__}: {error}; please report it at {ISSUES} with "
            "what mlxedge --debug prints"
        ),
        1,
    )


def _kind(error: BaseException) -> str:
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "KeyboardInterrupt"
    return "UsageError" if isinstance(error, click.UsageError) else type(error).__name__


def _one_line(text: str) -> str:
    """A file's names can be in a message, so nothing in it may steer a terminal."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


@click.group(
    name="mlxedge",
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0, 1 if something failed, 2 if the arguments make no sense. "
    "HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and NO_COLOR are obeyed.",
)
@click.version_option(VERSION, prog_name="mlxedge", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def main() -> None:
    """Take Hugging Face models to checked MLX and GGUF files, run them, measure them."""
