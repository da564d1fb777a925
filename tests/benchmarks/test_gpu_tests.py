"""How the GPU tests ended, as benchmarks/gpu_tests.py tells it: held to a run of real tests of every ending."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", [1, 2, 3])
def test_numbers(n, record_property):
    record_property("largest", n)
    assert n != 2

def test_of_another_machine():
    pytest.skip("not here")
"""


def test_every_ending_is_told(tmp_path: Path) -> None:
    (tmp_path / "test_them.py").write_text(TESTS)
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks/gpu_tests.py", "--out", out, tmp_path / "test_them.py"]
    assert subprocess.run([*command, "-p", "no:cacheprovider"]).returncode == 1
    numbers, other = json.loads(out.read_text())["rows"]
    assert (numbers["test"], numbers["passed"], numbers["failed"], numbers["skipped"]) == ("test_numbers", 2, 1, 0)
    assert numbers["recorded"] == {"largest": "3"}
    assert (other["passed"], other["skipped"]) == (0, 1)
