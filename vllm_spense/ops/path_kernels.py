"""Every path's kernel: which module it is, what it must offer, and one way to run it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Protocol, cast

import torch

from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.ops.dispatch import Path

#: The package of the paths' modules.
KERNELS = "vllm_spense.kernels.region_gemm"

Packed = Mapping[str, torch.Tensor]


class Kernel(Protocol):
    """What a path's module offers. Where two of them give a tensor the same name, it is the same tensor."""

    #: Names of the tensors that `pack` returns, in its order.
    TENSORS: tuple[str, ...]

    def pack(self, weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]: ...

    def prepare(self, problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None: ...

    def run(self, x: torch.Tensor, packed: Packed, problem: Problem, scales: Scales | None = None) -> torch.Tensor: ...


class TunedKernel(Kernel, Protocol):
    """A kernel that was searched for, and competes with others."""

    def found(self, problem: Problem, tokens: int, device: torch.device) -> dict[str, object]:
        """What runs M = `tokens`, as JSON."""


@cache
def kernel(path: Path) -> Kernel:
    """The module of a path, imported when it is first needed: not every machine has every library."""
    return cast(Kernel, importlib.import_module(f"{KERNELS}.{path.name.lower()}"))


def tensor_names(paths: Iterable[Path]) -> tuple[str, ...]:
    """Of the tensors that `pack` returns for these paths, in its order."""
    return tuple(dict.fromkeys(name for path in paths for name in kernel(path).TENSORS))


def pack(weight: torch.Tensor, problem: Problem, paths: Iterable[Path]) -> dict[str, torch.Tensor]:
    """The weight as each of these paths wants it; no tensor shares memory with `weight`.

    Args:
        weight: (N, K) FP8 E4M3; in each of the problem's projections the sparse region first along its split.
    """
    packed: dict[str, torch.Tensor] = {}
    # Paths that share their bytes share the function.
    for pack_for in dict.fromkeys(kernel(path).pack for path in paths):
        packed |= pack_for(weight, problem)
    return packed


def run(
    path: Path, x: torch.Tensor, packed: Packed, problem: Problem, scales: Scales | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x · Wᵀ by one path: (M, N) in the problem's out_dtype, and what is still to be added to it, if anything.

    There is something to add only of a problem with `separate_outputs`, from the one path that makes two outputs.
    """
    if path is Path.LIBRARY and problem.separate_outputs:
        from vllm_spense.kernels.region_gemm import library

        return library.sums(x, packed, problem)
    return kernel(path).run(x, packed, problem, scales), None
