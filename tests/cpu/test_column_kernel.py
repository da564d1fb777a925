"""The kernel that walks columns, in Triton's interpreter; tests/gpu/test_pruning.py runs the same on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from column_problems import every_problem, compare, ties
from offline_prune.column_kernel import solve_block

for problem in every_problem(21, torch.device("cpu")):
    compare(solve_block, problem)
ties(solve_block, torch.device("cpu"))
"""


def test_the_kernel_against_its_twin() -> None:
    """In a process of its own: Triton decides when it is imported whether it will interpret."""
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert process.returncode == 0, process.stderr
