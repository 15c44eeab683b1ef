"""``mlxedge generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlxedge.cli.running import engine_options, sampling_options


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Read the prompt from a file.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="A system message for the chat template.")
@click.option("--raw", is_flag=True,
              help="Continue the prompt as it is, without the model's chat template.")  # fmt: skip
@sampling_options
@engine_options
@click.option("--stats/--no-stats", default=True, show_default=True,
              help="Print counts and speeds on stderr at the end.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and speeds as JSON.")
def command(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    raw: bool,
    max_tokens: int,
    stats: bool,
    as_json: bool,
    engine: str | None,
    threads: int | None,
    **sampling: Any,
) -> None:
    """Continue PROMPT with MODEL, and print the text as it comes.

    MODEL is a GGUF file, an MLX or Hugging Face folder, or a Hub id. PROMPT is one user message if
    the model has a chat template and --raw is not given; "-", or no prompt, reads standard input.
    """
    from mlxedge.cli import ui
    from mlxedge.cli.running import load_model, sampling_of, stats_line, write_stream
    from mlxedge.errors import UsageError

    if raw and system is not None:
        raise UsageError("--system needs the chat template, which --raw leaves out")
    text = _prompt(prompt, prompt_file)
    if not text.strip():
        raise UsageError("the prompt is empty: give PROMPT, --prompt-file or text on stdin")
    settings = sampling_of(**sampling)
    with load_model(model, engine, threads) as loaded:
        message: str | list[dict[str, str]] = text
        if system is not None:
            message = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        tokens = loaded.encode_prompt(message, raw=raw)
        generation = loaded.stream(tokens, max_tokens=max_tokens, sampling=settings)
        if as_json:
            chunks = list(generation)
        else:
            write_stream(generation)
            click.echo()
        done = generation.stats
    if as_json:
        ui.print_json(
            {
                "text": "".join(c.text for c in chunks),
                "tokens": [c.token for c in chunks if c.token is not None],
                "finish": chunks[-1].finish if chunks else None,
                "engine": loaded.engine,
                "prompt_tokens": done.prompt_tokens,
                "prefill_seconds": done.prefill_seconds,
                "prefill_tokens_per_second": done.prefill_tps,
                "generated_tokens": done.generated_tokens,
                "decode_seconds": done.decode_seconds,
                "decode_tokens_per_second": done.decode_tps,
            }
        )
    elif stats:
        ui.note(stats_line(done))


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The one source of the prompt; raises UsageError for two, and for bytes that are no text."""
    from mlxedge.errors import UsageError

    if file is not None and prompt is not None:
        raise UsageError("give PROMPT or --prompt-file, not both")
    if file is not None:
        data, name = file.read_bytes(), str(file)
    elif prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise UsageError("no prompt: give PROMPT, --prompt-file, or text on stdin")
        data, name = sys.stdin.buffer.read(), "stdin"
    else:
        return prompt
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt from {name} is not UTF-8: byte {error.start}") from error
