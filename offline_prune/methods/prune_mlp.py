"""Pruning one gated MLP: the mathematics between its Hessians and its final weights.

Shapes that begin with … also take a batch of MLPs, a layer's experts, with the same regions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from offline_prune.methods.coordinate_descent import descend
from offline_prune.methods.dense_selection import (
    mixed_groups,
    order_by_priority,
    output_loss_priority,
    processing_order,
    sparsegpt_priority,
    spensegpt_plus_priority,
)
from offline_prune.methods.fp8 import COMPENSATION_HEADROOM, channel_scales, least_squares_scales, round_to_fp8
from offline_prune.methods.recipe import Grouping, Layout, Quantize, Recipe, Selection, Solver
from offline_prune.methods.sparsegpt import InverseFactor, inverse_factor, inverse_factors, sparsegpt
from offline_prune.methods.wanda import prune_by_score, wanda_scores
from offline_prune.runtime import deterministic_reduce, distributed
from offline_prune.runtime.matmul_precision import fast_matmul
from offline_prune.runtime.profiler import stage
from vllm_spense.format import Regions

#: Names a weight in errors; of a batch each of them.
Names = str | Sequence[str]


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: float32 (…, N, K), the values that inference will multiply with.
        scales: float32 (…, N, 1) of its FP8 form, or None.
        error: tr(Δ·H·Δᵀ) of each row, float32 (…, N): the squared error of that output over the calibration text.
        power: tr(W·H·Wᵀ) of each row, the square of the output itself.
        factor: of H, its columns in the order in which they were processed; None where nothing asked for one.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    error: torch.Tensor
    power: torch.Tensor
    factor: InverseFactor | None

    @property
    def damping(self) -> float | None:
        """λ / mean(diag H) that the factorization needed, of a batch the largest."""
        return self.factor.damping if self.factor else None

    def rows(self, order: torch.Tensor) -> Pruned:
        """Some rows, or all in another order.

        Args:
            order: int64 (n,), of a batch (E, n).
        """
        scales = None if self.scales is None else _rows(self.scales, order)
        return Pruned(
            _rows(self.weight, order), scales, _rows(self.error, order), _rows(self.power, order), self.factor
        )

    def each(self) -> list[Pruned]:
        """Of a batch."""
        count = len(self.weight)
        scales = [None] * count if self.scales is None else list(self.scales)
        factors = self.factor.each() if self.factor else [None] * count
        return [Pruned(*parts) for parts in zip(self.weight, scales, self.error, self.power, factors, strict=True)]


def _rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """tensor[order], or tensor[e][order[e]] of each e."""
    if order.ndim == 1:
        return tensor[order]
    return tensor[torch.arange(len(order), device=order.device)[:, None], order]


def select_and_prune(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    hessian: torch.Tensor,
    mid: torch.Tensor,
    regions: Regions,
    recipe: Recipe,
    layer: Names,
) -> tuple[Pruned, torch.Tensor]:
    """Chooses the order of one MLP's intermediate indices, and prunes gate and up in that order.

    Args:
        gate_up: float (…, 2·I, H), gate's rows first, in the original order.
        down: float (…, H, I), likewise.
        hessian: float32 (…, H, H).
        mid, layer: see `file_order`.

    Returns:
        Gate and up in file order, and that order, int64 (…, I): position in the file → original index.
    """
    what = f"{layer}: gate and up" if isinstance(layer, str) else [f"{each}: gate and up" for each in layer]
    all_rows_pruned = None
    if recipe.selection is Selection.OUTPUT_LOSS and regions.sparse and regions.dense:
        with stage("prune"):
            all_rows_pruned = prune_all_rows(gate_up, hessian, recipe, what)
    with stage("select"):
        gate, up = gate_up.chunk(2, -2)
        if isinstance(layer, str):
            order = file_order(gate, up, down, hessian, mid, regions, recipe, layer, all_rows_pruned)
        else:
            alone = all_rows_pruned.each() if all_rows_pruned else [None] * len(layer)
            order = torch.stack(
                [
                    file_order(gate[i], up[i], down[i], hessian[i], mid[i], regions, recipe, name, alone[i])
                    for i, name in enumerate(layer)
                ]
            )
        both = torch.cat([order, order + regions.intermediate], -1)
        if all_rows_pruned is not None:
            all_rows_pruned = all_rows_pruned.rows(both)
    with stage("prune"):
        return prune_gate_up(_rows(gate_up, both), hessian, regions, recipe, what, all_rows_pruned), order


def file_order(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    hessian_in: torch.Tensor,
    mid: torch.Tensor,
    regions: Regions,
    recipe: Recipe,
    layer: str,
    all_rows_pruned: Pruned | None = None,
) -> torch.Tensor:
    """Chooses the dense indices, and which of the others share a group of four.

    Args:
        gate, up: float (I, H).
        down: float (H, I).
        hessian_in: (H, H).
        mid: H of down's inputs, (I, I), or its diagonal (I,); `sparsegpt-score` needs the whole.
        layer: the MLP's name, for errors and for the seed of `random`.
        all_rows_pruned: what `prune_all_rows` made of gate and up, for `output-loss`.

    Returns:
        int64 (I,): position in the file → original index.
    """
    energy = mid if mid.ndim == 1 else mid.diagonal()
    order = torch.arange(regions.intermediate, device=gate.device)
    selection = recipe.selection
    if selection is not Selection.LAST and regions.sparse and regions.dense:
        if selection is Selection.RANDOM:
            seed = random_seed(layer, recipe.seed)
            priority = torch.rand(regions.intermediate, generator=torch.Generator().manual_seed(seed)).to(gate.device)
        elif selection is Selection.SPARSEGPT_SCORE:
            pivots_in = inverse_factor(hessian_in, recipe.damping, f"{layer}: gate and up").upper.diagonal()
            pivots_mid = inverse_factor(mid, recipe.damping, f"{layer}: down").upper.diagonal()
            priority = sparsegpt_priority(gate, up, down, pivots_in, pivots_mid)
        elif selection is Selection.OUTPUT_LOSS:
            assert all_rows_pruned is not None, "the selection by output loss looks at pruned rows"
            priority = output_loss_priority(down, energy, all_rows_pruned.error, all_rows_pruned.power)
        else:
            priority = spensegpt_plus_priority(gate, up, down, hessian_in.diagonal(), energy)
        order = order_by_priority(priority, regions)
    if recipe.grouping is Grouping.MIXED:
        return mixed_groups(order, wanda_scores(down, energy).sum(0), regions)
    return order


def random_seed(layer: str, seed: int) -> int:
    """Of a layer's own random order: layers share none, nor do runs with other seeds."""
    return int.from_bytes(hashlib.sha256(f"{seed} {layer}".encode()).digest()[:8], "little")


