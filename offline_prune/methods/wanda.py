"""Pruning by a mask alone: Wanda (Sun et al. 2024) and magnitude, the baselines without compensation."""

from __future__ import annotations

import torch

from vllm_spense.layout import keep_mask_2of4


def wanda_scores(weight: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """S_ij = W_ij² · H_jj, the squared error of removing one weight (the paper's equations 7 and 8).

    Args:
        weight: float (…, N, K).
        energy: float (…, K), diag(H) = Σ x_j² over the calibration tokens.

    Returns:
        float32 (…, N, K).
    """
    return weight.float().square() * energy.float().unsqueeze(-2)


def prune_by_score(
    weight: torch.Tensor, scores: torch.Tensor, *, sparse_rows: torch.Tensor, sparse_columns: torch.Tensor
) -> torch.Tensor:
    """Keeps the two best scores in each group of four of the sparse part and changes nothing else.

    Args:
        weight: float (…, N, K).
        scores: (…, N, K), for magnitude |W| itself.
        sparse_rows: bool (N,).
        sparse_columns: bool (K,), True in whole groups of four.

    Returns:
        float32 (…, N, K).
    """
    result = weight.float().clone()
    columns = sparse_columns.nonzero().squeeze(1)
    if len(columns) == 0:
        return result
    prune = torch.zeros_like(result, dtype=torch.bool)
    prune[..., columns] = ~keep_mask_2of4(scores[..., columns])
    prune &= sparse_rows[:, None]
    return result.masked_fill_(prune, 0.0)
