"""Which pruned layers of a model also keep their weight uncompressed, for a dense GEMM where that is faster."""

from __future__ import annotations

import logging
import os

import torch

from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.ops.dispatch import GRANT, Path, buckets, candidates, candidates_at, granted_bytes
from vllm_spense.ops.machine import describe, forced
from vllm_spense.ops.path_timing import times

logger = logging.getLogger("vllm.spense")

#: A dense GEMM must take at most this share of the time to be worth a copy of the weight.
_WORTH_A_COPY = 0.98


class DenseCopies:
    """The dense copies of one model's layers on one rank, within the budget that `SPENSE_DENSE_COPY_GIB` sets."""

    def __init__(self) -> None:
        #: Layer → bytes of its copy.
        self._bytes: dict[str, int] = {}
        self._gains: dict[tuple[Problem, int, torch.device], bool] = {}

    def grant(self, layer: str, problem: Problem, max_tokens: int, device: torch.device) -> bool:
        """Whether a layer shall keep a copy: a dense GEMM is faster for some number of tokens up to `max_tokens`, and
        the budget has room for it. A layer that is loaded again has its copy again.

        Raises:
            SpenseError: `SPENSE_DENSE_COPY_GIB` is no size.
        """
        budget, size = granted_bytes(os.environ.get(GRANT)), problem.n * problem.k
        if not budget or forced() or not self._pays(problem, max_tokens, device):
            return False
        others = sum(taken for name, taken in self._bytes.items() if name != layer)
        if others + size > budget:
            logger.info("Spense: no dense copy of %s: %s=%s is used up", layer, GRANT, os.environ[GRANT])
            return False
        self._bytes[layer] = size
        return True

    def _pays(self, problem: Problem, max_tokens: int, device: torch.device) -> bool:
        """Whether a copy of this weight is worth its memory; measured and said once for each kind of layer."""
        key = problem, max_tokens, device
        if key not in self._gains:
            faster_at = [tokens for tokens in buckets(max_tokens) if _dense_is_faster(problem, tokens, device)]
            self._gains[key] = bool(faster_at)
            if faster_at:
                ranges = ", ".join(f"{most // 2 + 1} to {most}" for most in faster_at)
                logger.info(
                    "Spense: a dense copy of each %d × %d, %.0f MiB, is faster with %s tokens",
                    problem.n, problem.k, problem.n * problem.k / 2**20, ranges,
                )  # fmt: skip
        return self._gains[key]


def _dense_is_faster(problem: Problem, tokens: int, device: torch.device) -> bool:
    """Whether the dense path is clearly faster than everything that would run without a copy."""
    paths = candidates(problem, describe(device), dense_copy=True)
    contenders = candidates_at(tokens, paths)
    if Path.DENSE not in contenders or Path.LIBRARY not in paths:
        return False
    us = times(contenders, problem, tokens, device)
    return us[Path.DENSE] <= _WORTH_A_COPY * min(us[path] for path in contenders if path is not Path.DENSE)
