"""How a pruned layer runs on this machine: decided once, while the model loads, and asked inside the op at every run.

A custom op gets tensors and one string, and only inside of it the number of tokens is known: in a compiled graph it is
symbolic. So a plan has a `key`, which the layer passes to the op, and `plan_of(key, device)` is the same plan again.
Layers of the same problem share it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from vllm_spense.kernels.region_gemm.problem import DENSE_COPY, Problem, Scales
from vllm_spense.ops import path_kernels
from vllm_spense.ops.dense_copies import DenseCopies
from vllm_spense.ops.dispatch import SWITCH, Path, buckets, candidates, choose, in_words, reason_against, tokens_of
from vllm_spense.ops.machine import describe, forced
from vllm_spense.ops.path_timing import times

logger = logging.getLogger("vllm.spense")


class LayerPlan:
    """One pruned GEMM on one device.

    Args:
        problem: the GEMM.
        dense_copy: whether the packed weight has a dense copy beside it.

    Attributes:
        key: problem and dense copy in one string, for the op.
        paths: the candidates; the weight is packed for each of them.
        tensors: names of the packed tensors, in the op's order. The tensors themselves are the layer's parameters:
            vLLM replaces what those hold when it reloads a model or wakes it up.
        us: what was measured, by number of tokens and path, where a measurement was needed.

    Raises:
        SpenseError: `SPENSE_PATH` names a path that cannot run this problem on this device.
    """

    def __init__(self, problem: Problem, device: torch.device, dense_copy: bool = False) -> None:
        self.problem = problem
        self.device = device
        self.key = op_key(problem, dense_copy)
        self.paths = candidates(problem, describe(device), forced(), dense_copy)
        self.tensors = path_kernels.tensor_names(self.paths)
        self.us: dict[int, Mapping[str, float]] = {}
        self._chosen: dict[int, Path] = {}
        self._prepared_to = 0

    def path(self, tokens: int) -> Path:
        """The path for `tokens` rows of activations. By powers of two, so that it is decided once for each.

        Raises:
            RuntimeError: paths would have to be timed while a CUDA graph is being captured.
        """
        bucket = 1 << (tokens - 1).bit_length()
        if bucket not in self._chosen:
            self._chosen[bucket] = choose(self.paths, bucket, lambda contenders: self._times(contenders, bucket))
        return self._chosen[bucket]

    def _times(self, contenders: tuple[Path, ...], tokens: int) -> Mapping[str, float]:
        self.us[tokens] = times(contenders, self.problem, tokens, self.device)
        return self.us[tokens]

    def prepare(self, max_tokens: int) -> None:
        """Makes whatever is slow to make, for up to `max_tokens` rows of activations, and logs which path runs when."""
        if max_tokens <= self._prepared_to:
            return
        self._prepared_to = max_tokens
        for path in self.paths:
            if span := tokens_of(path, self.paths, max_tokens):
                path_kernels.kernel(path).prepare(self.problem, *span, self.device)
        problem, on = self.problem, describe(self.device)
        logger.info(
            "Spense: %s-split %d × %d, 2:4 in %d and dense in %d, runs on %s by the %s path",
            problem.split,
            problem.n,
            problem.k,
            problem.projections * problem.regions.sparse,
            problem.projections * problem.regions.dense,
            on,
            in_words((self.path(tokens), tokens) for tokens in buckets(max_tokens)),
        )
        if self.device.type == "cuda" and Path.REFERENCE in self.paths:
            logger.warning(
                "Spense: the reference path is slow on a GPU; the library path is not taken because %s",
                reason_against(Path.LIBRARY, problem, on) or f"{SWITCH} says so",
            )

    def run(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], scales: Scales | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x · Wᵀ by the path for x's number of tokens, of the tensors that `tensors` names; as `path_kernels.run`."""
        packed = dict(zip(self.tensors, tensors, strict=True))
        return path_kernels.run(self.path(x.shape[0]), x, packed, self.problem, scales)


def op_key(problem: Problem, dense_copy: bool) -> str:
    """How an op is told its plan: of what an op may take beside tensors, one string costs the host least."""
    return f"{problem.op_key} {DENSE_COPY}" if dense_copy else problem.op_key


@cache
def problem_of(key: str) -> Problem:
    """The problem of a plan's key."""
    return Problem.from_op_key(key.split(" ")[0])


@cache
def plan_of(key: str, device: torch.device) -> LayerPlan:
    """The plan with this key: the same object for every layer and every call."""
    return LayerPlan(problem_of(key), device, dense_copy=key.endswith(f" {DENSE_COPY}"))


def pack(weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """The weight as every path wants it that may run on the weight's device, without a dense copy.

    Args:
        weight: (N, K) FP8 E4M3; in each of the problem's projections the sparse region first along its split.

    Returns:
        The plan's `tensors`; none shares memory with `weight`.
    """
    return path_kernels.pack(weight, problem, plan_of(problem.op_key, weight.device).paths)


def plan_layer(
    weight: torch.Tensor, problem: Problem, layer: str, max_tokens: int, copies: DenseCopies
) -> tuple[LayerPlan, dict[str, torch.Tensor]]:
    """Packs a layer's weight, and makes the plan that runs it.

    Args:
        weight: as `pack` takes it; the layer must not use it any more.
        layer: its name.
        max_tokens: the most rows of activations that it will get.
        copies: of the model's layers.

    Returns:
        The plan, and its `tensors`.
    """
    packed = pack(weight, problem)
    dense_copy = copies.grant(layer, problem, max_tokens, weight.device)
    if dense_copy:
        # Itself, because a copy of it would need room for both.
        packed[DENSE_COPY] = weight
    plan = plan_of(op_key(problem, dense_copy), weight.device)
    assert plan.tensors == tuple(packed), (plan.tensors, tuple(packed))
    plan.prepare(max_tokens)
    return plan, packed
