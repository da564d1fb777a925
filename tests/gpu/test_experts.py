"""A mixture of experts pruned on a GPU, and served there: the same tokens as stock vLLM's dense experts.

pytest -m gpu --noconftest tests/gpu/test_experts.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engines import EXCEPTIONS, Completion, Run, generate, require_same_or_tied
from tiny_models import tiny_model

from offline_prune.checkpoint.verify import verify
from offline_prune.pipeline import prune
from offline_prune.report import Report
from offline_prune.settings import PruneSettings
from vllm_spense.ops.dispatch import ONE_LAUNCH_CAPABILITY, SWITCH
from vllm_spense.ops.dispatch import Path as ExecutionPath

pytestmark = pytest.mark.gpu

#: Large enough for every kernel of vLLM's, and regions for two ranks.
SIZES = {
    "hidden_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_experts": 8,
    "moe_intermediate_size": 768,
}
#: Nats, of BF16.
TIED = 0.25


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Report]]:
    """The same model pruned on a CPU and on a GPU."""
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_model("qwen3-moe", folder / "model", **SIZES)
    found = {}
    for device in ("cuda", "cpu"):
        given = {"method": "spensegpt+", "calibration": "builtin", "samples": 8, "length": 512, "device": device}
        found[device] = folder / device, prune(PruneSettings(str(model), folder / device, **given))
    return found


def test_a_gpu_prunes_as_a_cpu_does(reports: dict[str, tuple[Path, Report]]) -> None:
    (out, on_gpu), (_, on_cpu) = reports["cuda"], reports["cpu"]
    assert verify(out).mlps == 16
    for mine, theirs in zip(on_gpu.layers, on_cpu.layers, strict=True):
        assert mine.tokens is not None
        assert theirs.tokens is not None
        assert sum(mine.tokens) == sum(theirs.tokens) == 2 * 8 * 512
        for part in ("gate", "up", "down"):
            assert getattr(mine, part).loss == pytest.approx(getattr(theirs, part).loss, rel=0.05)


@pytest.fixture(scope="module")
def stock(reports: dict[str, tuple[Path, Report]]) -> list[Completion]:
    """Dense execution of the same files, compiled."""
    pytest.importorskip("vllm", reason="needs vLLM")
    return complete(reports["cuda"][0], "compressed-tensors", compiled=True)


def complete(
    checkpoint: Path, quantization: str, compiled: bool, path: ExecutionPath | None = None
) -> list[Completion]:
    run = Run(checkpoint, quantization, compiled=compiled, dtype="bfloat16", among_others=True)
    return generate([run], {SWITCH: path or ""})[run]


@pytest.mark.engine
@pytest.mark.parametrize("path", [ExecutionPath.ONE_LAUNCH, ExecutionPath.DENSE], ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["CUDA graphs", "eager"])
def test_tokens_are_those_of_stock_experts(
    compiled: bool, path: ExecutionPath, reports: dict[str, tuple[Path, Report]], stock: list[Completion]
) -> None:
    """By our kernel, which must run or the engine does not start, and by vLLM's own on our shares of the files."""
    if path is ExecutionPath.ONE_LAUNCH and torch.cuda.get_device_capability() != ONE_LAUNCH_CAPABILITY:
        pytest.skip("the kernel is written for Hopper")
    ours = complete(reports["cuda"][0], "spense", compiled, path)
    require_same_or_tied(ours, stock, TIED, EXCEPTIONS)
