"""A mixture of experts pruned on a GPU, and served there: the same tokens as stock vLLM's dense experts.

pytest -m gpu --noconftest tests/gpu/test_experts.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engines import Completion, Run, differences, generate, on_one_gpu
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
STOCK = "stock"
PATHS = (ExecutionPath.ONE_LAUNCH.value, ExecutionPath.DENSE.value)


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
def completions(reports: dict[str, tuple[Path, Report]]) -> dict[tuple[str, bool], list[Completion]]:
    """By (what executes the experts, whether compiled), of what this GPU can run."""
    pytest.importorskip("vllm", reason="needs vLLM")
    cases = [(path, compiled) for path in (*PATHS, STOCK) if runs(path) for compiled in (False, True)]

    def complete(case: tuple[str, bool]) -> list[Completion]:
        path, compiled = case
        quantization = "compressed-tensors" if path == STOCK else "spense"
        run = Run(reports["cuda"][0], quantization, compiled=compiled, dtype="bfloat16", among_others=True)
        return generate([run], {SWITCH: "" if path == STOCK else path})[run]

    return on_one_gpu(complete, cases)


def runs(path: str) -> bool:
    """Whether this GPU has what executes the experts this way: our kernel is written for Hopper."""
    return path != ExecutionPath.ONE_LAUNCH or torch.cuda.get_device_capability() == ONE_LAUNCH_CAPABILITY


@pytest.mark.engine
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiled", [True, False], ids=["CUDA graphs", "eager"])
def test_tokens_are_those_of_stock_experts(
    compiled: bool,
    path: str,
    completions: dict[tuple[str, bool], list[Completion]],
    record_property: Callable[[str, object], None],
) -> None:
    """By our kernel, which must run or the engine does not start, and by vLLM's own on our shares of the files.

    Which of the experts a token goes to is as good as tied for some, so that stock's own two executions differ in most
    completions; their mean difference is the measure.
    """
    if not runs(path):
        pytest.skip("the kernel is written for Hopper")
    ours, stock, other = (completions[case] for case in ((path, compiled), (STOCK, compiled), (STOCK, not compiled)))
    found, usual = mean(differences(ours, stock)), mean(differences(other, stock))
    record_property(f"{path}, {'CUDA graphs' if compiled else 'eager'}", f"{found:.4f} nats, stock's own {usual:.4f}")
    assert found <= 2 * usual, (found, usual)
