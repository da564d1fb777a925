"""The kernels that stand for a block's elementwise parts, in Triton's interpreter, against transformers' own code.

tests/gpu/test_pruning.py has the same on a GPU, in BF16, which the interpreter cuts off instead of rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import interpret

pytest.importorskip("triton")

SAME_BITS = """
import torch
from elementwise_parts import compare, look_alikes

compare(torch.device("cpu"), torch.float16)
look_alikes(torch.device("cpu"), torch.float32)
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
WHOLE_RUNS = """
import sys
from pathlib import Path

import torch
from contextlib import nullcontext

from safetensors.torch import load_file
from tiny_models import tiny_model

from offline_prune import pipeline
from offline_prune.calibration.hidden_states import Stream, find_elementwise
from offline_prune.methods import block_finetune, prune_mlp
from offline_prune.model import block_forward
from offline_prune.settings import PruneSettings


def kernels(stream, index, block):
    used.append(index)
    return find_elementwise(block, stream._mlps[index]).replaced(block)


# What rounds to BF16 on CPUs that have it makes of sums in another order, now and then, another number altogether.
pipeline.compute_dtype = lambda device: torch.float32
for module in (block_forward, prune_mlp, block_finetune):
    module.fast_matmul = nullcontext
used = []
folder = Path(sys.argv[1])
model = str(tiny_model("qwen3", folder / "model"))
tokens = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
written = {}
for name in ("plain", "kernels"):
    if name == "kernels":
        Stream._with_kernels = kernels
    # Not with scales that are chosen among many, some of them nearly as good.
    given = {"method": "spensegpt++", "rounding": "inside", "samples": 4, "length": 32, "device": "cpu"}
    pipeline.prune(PruneSettings(model, folder / name, **given), tokens=tokens)
    written[name] = load_file(folder / name / "model.safetensors")
assert set(used) == {0, 1}
for key, tensor in written["plain"].items():
    differing = (tensor.float() != written["kernels"][key].float()).float().mean().item()
    assert differing <= 1e-3, (key, differing)
"""


@pytest.mark.parametrize("code", [SAME_BITS, FOUND, WHOLE_RUNS], ids=["same bits", "found", "whole runs"])
def test_in_the_interpreter(code: str, tmp_path: Path) -> None:
    interpret(code, tmp_path)
