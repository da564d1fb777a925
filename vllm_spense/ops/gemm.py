"""The custom op of a pruned layer's GEMM, `spense::region_gemm`, and the library that all of Spense's ops are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_spense.kernels.region_gemm.problem import DENSE_COPY, Problem, Scales
from vllm_spense.ops.dispatch import ONE_LAUNCH_CAPABILITY, Path, reason_against
from vllm_spense.ops.layer_plan import op_key, plan_of, problem_of
from vllm_spense.ops.machine import describe

# Torch removes the ops of a library object that is collected.
LIBRARY = torch.library.Library("spense", "FRAGMENT")


def region_gemm(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], key: str, scales: Scales | None = None
) -> torch.Tensor:
    """X·Wᵀ of both regions: raw sums, or multiplied by the scales if the problem is scaled.

    Args:
        x: (M, K) FP8 E4M3.
        tensors: the packed W, as the plan's `tensors` names them.
        key: the plan's.
        scales: of a scaled problem's tokens and rows.

    Returns:
        (M, N) in the problem's out_dtype, columns in the order of W's rows.
    """
    return torch.ops.spense.region_gemm(x, list(tensors), key, *(scales or (None, None)))


def applies_scales(problem: Problem, device: torch.device) -> bool:
    """Whether this GEMM has a kernel of ours on a device that multiplies by the scales as well, if it is scaled."""
    here = describe(device)
    # The libraries' GEMMs are followed by a kernel that is made for what the one-launch path is.
    known = here.capability == ONE_LAUNCH_CAPABILITY and reason_against(Path.LIBRARY, problem, here) is None
    return known and problem.out_dtype == torch.bfloat16


def op_arguments(packed: Mapping[str, torch.Tensor], problem: Problem) -> tuple[list[torch.Tensor], str]:
    """`tensors` and `key` of a weight that `layer_plan.pack` packed, perhaps with a dense copy added."""
    return list(packed.values()), op_key(problem, DENSE_COPY in packed)


def _region_gemm(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    key: str,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    scales = None if x_scale is None or w_scale is None else (x_scale, w_scale)
    out, addend = plan_of(key, x.device).run(x, tensors, scales)
    return out if addend is None else out.add_(addend)


def _region_gemm_fake(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    key: str,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    problem = problem_of(key)
    return x.new_empty((x.shape[0], problem.n), dtype=problem.out_dtype)


LIBRARY.define("region_gemm(Tensor x, Tensor[] tensors, str key, Tensor? x_scale=None, Tensor? w_scale=None) -> Tensor")
LIBRARY.impl("region_gemm", _region_gemm, "CompositeExplicitAutograd")
torch.library.register_fake("spense::region_gemm", _region_gemm_fake, lib=LIBRARY)
