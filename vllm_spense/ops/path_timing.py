"""How long each path takes on this machine, where only a measurement can tell which is faster."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import cast

import torch

from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.ops import path_kernels
from vllm_spense.ops.dispatch import Path
from vllm_spense.ops.path_kernels import Packed, TunedKernel


@cache
def times(paths: tuple[Path, ...], problem: Problem, tokens: int, device: torch.device) -> Mapping[str, float]:
    """µs of one call of each path; measured once on a machine, for every process.

    Raises:
        RuntimeError: a measurement would be needed while a CUDA graph is being captured.
    """
    from vllm_spense.kernels.tuning.compare import compare

    def run(path: Path, x: torch.Tensor, packed: Packed, scales: Scales | None) -> object:
        return path_kernels.run(path, x, packed, problem, scales)

    found = {path.value: cast(TunedKernel, path_kernels.kernel(path)).found(problem, tokens, device) for path in paths}
    runs = {path.value: partial(run, path) for path in paths}
    return compare(problem, tokens, device, runs, lambda weight: path_kernels.pack(weight, problem, paths), found)
