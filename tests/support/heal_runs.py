"""One way to call `heal` from tests: a tiny pruned model, its teacher, a text, few steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import Cut, run
from tiny_models import tiny_model

from offline_prune.healing.pipeline import heal
from offline_prune.healing.report import HealReport
from offline_prune.healing.settings import HealSettings


@dataclass(frozen=True)
class Pair:
    """A dense model and what pruning made of it."""

    teacher: Path
    pruned: Path
    text: Path


def make_pair(folder: Path, text: Path, family: str = "llama", **options: Any) -> Pair:
    teacher = tiny_model(family, folder / "teacher")
    run(teacher, folder / "pruned", text, **options)
    return Pair(teacher, folder / "pruned", text)


def settings(pair: Pair, out: Path, **options: Any) -> HealSettings:
    """Fourteen steps of 256 tokens."""
    given: dict[str, Any] = {
        "calibration": str(pair.text),
        "samples": 64,
        "length": 64,
        "step_tokens": 256,
        "heldout": 0.1,
        "epochs": 1,
        "rate": 0.01,
        "device": "cpu",
    }
    return HealSettings(pair.pruned, out, **{"teacher": str(pair.teacher), **given, **options})


def healed(pair: Pair, out: Path, **options: Any) -> HealReport:
    return heal(settings(pair, out, **options))


def cut_off(pair: Pair, out: Path, steps: int, **options: Any) -> None:
    """Trains so many steps, saves a state in each, and leaves an unfinished run."""

    def stop(done: int, total: int, loss: str) -> None:
        if done == steps:
            raise Cut

    with pytest.raises(Cut):
        heal(settings(pair, out, save_minutes=0.0, **options), stop)
