"""Which intermediate indices stay dense, which share a group, and in which order the columns of down are processed."""

from __future__ import annotations

import hashlib

import torch

from offline_prune.methods.recipe import Layout
from offline_prune.methods.wanda import wanda_scores
from vllm_spense.format import GROUP, KEPT, Regions


def spensegpt_plus_priority(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, energy_in: torch.Tensor, energy_mid: torch.Tensor
) -> torch.Tensor:
    """SpenseGPT+'s estimate of the loss that pruning an intermediate index would cause (equations 9 to 11).

    p[i] = ŝ_gate[i] + ŝ_up[i] + ŝ_down[i], where s sums S_ij = W_ij²·H_jj over gate's row i, up's row i and
    down's column i, and ŝ is s divided by its mean.

    Args:
        gate, up: float (I, H).
        down: float (H, I).
        energy_in: (H,), diagonal of the Hessian of the inputs of gate and up.
        energy_mid: (I,), diagonal of the Hessian of the inputs of down.

    Returns:
        float32 (I,).
    """
    return _priority(
        wanda_scores(gate, energy_in).sum(1),
        wanda_scores(up, energy_in).sum(1),
        wanda_scores(down, energy_mid).sum(0),
    )


def sparsegpt_priority(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, pivots_in: torch.Tensor, pivots_mid: torch.Tensor
) -> torch.Tensor:
    """As `spensegpt_plus_priority` with SparseGPT's saliency W_ij² / U_jj² in place of S_ij (equation 13).

    Args:
        pivots_in: (H,), diagonal of the inverse factor U of the inputs of gate and up.
        pivots_mid: (I,), likewise for down.
    """
    return spensegpt_plus_priority(gate, up, down, pivots_in.square().reciprocal(), pivots_mid.square().reciprocal())


def output_loss_priority(
    down: torch.Tensor, energy_mid: torch.Tensor, error: torch.Tensor, power: torch.Tensor
) -> torch.Tensor:
    """The squared error that an intermediate index adds to the MLP's output once it is 2:4.

    Pruning row i of gate takes the share λ_gate[i] of the square of its output, that of up λ_up[i]; both errors reach
    z_i = f(g_i)·u_i about as large, relative to it, and go on through down's column i. There 2:4 takes the share φ of
    what columns carry, which depends on their neighbours and so is taken to be the same for all. Of independent errors
    squares add up:

    p[i] = s_down[i] · (λ_gate[i] + λ_up[i] + φ),  λ[i] = error[i] / power[i]

    with s_down[i] = Σ_j W_ji²·H_ii over down's column i, the square of what z_i does to the output, and φ the share of
    all s_down that is in the two weakest of every four columns.

    Args:
        down: float (H, I).
        energy_mid: (I,), diagonal of the Hessian of the inputs of down.
        error, power: (Δ·H·Δᵀ)_ii of gate's rows, pruned without exception, and then of up's, and (W·H·Wᵀ)_ii; float
            (2·I,).

    Returns:
        float32 (I,).
    """
    carried = wanda_scores(down, energy_mid)
    in_gate, in_up = (error / _positive(power)).chunk(2)
    in_down = _weakest(carried).sum() / _positive(carried.sum())
    # A share of next to nothing may be infinite; a column that carries nothing is worth nothing all the same.
    return (carried.sum(0) * (in_gate + in_up + in_down)).nan_to_num()


def _weakest(scores: torch.Tensor) -> torch.Tensor:
    """The two smallest of every four in a row."""
    return scores.unflatten(1, (-1, GROUP)).sort(-1).values[..., : GROUP - KEPT].flatten(1)


def _positive(values: torch.Tensor) -> torch.Tensor:
    # Of an all-zero projection 0 / 0 would turn every priority into NaN.
    return values.clamp_min(torch.finfo(values.dtype).tiny)


def _priority(*scores: torch.Tensor) -> torch.Tensor:
    # An all-zero projection has no say, rather than turning every priority into NaN.
    return torch.stack([score / _positive(score.mean()) for score in scores]).sum(0)


def order_by_priority(priority: torch.Tensor, regions: Regions) -> torch.Tensor:
    """The `regions.dense` indices of largest priority go to the back; both regions keep their original order.

    Args:
        priority: (I,).

    Returns:
        int64 (I,): position in the file → original index. Of equal priorities the later index is dense, so a
        constant priority is the selection `last`.
    """
    ranking = priority.argsort(stable=True)
    sparse = ranking[: regions.sparse].sort().values
    dense = ranking[regions.sparse :].sort().values
    return torch.cat([sparse, dense])


def mixed_groups(order: torch.Tensor, strength: torch.Tensor, regions: Regions) -> torch.Tensor:
    """Deals the sparse indices into groups of four such that each has two of the stronger half and two of the weaker.

    2:4 takes two of every four weights of down, so a group of four strong columns loses two strong ones, while beside
    it a group of weak columns keeps two weak ones. Intermediate indices may stand in any order, so it need not be.

    Args:
        order: int64 (I,), position in the file → original index.
        strength: (I,) of the original indices: what removing the column of down would cost.

    Returns:
        int64 (I,): as `order`, with the same indices in the sparse region; groups go from strong to weak.
    """
    sparse = order[: regions.sparse]
    quarters = sparse[strength[sparse].argsort(descending=True, stable=True)].view(GROUP, -1)
    # The strongest of all comes together with the weakest of the stronger half, and so in the weaker half.
    quarters[1::2] = quarters[1::2].flip(1)
    return torch.cat([quarters.T.flatten(), order[regions.sparse :]])


def processing_order(order: torch.Tensor, regions: Regions, layout: Layout) -> torch.Tensor:
    """The sequence in which SparseGPT processes down's columns (the paper's Table 5).

    `back`: sparse columns, then dense ones, which take up the compensation. `front`: dense columns first.
    `none`: every column stays where the original model had it; a group of four comes where its last member stood.

    Args:
        order: (I,), position in the file → original index.

    Returns:
        int64 (I,): step → position in the file.
    """
    positions = torch.arange(len(order), device=order.device)
    if layout is Layout.BACK:
        return positions
    if layout is Layout.FRONT:
        return positions.roll(regions.dense)
    place = order.clone()
    place[: regions.sparse] = order[: regions.sparse].unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP)
    return place.argsort(stable=True)


def selection_hash(order: torch.Tensor, regions: Regions) -> str:
    """Sixteen hexadecimal digits that identify the set of dense indices, for reports."""
    dense = order[regions.sparse :].sort().values.to("cpu", torch.int64)
    return hashlib.sha256(dense.numpy().tobytes()).hexdigest()[:16]
