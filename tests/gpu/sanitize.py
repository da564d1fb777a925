"""Every kernel of ours, on sizes that end within tiles, for NVIDIA's sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 1 \\
        python tests/gpu/sanitize.py

Without torch's cache every tensor is an allocation of its own, so that what lies beyond it is nobody's. Errors of the
API are those of CUDA's bindings for Python, which ask for functions that a driver need not have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vllm_spense.format import Regions
from vllm_spense.kernels.elementwise import norm_quant, silu_mul_quant
from vllm_spense.kernels.one_launch.schedule import Tiling
from vllm_spense.kernels.region_gemm import library, one_launch
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight, unit_scales


def main() -> None:
    device = torch.device("cuda", 0)
    for kernel in (one_launch, silu_mul_quant, norm_quant):
        if reason := kernel.fault(device):
            sys.exit(f"{kernel.__name__}: {reason}")
    # The libraries, and the next kernel that adds and scales.
    for problem in (
        Problem(160, 1216, Regions(704, 512), "input", scaled=True),
        Problem(640, 320, Regions(192, 128), "output", projections=2, scaled=True),
    ):
        packed = library.pack(random_weight(problem, device), problem)
        for tokens in (1, 40, 530):
            x, scales = random_fp8(tokens, problem.k, device), unit_scales(problem, tokens, device)
            for concurrent, sms in ((False, 0), (True, 0), (True, 52)):
                choice = library.Choice(concurrent=concurrent, sms=sms)
                plan = library.LibraryPlan(problem, library.padded(tokens), device, choice)
                plan.run(x, packed, scales=scales)
            for tiling in (Tiling(one_launch.tile_tokens(tokens), 128, splits) for splits in (0, 3)):
                plan = one_launch.OneLaunchPlan(problem, tokens, device, tiling)
                plan.run(x, packed, scales=scales)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
