"""FP8 for the linear layers of a block that are not pruned: attention's, above all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from offline_prune.calibration.hessian import Hessian
from offline_prune.calibration.hidden_states import ShardObserver
from offline_prune.methods.fp8 import channel_scales, least_squares_scales, round_to_fp8
from offline_prune.methods.sparsegpt import inverse_factor, sparsegpt
from offline_prune.runtime import deterministic_reduce, distributed


class InputHessians:
    """H = Σ x·xᵀ of the inputs of some linear layers; those that see the same tensor, as q, k and v do, share one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hessians: dict[tuple[str, ...], Hessian] = {}
        self._last: tuple[tuple[str, ...], torch.Tensor] = (), torch.empty(0)

    def observers(self, layers: Sequence[str]) -> Mapping[str, ShardObserver]:
        """For `Stream.advance`: what adds a layer's inputs, by the layer's name inside the block."""
        return {name: partial(self._add, name) for name in layers}

    def groups(self) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
        """Layers and their H, float32 (K, K). Nothing can be added after this."""
        self._last = (), torch.empty(0)
        for names in list(self._hessians):
            yield names, self._hessians.pop(names).matrix()

    def _add(self, name: str, inputs: torch.Tensor, shard: int) -> None:
        group, seen = self._last
        # While the last inputs are held here, no others can be at their address.
        if seen.data_ptr() == inputs.data_ptr() and seen.shape == inputs.shape:
            if name not in group:
                self._hessians[(*group, name)] = self._hessians.pop(group)
                group = (*group, name)
        else:
            group = next((names for names in self._hessians if name in names), (name,))
            self._hessians.setdefault(group, Hessian(inputs.shape[-1], self._device)).add(inputs, shard)
        self._last = group, inputs


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's nearest FP8 values as float32 (N, K), and their scales (N, 1)."""
    scales = channel_scales(weight)
    return round_to_fp8(weight, scales), scales


def compensated(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float, layer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nearest`, in a column loop without sparse columns, which is GPTQ (Frantar et al. 2023): each column's
    rounding error is spread over the columns after it such that the outputs change least.

    Args:
        weight: float (N, K).
        hessian: float32 (K, K) of its inputs.
        damping: see `inverse_factor`.
        layer: named in errors.
    """
    scales = least_squares_scales(weight)
    factor = inverse_factor(hessian, damping, layer)

    def rounded(rows: slice) -> torch.Tensor:
        return sparsegpt(
            weight[rows],
            factor,
            sparse_rows=torch.zeros(len(weight[rows]), dtype=torch.bool, device=weight.device),
            sparse_columns=torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device),
            scales=scales[rows],
            row_chunks=deterministic_reduce.MAX_SHARDS // distributed.size(),
        )

    return distributed.row_parallel(len(weight), rounded), scales
