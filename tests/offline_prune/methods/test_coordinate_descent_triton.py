"""The kernel that walks groups of four, in Triton's interpreter; tests/gpu/test_pruning.py runs the same on a GPU."""

from __future__ import annotations

import pytest
from runs import interpret

pytest.importorskip("triton")

INTERPRETED = """
import torch
from descent_problems import every_problem
from offline_prune.methods.coordinate_descent_triton import solve_block

every_problem(solve_block, 21, torch.device("cpu"))
"""


def test_the_kernel_against_its_twin() -> None:
    interpret(INTERPRETED)
