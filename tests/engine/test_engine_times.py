"""decode_speed with real engines, on a shape that a CPU can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import VLLM

from benchmarks.envelope import ROOT

pytestmark = pytest.mark.engine


def test_both_engines_are_measured(tmp_path: Path) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    options = "--shape tiny --eager --steps 8 --kv auto --sparsities 0.375 --batches 1 4 --contexts 16"
    done = subprocess.run(
        [sys.executable, "benchmarks/decode_speed.py", *options.split(), "--out", out, "--work", work],
        cwd=ROOT,
        env=os.environ | VLLM,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 16), (4, 16)]
    for row in rows:
        assert row["dense_ms"] > 0
        assert row["prefill_spense_ms"] > 0
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["spense_ms"], abs=1e-3)
    assert len(list(work.glob("*.log"))) == 2
