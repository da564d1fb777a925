"""The benchmark of healing, at a size that a CPU can do: real files through the product's own code, on one rank and on
two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from forked import run_ranks

from benchmarks import heal_time
from benchmarks.envelope import ROOT
from benchmarks.pruning_tables import heal
from offline_prune.healing.report import HealReport
from offline_prune.healing.settings import HealSettings

SMALL = ["--shapes", "tiny", "--vocabulary", "1024", "--samples", "24", "--length", "64", "--step-tokens", "128"]


def result_of(tmp_path: Path) -> list[str]:
    return [*SMALL, "--device", "cpu", "--folder", str(tmp_path), "--out", str(tmp_path / "result.json")]


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["heal_time.py", *result_of(tmp_path)])
    heal_time.main()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["rows"]
    assert (row["shape"], row["gpus"], row["layers_measured"], row["vocabulary"]) == ("tiny", 0, 2, 1024)
    assert (row["steps"], row["written_at_once"]) == (11, 24)
    assert row["tokens_per_s"] == pytest.approx(128 / row["step_s"])
    assert {"text", "load", "teacher", "student", "update", "judge", "write"} <= set(row["stages"])
    # Ten million tokens in steps of 128, and nothing that is not counted.
    assert 60 * row["projected_minutes"] > 75_000 * row["step_s"]
    assert row["planned_gib"] > 0
    assert len(heal(result)) == 2 + 1 + 2


def test_two_ranks_and_fewer_layers(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "heal_time.py"
    run_ranks(program, *result_of(tmp_path), "--layers", "1")
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (row["layers"], row["layers_measured"], row["projected_minutes"]) == (2, 1, None)
    # Each of them writes half of the text.
    assert row["written_at_once"] == 12


def test_the_projection() -> None:
    """A default run has 800 sequences of the teacher's, 3200 texts; 48 sequences judge, and 588 steps are an epoch."""
    stages = {"load": 5.0, "text": 20.0, "judge": 3.0, "write": 2.0}
    settings = HealSettings(Path("pruned"), Path("out"), "model", calibration="generated", samples=500)
    report = HealReport({}, steps=30, tokens=30 * 8192, heldout_tokens=10 * 2048, stages=stages)
    # Ten of 500 sequences judged; 1000 texts were written together, twice.
    found = heal_time.projected(report, 1.5, [1000, 2000], settings)
    assert found == pytest.approx(5.0 + 4 * 10.0 + 2 * 588 * 1.5 + 4.8 * 3.0 + 2.0)
