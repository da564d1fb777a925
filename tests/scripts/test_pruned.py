"""The cache of pruned checkpoints: nothing stale is ever returned, nothing is made twice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import pruned as module
from scripts.pruned import Pruning, pruned

PRUNING = Pruning("spensegpt+", 0.375)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces `spense prune` by a command that only makes the folder; holds the calls."""
    calls: list[list[str]] = []

    def run(command: list[str], check: bool, stdout: int) -> None:
        assert check
        calls.append(command)
        Path(command[4]).mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_settings_reach_the_command(calls: list[list[str]], tmp_path: Path) -> None:
    folder = pruned(Path("model"), PRUNING, tmp_path)
    assert calls[0][1:] == [
        *("-m", "offline_prune", "model", str(folder)),
        *("--calibration", "builtin", "--method", "spensegpt+", "--sparsity", "0.375", "--quantize", "fp8"),
        *("--samples", "16", "--length", "256", "--seed", "0", "--overwrite"),
    ]


def test_a_second_call_prunes_nothing(calls: list[list[str]], tmp_path: Path) -> None:
    assert pruned(Path("model"), PRUNING, tmp_path) == pruned(Path("model"), PRUNING, tmp_path)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        Pruning("spensegpt", 0.375),
        Pruning("spensegpt+", 0.25),
        Pruning("spensegpt+", 0.375, quantize="none"),
        Pruning("spensegpt+", 0.375, samples=8),
        Pruning("spensegpt+", 0.375, length=128),
        Pruning("spensegpt+", 0.375, seed=1),
    ],
)
def test_other_settings_have_another_folder(other: Pruning, calls: list[list[str]], tmp_path: Path) -> None:
    assert pruned(Path("model"), PRUNING, tmp_path) != pruned(Path("model"), other, tmp_path)
    assert len(calls) == 2


def test_another_pruner_prunes_again(calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned(Path("model"), PRUNING, tmp_path)
    source = tmp_path / "source.py"
    source.touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "SOURCES", ("source.py",))
    pruned(Path("model"), PRUNING, tmp_path)
    source.write_text("changed")
    pruned(Path("model"), PRUNING, tmp_path)
    assert len(calls) == 3


def test_a_failed_run_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], check: bool, stdout: int) -> None:
        raise subprocess.CalledProcessError(1, command)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", fail)
        with pytest.raises(subprocess.CalledProcessError):
            pruned(Path("model"), PRUNING, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
