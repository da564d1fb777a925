"""Pruning one gated MLP: the mathematics between its Hessians and its final weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offline_prune import parts, ranks
from offline_prune.precision import fast_matmul
from offline_prune.quantize import COMPENSATION_HEADROOM, channel_scales, least_squares_scales, round_to_fp8
from offline_prune.select import (
    mixed_groups,
    order_by_priority,
    output_loss_priority,
    processing_order,
    sparsegpt_priority,
    spensegpt_plus_priority,
)
from offline_prune.settings import PruneSettings
from offline_prune.sparsegpt import inverse_factor, sparsegpt
from offline_prune.wanda import prune_by_score, wanda_scores
from vllm_spense.format import Regions


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: float32 (N, K), the values that inference will multiply with.
        scales: float32 (N, 1) of its FP8 form, or None.
        error: tr(Δ·H·Δᵀ) of each row, float32 (N,): the squared error of that output over the calibration text.
        power: tr(W·H·Wᵀ) of each row, the square of the output itself.
        damping: λ / mean(diag H) that SparseGPT needed, None for other solvers.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    error: torch.Tensor
    power: torch.Tensor
    damping: float | None


def file_order(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    hessian_in: torch.Tensor,
    mid: torch.Tensor,
    regions: Regions,
    settings: PruneSettings,
    layer: str,
) -> torch.Tensor:
    """Chooses the dense indices, and which of the others share a group of four.

    Args:
        gate, up: float (I, H).
        down: float (H, I).
        hessian_in: (H, H).
        mid: H of down's inputs, (I, I), or its diagonal (I,); `sparsegpt-score` needs the whole.
        layer: the MLP's name, for errors and for the seed of `random`.

    Returns:
        int64 (I,): position in the file → original index.
    """
    energy = mid if mid.ndim == 1 else mid.diagonal()
    order = torch.arange(regions.intermediate, device=gate.device)
    selection = settings.wanted_selection
    if selection != "last" and regions.sparse and regions.dense:
        if selection == "random":
            seed = sum(layer.encode()) * 1_000_003 + settings.seed
            priority = torch.rand(regions.intermediate, generator=torch.Generator().manual_seed(seed)).to(gate.device)
        elif selection == "sparsegpt-score":
            pivots_in = inverse_factor(hessian_in, settings.damping, f"{layer}: gate and up").upper.diagonal()
            pivots_mid = inverse_factor(mid, settings.damping, f"{layer}: down").upper.diagonal()
            priority = sparsegpt_priority(gate, up, down, pivots_in, pivots_mid)
        elif selection == "output-loss":
            power = _row_power(gate.float(), hessian_in), _row_power(up.float(), hessian_in)
            priority = output_loss_priority(gate, up, down, hessian_in.diagonal(), energy, power)
        else:
            priority = spensegpt_plus_priority(gate, up, down, hessian_in.diagonal(), energy)
        order = order_by_priority(priority, regions)
    if settings.wanted_grouping == "mixed":
        return mixed_groups(order, wanda_scores(down, energy).sum(0), regions)
    return order


def prune_gate_up(
    gate_up: torch.Tensor, hessian: torch.Tensor, regions: Regions, settings: PruneSettings, layer: str
) -> Pruned:
    """Prunes gate and up together, which share their inputs.

    Args:
        gate_up: float (2·I, H), gate's rows first, both in file order.
        hessian: float32 (H, H).
    """
    rows = torch.zeros(regions.intermediate, dtype=torch.bool, device=gate_up.device)
    rows[: regions.sparse] = True
    columns = torch.ones(gate_up.shape[1], dtype=torch.bool, device=gate_up.device)
    return _prune(gate_up, hessian, rows.repeat(2), columns, settings, layer)


def prune_down(
    down: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    regions: Regions,
    settings: PruneSettings,
    layer: str,
) -> Pruned:
    """Prunes the first S columns of down.

    Args:
        down: float (H, I), columns in file order.
        hessian: float32 (I, I), in file order.
        order: (I,), position in the file → original index; decides the processing order of layout `none`.
    """
    steps = processing_order(order, regions, settings.layout)
    rows = torch.ones(len(down), dtype=torch.bool, device=down.device)
    if settings.layout == "back":
        # Nothing moves, and another Hessian would need as much memory as the first.
        return _prune(down, hessian, rows, steps < regions.sparse, settings, layer)
    pruned = _prune(down[:, steps], hessian[steps][:, steps], rows, steps < regions.sparse, settings, layer)
    back = steps.argsort()
    return Pruned(pruned.weight[:, back].contiguous(), pruned.scales, pruned.error, pruned.power, pruned.damping)


def _prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    settings: PruneSettings,
    layer: str,
) -> Pruned:
    weight = weight.float()
    damping = None
    rule = least_squares_scales if settings.rounds_everywhere else channel_scales
    scales = rule(weight, COMPENSATION_HEADROOM) if settings.rounds_inside else None
    if settings.solver == "sparsegpt":
        factor = inverse_factor(hessian, settings.damping, layer)
        damping = factor.damping

        def pruned(rows: slice) -> torch.Tensor:
            return sparsegpt(
                weight[rows],
                factor,
                sparse_rows=sparse_rows[rows],
                sparse_columns=sparse_columns,
                scales=None if scales is None else scales[rows],
                row_parts=parts.MOST // ranks.size(),
            )

        result = ranks.divided(len(weight), pruned)
    else:
        scores = wanda_scores(weight, hessian.diagonal()) if settings.solver == "wanda" else weight.abs()
        result = prune_by_score(weight, scores, sparse_rows=sparse_rows, sparse_columns=sparse_columns)
    if settings.quantize == "fp8" and scales is None:
        scales = rule(result)
        result = round_to_fp8(result, scales)
    delta = result - weight
    return Pruned(result, scales, _row_power(delta, hessian), _row_power(weight, hessian), damping)


def _row_power(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    with fast_matmul():
        return ((weight @ hessian) * weight).sum(1)
