"""The kernels that stand for a block's elementwise parts, in Triton's interpreter, against transformers' own code.

tests/gpu/test_pruning.py has the same on a GPU, in BF16, which the interpreter cuts off instead of rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SAME_BITS = """
import torch
from elementwise_parts import compare

compare(torch.device("cpu"), torch.float16)
"""
FOUND = """
import sys
from pathlib import Path

import torch
from elementwise_parts import FAMILIES, find_and_run

for family in FAMILIES:
    difference = find_and_run(family, Path(sys.argv[1]) / family, torch.device("cpu"), torch.float32)
    assert difference < 1e-5, (family, difference)
"""


@pytest.mark.parametrize("code", [SAME_BITS, FOUND], ids=["same bits", "found"])
def test_in_the_interpreter(code: str, tmp_path: Path) -> None:
    """In a process of its own: Triton decides when it is imported whether it will interpret."""
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert process.returncode == 0, process.stderr
