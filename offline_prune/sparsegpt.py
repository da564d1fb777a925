"""SparseGPT (Frantar & Alistarh 2023) for a weight of which only some rows and columns are 2:4 sparse.

All functions are pure: tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from offline_prune.quantize import round_to_fp8
from vllm_spense.errors import SpenseError
from vllm_spense.format import GROUP, KEPT

#: λ / mean(diag H) at which a Hessian that still cannot be factorized is given up.
MAX_DAMPING = 1.0


@dataclass(frozen=True)
class InverseFactor:
    """U with H⁻¹ = Uᵀ·U.

    Attributes:
        upper: float32 (K, K), upper triangular with a positive diagonal.
        damping: the λ / mean(diag H) that made the factorization succeed.
    """

    upper: torch.Tensor
    damping: float


def inverse_factor(hessian: torch.Tensor, damping: float, layer: str) -> InverseFactor:
    """Upper Cholesky factor of (H + λ·I)⁻¹, λ = damping · mean(diag H).

    With J the exchange matrix and J·H·J = L·Lᵀ, R = J·L·J is upper triangular and H = R·Rᵀ, so H⁻¹ = R⁻ᵀ·R⁻¹ and
    U = R⁻¹: one factorization and one triangular inverse, without ever forming H⁻¹.

    Args:
        hessian: float32 (K, K), Σ x·xᵀ over the calibration tokens.
        damping: first damping to try; each failure multiplies it by ten, up to `MAX_DAMPING`.
        layer: named in the error.

    Raises:
        SpenseError: H is not finite, or not positive definite at the largest damping.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.double().mean().item()
    if not torch.isfinite(diagonal).all() or mean <= 0:
        raise SpenseError(f"{layer}: the Hessian of its inputs is not usable (mean of the diagonal: {mean})")
    size = len(hessian)
    flipped = hessian.flip(0, 1)
    while True:
        damped = flipped + damping * mean * torch.eye(size, dtype=hessian.dtype, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            break
        if damping * 10 > MAX_DAMPING:
            raise SpenseError(
                f"{layer}: the Hessian of its inputs is not positive definite even with damping {damping:g}; "
                "more, or more varied, calibration text may help"
            )
        damping = max(damping, 1e-4) * 10
    identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return InverseFactor(inverse.flip(0, 1).contiguous(), damping)


@dataclass(frozen=True)
class _Tile:
    """Neighbouring columns [start, stop) that are decided together: one group of four, or dense ones."""

    start: int
    stop: int
    sparse: bool


def _tiles(sparse_columns: torch.Tensor, block_size: int, dense_too: bool) -> Iterator[list[_Tile]]:
    """Cuts the columns into blocks of at most about `block_size` columns, each a list of tiles."""
    flags = sparse_columns.tolist()
    block: list[_Tile] = []
    column = 0
    while column < len(flags):
        sparse = flags[column]
        ahead = flags[column : column + GROUP]
        if sparse and ahead != [True] * GROUP:
            raise ValueError(f"sparse columns do not come in whole groups of four at column {column}")
        width = GROUP if sparse else (ahead.index(True) if True in ahead else len(ahead))
        wanted = sparse or dense_too
        if wanted:
            block.append(_Tile(column, column + width, sparse))
        column += width
        if block and (not wanted or column - block[0].start >= block_size):
            yield block
            block = []
    if block:
        yield block


def _prune_mask(scores: torch.Tensor) -> torch.Tensor:
    """True for the two lowest scores in each column of (4, N); of equal scores the later is pruned."""
    ahead = scores.unsqueeze(0) < scores.unsqueeze(1)
    tie = scores.unsqueeze(0) == scores.unsqueeze(1)
    later = torch.ones(GROUP, GROUP, dtype=torch.bool, device=scores.device).triu(1).unsqueeze(-1)
    return (ahead | (tie & later)).sum(1) < GROUP - KEPT


def sparsegpt(
    weight: torch.Tensor,
    factor: InverseFactor,
    *,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    scales: torch.Tensor | None = None,
    block_size: int = 128,
) -> torch.Tensor:
    """Prunes to 2:4 with Optimal Brain Surgeon compensation, and rounds to FP8 in the same loop if asked to.

    Columns go left to right in groups of four. In each sparse row the two weights with the smallest w² / U_cc² are
    pruned (the paper's equation 3); each column's error (w_c − ŵ_c) / U_cc, from pruning and from rounding alike,
    is spread with U_c,c+1… over all columns still to the right, dense ones included. The columns of a group and of
    a block are updated lazily, which changes the order of the sums and nothing else.

    Args:
        weight: float (N, K).
        factor: of this weight's input Hessian (K, K).
        sparse_rows: bool (N,); other rows are never pruned.
        sparse_columns: bool (K,); True comes in runs of whole groups of four. Other columns are never pruned.
        scales: (N, 1) float32; rounds every weight to FP8 with these, or None.
        block_size: columns between two updates of everything to the right.

    Returns:
        float32 (N, K).
    """
    upper = factor.upper
    result = weight.float().clone()
    # Without rounding, a row that is never pruned makes no error and gets none.
    rows = None if scales is not None or bool(sparse_rows.all()) else sparse_rows.nonzero().squeeze(1)
    work = result if rows is None else result[rows]
    prunable = sparse_rows if rows is None else sparse_rows[rows]
    channel = None if scales is None else scales.float().squeeze(1)

    for block in _tiles(sparse_columns, block_size, dense_too=scales is not None):
        first, last = block[0].start, block[-1].stop
        columns = work[:, first:last].T.contiguous()
        errors = torch.empty_like(columns)
        for tile in block:
            here = slice(tile.start - first, tile.stop - first)
            corner = upper[tile.start : tile.stop, tile.start : tile.stop]
            errors[here] = _solve_tile(columns[here], corner, prunable if tile.sparse else None, channel)
            if tile.stop < last:
                rest = upper[tile.start : tile.stop, tile.stop : last]
                columns[tile.stop - first :].addmm_(rest.T, errors[here], alpha=-1)
        work[:, first:last] = columns.T
        if last < work.shape[1]:
            work[:, last:].addmm_(errors.T, upper[first:last, last:], alpha=-1)

    if rows is not None:
        result[rows] = work
    return result


def _solve_tile(
    tile: torch.Tensor, corner: torch.Tensor, prunable: torch.Tensor | None, scales: torch.Tensor | None
) -> torch.Tensor:
    """Decides the columns of one tile in place and returns their errors.

    Args:
        tile: (n, N): column c of the weight is row c here; overwritten by the final values.
        corner: (n, n), the tile's part of U.
        prunable: bool (N,) or None where nothing is pruned.
        scales: (N,) for rounding, or None.

    Returns:
        (n, N): (w_c − ŵ_c) / U_cc.
    """
    pivots = corner.diagonal()
    pruned = None if prunable is None else _prune_mask((tile / pivots[:, None]).square()) & prunable
    errors = torch.empty_like(tile)
    for c in range(len(tile)):
        final = tile[c] if pruned is None else tile[c].masked_fill(pruned[c], 0.0)
        if scales is not None:
            final = round_to_fp8(final, scales)
        torch.div(tile[c] - final, pivots[c], out=errors[c])
        tile[c] = final
        if c + 1 < len(tile):
            tile[c + 1 :].addr_(corner[c, c + 1 :], errors[c], alpha=-1)
    return errors
