"""The `spense` command as a user meets it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offline_prune import cli
from vllm_spense.format import SIDECAR


def spense(*arguments: object, module: str = "offline_prune.cli") -> subprocess.CompletedProcess[str]:
    code = f"import sys; from {module} import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=None)


Spense = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def spense_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spense:
    """The command in this process, which has long imported what a new one needs ten seconds for."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    # A temporary folder's name would break the lines of a table, a longer one elsewhere.
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        assert isinstance(end.value.code, int)
        return subprocess.CompletedProcess(arguments, end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def out(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    options = ["--calibration", text, "--samples", 8, "--length", 64, "--device", "cpu", "--quantize", "none"]
    result = spense("prune", llama, out, *options)
    assert result.returncode == 0, result.stderr
    assert "GiB" in result.stderr
    assert "37.5" in result.stdout
    assert (out / SIDECAR).exists()
    return out


def test_verify(out: Path, spense_here: Spense) -> None:
    result = spense_here("verify", out)
    assert result.returncode == 0
    assert "2 MLPs: sparse regions 2:4" in result.stdout


def test_a_signal_that_comes_out_of_c_code_as_something_else_is_no_traceback() -> None:
    code = """
import os, signal, sys
import vllm_spense.cli as cli

# Ignored in the background jobs of a shell, and so by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

def app(arguments):
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    except KeyboardInterrupt:
        pass
    raise ValueError("could not determine the shape")

cli.app = app
cli.main([])
"""
    for name, status in (("SIGTERM", 130), ("SIGINT", 130), ("SIGURG", 1)):
        result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60)
        assert result.returncode == status
        assert ("Traceback" in result.stderr) == (status == 1)


def test_inspect(out: Path, spense_here: Spense) -> None:
    result = spense_here("inspect", out)
    assert result.returncode == 0
    for words in ("spensegpt+", "sparse 96 + dense 32 = 128", "37.50%", "8 × 64 tokens", "research only"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", "/no/such/model", "/tmp/never"), "error: /no/such/model: no such folder"),
        (("prune", "/no/such/model", "/tmp/never", "--sparsity", "0.7"), "error: --sparsity: found 0.7"),
        (("prune", "/no/such/model", "/tmp/never", "--sparsity", "much"), "Invalid value for '--sparsity'"),
        (("prune", "/no/such/model", "/tmp/never", "--sparsty", "0.3"), "No such option"),
        (("verify", "/no/such/folder"), "error: /no/such/folder: no config.json"),
        (("inspect", "/no/such/folder"), "error: /no/such/folder: no config.json"),
    ],
)
def test_mistakes_end_in_one_message(arguments: tuple[str, ...], words: str, spense_here: Spense) -> None:
    result = spense_here(*arguments)
    assert result.returncode != 0
    assert words in " ".join(result.stderr.split())


def test_python_m_offline_prune_is_spense_prune() -> None:
    command = [sys.executable, "-m", "offline_prune", "/no/such/model", "/tmp/never"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "error: /no/such/model: no such folder" in result.stderr
    assert "Traceback" not in result.stderr
