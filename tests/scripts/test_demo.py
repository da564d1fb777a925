"""What `make demo` prunes: one method, or all of them by request."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offline_prune.settings import METHODS
from scripts import demo
from scripts.pruned import Pruning

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("options", "titles"), [([], [demo.METHOD]), (["--all"], [*demo.PRUNINGS])], ids=str)
def test_one_method_is_pruned_unless_all_are_asked_for(
    options: list[str], titles: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Pruning] = []
    compared: list[str] = []
    served: list[Path] = []

    def pruned(model: Path, pruning: Pruning) -> Path:
        made.append(pruning)
        return Path(pruning.name)

    @contextlib.contextmanager
    def starting(checkpoint: Path, *others: object) -> Iterator[str]:
        served.append(checkpoint)
        assert not compared
        yield "server"

    monkeypatch.setattr(demo, "smollm2", lambda folder: folder)
    monkeypatch.setattr(demo, "pruned", pruned)
    monkeypatch.setattr(demo, "show_perplexities", lambda model, checkpoints: compared.extend(checkpoints))
    monkeypatch.setattr(demo, "starting_vllm", starting)
    monkeypatch.setattr(demo, "ask", lambda server: compared.append(f"{server} answered"))
    monkeypatch.setattr(demo, "show_gain", lambda: None)
    monkeypatch.setattr(demo, "check_port", lambda port: None)
    monkeypatch.setattr(demo, "exit_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    demo.main()
    assert made == [demo.PRUNINGS[title] for title in titles]
    assert compared == [*titles, "server answered"]
    assert served == [Path(demo.SERVED.name)]
    assert f"  spense inspect {demo.SERVED.name}\n" in capsys.readouterr().out


def test_all_methods_are_there_but_the_weakest() -> None:
    assert {pruning.method for pruning in demo.PRUNINGS.values()} == METHODS.keys() - {"magnitude"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("arguments", "all_methods"), [([], False), (["ALL=1"], True), (["ALL=0"], False)], ids=str)
def test_make_passes_the_wish_on(arguments: list[str], all_methods: bool) -> None:
    # What `make test` was called with is in the environment.
    given = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PORT", "ALL"}
    environment = {name: value for name, value in os.environ.items() if name not in given}
    command = ["make", "-n", "demo", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ("scripts.demo --port 8000 --all" in done.stdout) == all_methods
