"""generate and chat, on a small random model."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from oracles.tiny import write_tiny_llama

from mlxedge.cli import main
from mlxedge.cli.chat import _Talk
from mlxedge.generate import Generation, Sampling, load

PROMPT = "The river bends"


def generate(*arguments: object, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)], input=stdin)


@pytest.fixture(scope="module")
def answer(tiny: Path) -> str:
    """What the library says to ``PROMPT`` as a message."""
    with load(tiny, engine="numpy") as model:
        return model.generate(PROMPT, max_tokens=12)


def test_the_answer_is_the_library_s(tiny: Path, answer: str) -> None:
    done = generate(tiny, PROMPT, "-n", 12, "--engine", "numpy")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == answer + "\n"
    (line,) = done.stderr.splitlines()
    words = line.split()
    assert words[1:4] == ["prompt", "tokens", "at"]
    assert words[6:9] == ["tokens", "generated", "at"]
    assert int(words[5]) <= 12


@pytest.mark.parametrize("how", ["argument", "dash", "pipe", "file"])
def test_where_the_prompt_comes_from(tiny: Path, tmp_path: Path, answer: str, how: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    arguments: dict[str, list[object]] = {
        "argument": [PROMPT], "dash": ["-"], "pipe": [], "file": ["--prompt-file", file],
    }  # fmt: skip
    stdin = PROMPT if how in ("dash", "pipe") else None
    done = generate(tiny, *arguments[how], "-n", 12, "--no-stats", stdin=stdin)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == answer + "\n"
    assert done.stderr == ""


def test_raw_and_system_change_the_prompt(tiny: Path, answer: str) -> None:
    with load(tiny, engine="numpy") as model:
        tokens = len(model.tokenizer.encode(PROMPT))
        system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
        chat = len(model.encode_prompt(system))
    raw = json.loads(generate(tiny, PROMPT, "--raw", "-n", 3, "--json").stdout)
    assert raw["prompt_tokens"] == tokens
    told = json.loads(generate(tiny, PROMPT, "--system", "Be brief.", "-n", 3, "--json").stdout)
    assert told["prompt_tokens"] == chat


def test_json(tiny: Path, answer: str) -> None:
    done = generate(tiny, PROMPT, "-n", 12, "--json")
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["text"] == answer
    assert found["generated_tokens"] == len(found["tokens"])
    assert found["finish"] in ("stop", "length")
    assert (found["finish"] == "length") == (len(found["tokens"]) == 12)
    assert found["engine"] == "numpy"
    assert found["prefill_tokens_per_second"] > 0


def test_sampling_options_reach_the_model(tiny: Path) -> None:
    def tokens(*arguments: object) -> list[int]:
        done = generate(tiny, PROMPT, "--raw", "-n", 16, "--json", *arguments)
        assert done.exit_code == 0, done.stderr
        found: list[int] = json.loads(done.stdout)["tokens"]
        return found

    greedy = tokens()
    assert tokens("--temp", 5, "--top-k", 1) == greedy
    assert tokens("--temp", 5, "--min-p", 1) == greedy
    assert tokens("--temp", 5, "--top-p", 1e-9) == greedy
    first = tokens("--temp", 2, "--seed", 7)
    assert tokens("--temp", 2, "--seed", 7) == first
    assert any(tokens("--temp", 2, "--seed", seed) != first for seed in (8, 9))


def test_both_engines(tiny: Path) -> None:
    found = {
        engine: json.loads(
            generate(tiny, PROMPT, "--raw", "-n", 4, "--json", option, engine).stdout
        )
        for option, engine in (("--engine", "numpy"), ("--backend", "mlx"))
    }
    assert {name: f["engine"] for name, f in found.items()} == {"numpy": "numpy", "mlx": "mlx"}
    assert found["numpy"]["tokens"][0] == found["mlx"]["tokens"][0]


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "problem"),
    [
        (["", "-n", 2], None, 2, "the prompt is empty"),
        (["-"], b"\xff\xfe\xff", 2, "the prompt from stdin is not UTF-8: byte 0"),
        ([PROMPT, "--raw", "--system", "x"], None, 2, "--system needs the chat template"),
        ([PROMPT, "--prompt-file", __file__], None, 2, "not both"),
        (["--prompt-file", "/no/such/file"], None, 2, "does not exist"),
        (["word " * 3000], None, 2, "do not fit the model's context of 2048"),
        ([PROMPT, "--engine", "cuda"], None, 2, "'cuda' is not one of"),
    ],
)
def test_what_is_refused(
    tiny: Path, arguments: list[object], stdin: bytes | None, status: int, problem: str
) -> None:
    done = generate(tiny, *arguments, stdin=stdin)
    assert done.exit_code == status
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert problem in line


def chat(model: Path, said: str, *arguments: object) -> Any:
    return CliRunner().invoke(main, ["chat", str(model), *map(str, arguments)], input=said)


def test_chat_keeps_the_conversation(tiny: Path) -> None:
    messages: list[dict[str, str]] = []
    expected = []
    with load(tiny, engine="numpy") as model:
        for text in ("Hello", "And then?"):
            messages.append({"role": "user", "content": text})
            expected.append(model.generate(messages, max_tokens=6))
            messages.append({"role": "assistant", "content": expected[-1]})
        alone = model.generate("And then?", max_tokens=6)
        system = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hello"}]
        rhymed = model.generate(system, max_tokens=6)
    done = chat(tiny, "Hello\n\nAnd then?\n", "-n", 6)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "".join(f"{text}\n" for text in expected)
    done = chat(tiny, "Hello\n/reset\nAnd then?\n/exit\nnever", "-n", 6)
    assert done.stdout == f"{expected[0]}\n{alone}\n"
    done = chat(tiny, "What?\n/system Rhyme.\nHello\n/reset\nHello\n/system\nAnd then?", "-n", 6)
    assert done.stdout.endswith(f"\n{rhymed}\n{rhymed}\n{alone}\n")
    assert chat(tiny, "Hello", "-n", 6, "--system", "Rhyme.").stdout == f"{rhymed}\n"


def test_chat_computes_only_what_is_new(tiny: Path) -> None:
    done = chat(tiny, "Hello\nAnd then?\n", "-n", 6, "--stats")
    first, second = (int(line.split()[0]) for line in done.stderr.splitlines())
    with load(tiny, engine="numpy") as model:
        length = len(model.encode_prompt("And then?"))
    # The end of the answer and the new message, without the first turn.
    assert first < 20
    assert second <= length + 8


def test_chat_commands(tiny: Path) -> None:
    done = chat(tiny, "/help\n/nonsense\n")
    assert done.stdout == ""
    assert "/reset" in done.stderr
    assert "no command /nonsense" in done.stderr


def test_chat_needs_a_template(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = chat(folder, "Hello\n")
    assert done.exit_code == 2
    assert "has no chat template" in done.stderr
    assert generate(folder, PROMPT, "-n", 2).exit_code == 0


def test_ctrl_c_stops_the_answer_only(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with load(tiny, engine="numpy") as model:
        talk = _Talk(model, Sampling(), 6, stats=False, system=None)
        step = Generation.__next__

        def interrupted(self: Generation) -> Any:
            if self.stats.generated_tokens == 3:
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(Generation, "__next__", interrupted)
        assert talk.take("Hello")
        monkeypatch.undo()
        first = capsys.readouterr().out.removesuffix("\n")
        assert [m["content"] for m in talk.messages] == ["Hello", first]
        assert talk.take("And then?")
        second = capsys.readouterr().out.removesuffix("\n")
        messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And then?"},
        ]
        assert second == model.generate(messages, max_tokens=6)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and signals")
def test_chat_on_a_terminal(tiny: Path) -> None:
    """Prompts, a signal in the middle of an answer, another turn, Ctrl-D."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxedge", "chat", str(tiny),
         "-n", "1500", "--temp", "3", "--seed", "2"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def wait_until(arrived: Callable[[], bool]) -> None:
        nonlocal seen
        while not arrived():
            ready, _, _ = select.select([ours], [], [], 60)
            assert ready, seen
            seen += os.read(ours, 65536)

    try:
        wait_until(lambda: b"> " in seen)
        os.write(ours, b"/nonsense\n")
        wait_until(lambda: b"> " in seen.partition(b"no command /nonsense")[2])
        before = len(seen)
        os.write(ours, b"Hello\n")
        wait_until(lambda: len(seen) > before + 60)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: seen.endswith(b"> "))
        os.write(ours, b"/help\n")
        wait_until(lambda: b"> " in seen.partition(b"Ctrl-C stops an answer.")[2])
        assert process.poll() is None
        os.write(ours, b"\x04")
        process.wait(30)
    finally:
        process.kill()
        os.close(ours)
    assert process.returncode == 0, seen
