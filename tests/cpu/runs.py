"""One way to call the pruner from tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offline_prune.pipeline import prune
from offline_prune.report import Report
from offline_prune.settings import PruneSettings


def run(model: Path, out: Path, text: Path, **options: Any) -> Report:
    given = {"samples": 8, "length": 64, "calibration": str(text), "device": "cpu", **options}
    return prune(PruneSettings(str(model), out, **given))
