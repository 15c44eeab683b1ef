"""``mlxedge chat``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from mlxedge.cli.running import engine_options, sampling_options

if TYPE_CHECKING:
    from mlxedge.generate import Model, Sampling, Session

_HELP = """\
/help           this list
/reset          forget the conversation, and keep the system message
/system [TEXT]  set the system message (without TEXT: none), and forget the conversation
/exit           end; so does Ctrl-D
Ctrl-C stops an answer."""


@click.command()
@click.argument("model")
@click.option("--system", metavar="TEXT", help="The system message.")
@sampling_options
@engine_options
@click.option("--stats/--no-stats", default=False, show_default=True,
              help="Print counts and speeds on stderr after each answer.")  # fmt: skip
def command(
    model: str,
    system: str | None,
    max_tokens: int,
    stats: bool,
    engine: str | None,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Talk with MODEL, which keeps the conversation.

    MODEL is a GGUF file, an MLX or Hugging Face folder, or a Hub id, and must have a chat template.
    Type /help for what else can be typed. From a pipe, every line is one message.
    """
    from mlxedge.cli.running import load_model, sampling_of
    from mlxedge.errors import UsageError

    settings = sampling_of(**sampling)
    with load_model(model, engine, threads) as loaded:
        if not loaded.tokenizer.has_chat_template:
            raise UsageError(f"{model} has no chat template: use mlxedge generate --raw")
        talk = _Talk(loaded, settings, max_tokens, stats, system)
        if sys.stdin.isatty():
            _interactive(talk)
        else:
            for line in sys.stdin.buffer:
                if not talk.take(line.decode("utf-8", errors="replace").strip()):
                    break


def _interactive(talk: _Talk) -> None:
    from mlxedge.cli import ui
    from mlxedge.errors import MlxedgeError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and line editing)
    ui.note("/help lists what can be typed")
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            ui.note("\n/exit or Ctrl-D ends")
            continue
        except EOFError:
            click.echo()
            return
        try:
            if not talk.take(line.strip()):
                return
        except MlxedgeError as error:
            # One bad turn does not end a conversation.
            ui.note(f"error: {error}")


@dataclass
class _Talk:
    """A conversation and what may be typed in it."""

    model: Model
    sampling: Sampling
    max_tokens: int
    stats: bool
    system: str | None
    messages: list[dict[str, str]] = field(init=False)
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.reset("")

    def take(self, line: str) -> bool:
        """Answer a line, or do what it commands; ``False`` ends the conversation."""
        from mlxedge.cli import ui

        if not line:
            return True
        if not line.startswith("/"):
            self.answer(line)
            return True
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return False
        if name in _COMMANDS:
            _COMMANDS[name](self, rest.strip())
        else:
            ui.note(f"no command {name}; /help lists what there is")
        return True

    def answer(self, text: str) -> None:
        from mlxedge.cli import ui
        from mlxedge.cli.running import stats_line, write_stream

        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.model.encode_prompt(messages)
        generation = self.model.stream(
            tokens, max_tokens=self.max_tokens, sampling=self.sampling, session=self.session
        )
        said: list[str] = []
        with contextlib.suppress(KeyboardInterrupt):
            write_stream(generation, said)
        click.echo()
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        if self.stats:
            ui.note(stats_line(generation.stats))

    def reset(self, _: str) -> None:
        self.session = self.model.session()
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages = list(system)

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.reset("")

    def help(self, _: str) -> None:
        from mlxedge.cli import ui

        ui.note(_HELP)


_COMMANDS: dict[str, Callable[[_Talk, str], None]] = {
    "/help": _Talk.help,
    "/reset": _Talk.reset,
    "/system": _Talk.set_system,
}