def prune_all_rows(gate_up: torch.Tensor, hessian: torch.Tensor, recipe: Recipe, layer: Names) -> Pruned:
    """Prunes gate and up as if no row stayed dense, without rounding.

    Args:
        gate_up: float (…, 2·I, H), gate's rows first.
        hessian: float32 (…, H, H).
    """
    rows, columns = (torch.ones(size, dtype=torch.bool, device=gate_up.device) for size in gate_up.shape[-2:])
    return _prune(gate_up, hessian, rows, columns, replace(recipe, quantize=Quantize.NONE), layer)


def prune_gate_up(
    gate_up: torch.Tensor,
    hessian: torch.Tensor,
    regions: Regions,
    recipe: Recipe,
    layer: Names,
    all_rows_pruned: Pruned | None = None,
) -> Pruned:
    """Prunes gate and up together, which share their inputs.

    Args:
        gate_up: float (…, 2·I, H), gate's rows first, both in file order.
        hessian: float32 (…, H, H).
        all_rows_pruned: what `prune_all_rows` made of these rows, in file order too: what it has is not done again.
    """
    return _prune(gate_up, hessian, *_gate_up_regions(gate_up, regions), recipe, layer, all_rows_pruned)


def round_gate_up(
    gate_up: torch.Tensor, factor: InverseFactor, regions: Regions, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sends gate and up, 2:4 in their sparse rows, through the column loop for their rounding.

    Args:
        gate_up: float (2·I, H), as `prune_gate_up` takes it.
        factor: `Pruned.factor` of what that returned.

    Returns:
        float32 (2·I, H), FP8's values, and their scales (2·I, 1).
    """
    return _rounded(gate_up.float(), factor, *_gate_up_regions(gate_up, regions), recipe)


def _gate_up_regions(gate_up: torch.Tensor, regions: Regions) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (2·I,) and (H,): which rows and columns are 2:4."""
    rows = torch.arange(regions.intermediate, device=gate_up.device) < regions.sparse
    return rows.repeat(2), torch.ones(gate_up.shape[-1], dtype=torch.bool, device=gate_up.device)


def prune_down(
    down: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    regions: Regions,
    recipe: Recipe,
    layer: Names,
) -> Pruned:
    """Prunes the first S columns of down.

    Args:
        down: float (…, H, I), columns in file order.
        hessian: float32 (…, I, I), in file order.
        order: (I,), position in the file → original index; decides the processing order of layout `none`, which so
            takes only batches of one.
    """
    steps = processing_order(order, regions, recipe.layout)
    rows = torch.ones(down.shape[-2], dtype=torch.bool, device=down.device)
    if recipe.layout is Layout.BACK:
        # Nothing moves, and another Hessian would need as much memory as the first.
        return _prune(down, hessian, rows, steps < regions.sparse, recipe, layer)
    moved = hessian[..., steps, :][..., steps]
    pruned = _prune(down[..., steps], moved, rows, steps < regions.sparse, recipe, layer)
    return replace(pruned, weight=pruned.weight[..., steps.argsort()].contiguous())


def round_down(
    down: torch.Tensor, factor: InverseFactor, order: torch.Tensor, regions: Regions, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `round_gate_up`, for down (H, I) as `prune_down` takes it."""
    steps = processing_order(order, regions, recipe.layout)
    rows = torch.ones(len(down), dtype=torch.bool, device=down.device)
    weight, scales = _rounded(down[:, steps].float(), factor, rows, steps < regions.sparse, recipe)
    return weight[:, steps.argsort()].contiguous(), scales


def _prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    recipe: Recipe,
    layer: Names,
    all_rows_pruned: Pruned | None = None,
) -> Pruned:
    weight = weight.float()
    factor = all_rows_pruned.factor if all_rows_pruned else None
    compensates, passes = recipe.solver is Solver.SPARSEGPT, recipe.descent_passes
    if factor is None and (compensates or passes):
        if isinstance(layer, str):
            factor = inverse_factor(hessian, recipe.damping, layer)
        else:
            factor = inverse_factors(hessian, recipe.damping, layer)

    def unrounded(rows: slice) -> torch.Tensor:
        chunk, sparse = weight[..., rows, :], sparse_rows[rows]
        if compensates and factor:
            result = sparsegpt(
                chunk, factor, sparse_rows=sparse, sparse_columns=sparse_columns, row_chunks=_row_chunks()
            )
        else:
            energy = hessian.diagonal(dim1=-2, dim2=-1)
            scores = wanda_scores(chunk, energy) if recipe.solver is Solver.WANDA else chunk.abs()
            result = prune_by_score(chunk, scores, sparse_rows=sparse, sparse_columns=sparse_columns)
        if not factor:
            return result
        return descend(
            chunk,
            result,
            hessian,
            factor.damping if isinstance(layer, str) else factor.dampings,
            sparse_rows=sparse,
            sparse_columns=sparse_columns,
            passes=passes,
            row_chunks=_row_chunks(),
        )

    result, scales = weight, None
    if recipe.prunes_unrounded:
        if all_rows_pruned is None:
            result = distributed.row_parallel(weight.shape[-2], unrounded)
        else:
            result = torch.where(sparse_rows[:, None], all_rows_pruned.weight, weight)
    if recipe.rounds_inside:
        assert factor is not None
        result, scales = _rounded(result, factor, sparse_rows, sparse_columns, recipe)
    elif recipe.quantize is Quantize.FP8:
        scales = _scale_rule(recipe)(result)
        result = round_to_fp8(result, scales)
    return Pruned(result, scales, _row_power(result - weight, hessian), _row_power(weight, hessian), factor)


def _rounded(
    weight: torch.Tensor,
    factor: InverseFactor,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    recipe: Recipe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight out of the column loop that rounds to FP8, and prunes what is not yet 2:4; and its scales."""
    scales = _scale_rule(recipe)(weight, COMPENSATION_HEADROOM)

    def rounded(rows: slice) -> torch.Tensor:
        return sparsegpt(
            weight[..., rows, :],
            factor,
            sparse_rows=sparse_rows[rows],
            sparse_columns=sparse_columns,
            scales=scales[..., rows, :],
            row_chunks=_row_chunks(),
        )

    return distributed.row_parallel(weight.shape[-2], rounded), scales


def _row_chunks() -> int:
    """Of this rank's rows, so that all ranks' make the same products however many ranks there are."""
    return deterministic_reduce.MAX_SHARDS // distributed.size()


def _scale_rule(recipe: Recipe) -> Callable[..., torch.Tensor]:
    return least_squares_scales if recipe.rounds_everywhere else channel_scales


def _row_power(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    with fast_matmul():
        return ((weight @ hessian) * weight).sum(-1)
