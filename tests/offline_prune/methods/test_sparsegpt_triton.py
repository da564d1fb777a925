"""The kernel that walks columns, in Triton's interpreter; tests/gpu/test_pruning.py runs the same on a GPU."""

from __future__ import annotations

import pytest
from runs import interpret

pytest.importorskip("triton")

INTERPRETED = """
import torch
from column_problems import batches, every_problem, compare, ties
from offline_prune.methods.sparsegpt_triton import solve_block

for problem in every_problem(21, torch.device("cpu")):
    compare(solve_block, problem)
ties(solve_block, torch.device("cpu"))
batches(solve_block, torch.device("cpu"))
"""


def test_the_kernel_against_its_twin() -> None:
    interpret(INTERPRETED)
