"""Checkpoints for fixed seeds are what they were: the pruner's arithmetic changes on purpose or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_checkpoints import CASES, ENVIRONMENT
from golden_checkpoints import __file__ as PROGRAM

#: Of each kind of CPU that was seen to compute other bits, which `ENVIRONMENT` does not prevent (two AMD EPYCs).
#: Taken with torch 2.13 on the code of 2026-11-23. A change on purpose replaces them by what `PROGRAM` prints.
HASHES = json.loads(Path(__file__).with_suffix(".json").with_stem("golden_checkpoints").read_text(encoding="utf-8"))


def test_checkpoints_keep_their_bytes() -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert all(hashes.keys() == CASES.keys() for hashes in HASHES.values())
    found = json.loads(process.stdout)
    if "amx_tile" in Path("/proc/cpuinfo").read_text() and found not in HASHES.values():
        pytest.skip("a kind of CPU whose bits were never taken")
    assert found in HASHES.values()
