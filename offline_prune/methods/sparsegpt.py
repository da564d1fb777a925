"""SparseGPT (Frantar & Alistarh 2023) for a weight of which only some rows and columns are 2:4 sparse.

All functions are pure: tensors in, tensors out. Shapes that begin with … also take a batch: weights of one size, such
as experts', with a Hessian each and the same sparse rows and columns. One launch then does what would take one each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from offline_prune.methods.fp8 import round_to_fp8
from offline_prune.runtime.profiler import stage
from vllm_spense.errors import SpenseError
from vllm_spense.format import GROUP, KEPT

#: λ / mean(diag H) at which a Hessian that still cannot be factorized is given up.
MAX_DAMPING = 1.0
#: Role of a column that is not pruned; a pruned one's role is its place in its group of four.
DENSE = -1
#: Triangular matrices of this size are inverted by substitution, larger ones by halves.
_SMALL = 1024
#: Matrices of a batch of this size are factorized by the library, larger ones by halves.
_SMALL_IN_BATCH = 128

#: (columns of W (…, N, n), changed in place; their corner of U (…, n, n); roles; prunable rows (N,); scales (…, N)) →
#: errors (…, N, n).
Solver = Callable[[torch.Tensor, torch.Tensor, list[int], torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class InverseFactor:
    """U with H⁻¹ = Uᵀ·U.

    Attributes:
        upper: float32 (…, K, K), upper triangular with a positive diagonal.
        dampings: the λ / mean(diag H) that made the factorization succeed, of each matrix.
    """

    upper: torch.Tensor
    dampings: tuple[float, ...]

    @property
    def damping(self) -> float:
        """The largest."""
        return max(self.dampings)

    def each(self) -> list[InverseFactor]:
        """Of a batch."""
        return [InverseFactor(upper, (damping,)) for upper, damping in zip(self.upper, self.dampings, strict=True)]


def inverse_factor(hessian: torch.Tensor, damping: float, layer: str) -> InverseFactor:
    """Upper Cholesky factor of (H + λ·I)⁻¹, λ = damping · mean(diag H).

    With J the exchange matrix and J·H·J = L·Lᵀ, R = J·L·J is upper triangular and H = R·Rᵀ, so H⁻¹ = R⁻ᵀ·R⁻¹ and
    U = R⁻¹: one factorization and one triangular inverse, without ever forming H⁻¹. Needs memory for three more
    matrices of H's size.

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
    with stage("factorize"):
        while True:
            damped = hessian.flip(0, 1)
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped
            if not failed.item():
                break
            if damping * 10 > MAX_DAMPING:
                raise SpenseError(
                    f"{layer}: the Hessian of its inputs is not positive definite even with damping {damping:g}; "
                    "more, or more varied, calibration text may help"
                )
            damping = max(damping, 1e-4) * 10
        _invert_lower(lower)
        return InverseFactor(lower.flip(0, 1).contiguous(), (damping,))


def inverse_factors(hessians: torch.Tensor, damping: float, layers: Sequence[str]) -> InverseFactor:
    """As `inverse_factor`, of a batch: the same matrices but for the order of sums.

    Needs memory for three more batches of H's size.

    Args:
        hessians: float32 (E, K, K).
        layers: E names.
    """
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    means = diagonal.double().mean(1)
    with stage("factorize"):
        damped = hessians.flip(1, 2)
        damped.diagonal(dim1=1, dim2=2).add_(damping * means.float()[:, None])
        inverse, failed = _inverse_cholesky(damped)
        del damped
        upper = inverse.flip(1, 2)
    dampings = [damping] * len(hessians)
    # What is no number fails too, and is told apart there.
    failed |= ~(torch.isfinite(upper.diagonal(dim1=1, dim2=2)).all(1) & (means > 0))
    for i in failed.nonzero().flatten().tolist():
        alone = inverse_factor(hessians[i], damping, layers[i])
        upper[i], dampings[i] = alone.upper, alone.damping
    return InverseFactor(upper, tuple(dampings))


def _inverse_cholesky(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L⁻¹ of M = L·Lᵀ, and which matrices have none.

    With M = [[A, Bᵀ], [B, C]] and A = L_A·L_Aᵀ, the corner of L is X = B·L_A⁻ᵀ, C − X·Xᵀ = L_C·L_Cᵀ, and that of L⁻¹
    −L_C⁻¹·X·L_A⁻¹. So nearly all of it is products of matrices, which a GPU does for a whole batch at once.

    Args:
        matrices: float32 (E, n, n), symmetric.

    Returns:
        float32 (E, n, n), lower triangular, and bool (E,).
    """
    size = matrices.shape[-1]
    if size <= _SMALL_IN_BATCH:
        lower, failed = torch.linalg.cholesky_ex(matrices)
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        return torch.linalg.solve_triangular(lower, identity, upper=False), failed != 0
    half = size // 2
    top, failed = _inverse_cholesky(matrices[:, :half, :half])
    corner = matrices[:, half:, :half] @ top.mT
    bottom, too = _inverse_cholesky(matrices[:, half:, half:] - corner @ corner.mT)
    inverse = torch.zeros_like(matrices)
    inverse[:, :half, :half] = top
    inverse[:, half:, half:] = bottom
    inverse[:, half:, :half] = (bottom @ (corner @ top)).neg_()
    return inverse, failed | too


def _invert_lower(lower: torch.Tensor) -> None:
    """Inverts a lower triangular (n, n) in place: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹·B·A⁻¹, C⁻¹]]."""
    size = len(lower)
    if size <= _SMALL:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    top, corner, bottom = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(top)
    _invert_lower(bottom)
    corner.copy_((bottom @ corner @ top).neg_())


@dataclass(frozen=True)
class _Block:
    """Neighbouring columns [start, start + len(roles)) between two updates of everything to their right."""

    start: int
    roles: list[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.roles)


def _blocks(sparse_columns: torch.Tensor, block_size: int, dense_too: bool) -> Iterator[_Block]:
    """Cuts the columns that have work to do into blocks of at most `block_size`; groups stay whole."""
    flags = sparse_columns.tolist()
    block = _Block(0, [])
    column = 0
    while column < len(flags):
        sparse = flags[column]
        if sparse and flags[column : column + GROUP] != [True] * GROUP:
            raise ValueError(f"sparse columns do not come in whole groups of four at column {column}")
        roles = [] if not (sparse or dense_too) else list(range(GROUP)) if sparse else [DENSE]
        if block.roles and (not roles or len(block.roles) + len(roles) > block_size):
            yield block
            block = _Block(column, [])
        if roles:
            block = block if block.roles else _Block(column, [])
            block.roles.extend(roles)
        column += GROUP if sparse else 1
    if block.roles:
        yield block


def sparsegpt(
    weight: torch.Tensor,
    factor: InverseFactor,
    *,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    scales: torch.Tensor | None = None,
    block_size: int = 128,
    row_chunks: int = 1,
) -> torch.Tensor:
    """Prunes to 2:4 with Optimal Brain Surgeon compensation, and rounds to FP8 in the same loop if asked to.

    Columns go left to right in groups of four. In each sparse row the two weights with the smallest w² / U_cc² are
    pruned (the paper's equation 3); each column's error (w_c − ŵ_c) / U_cc, from pruning and from rounding alike,
    is spread with U_c,c+1… over all columns still to the right, dense ones included. The columns of a block are
    updated lazily, which changes the order of the sums and nothing else. On a GPU one kernel walks the columns of
    a block; `solve_block` is its twin in plain torch.

    Args:
        weight: float (…, N, K).
        factor: of this weight's input Hessian (…, K, K).
        sparse_rows: bool (N,); other rows are never pruned.
        sparse_columns: bool (K,); True comes in runs of whole groups of four. Other columns are never pruned.
        scales: (…, N, 1) float32; rounds every weight to FP8 with these, or None.
        block_size: columns between two updates of everything to the right.
        row_chunks: in how many products such an update is made; how a library multiplies may depend on the number of
            rows, and so in the last bit the result.

    Returns:
        float32 (…, N, K).
    """
    upper = factor.upper
    solve = _solver(weight.device)
    result = weight.float().clone()
    # Without rounding, a row that is never pruned makes no error and gets none.
    rows = sparse_rows if scales is None else torch.ones_like(sparse_rows)
    everywhere = bool(rows.all())
    work = result if everywhere else result[..., rows, :]
    prunable = sparse_rows[rows]
    heights = [int(chunk.sum()) for chunk in rows.tensor_split(row_chunks)]
    channel = None if scales is None else scales.float().squeeze(-1).contiguous()

    for block in _blocks(sparse_columns, block_size, dense_too=scales is not None):
        here = slice(block.start, block.stop)
        errors = solve(work[..., here], upper[..., here, here], block.roles, prunable, channel)
        if block.stop < work.shape[-1]:
            spread = upper[..., here, block.stop :]
            for right, made in zip(work[..., block.stop :].split(heights, -2), errors.split(heights, -2), strict=True):
                (right.addmm_ if right.ndim == 2 else right.baddbmm_)(made, spread, alpha=-1)

    if not everywhere:
        result[..., rows, :] = work
    return result


def _solver(device: torch.device) -> Solver:
    if device.type != "cuda":
        return solve_block
    from offline_prune.methods import sparsegpt_triton

    return sparsegpt_triton.solve_block


def solve_block(
    weight: torch.Tensor,
    corner: torch.Tensor,
    roles: list[int],
    prunable: torch.Tensor,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """Decides neighbouring columns of a weight in place and returns their errors.

    Args:
        weight: float32 (…, N, n), overwritten by the final values.
        corner: float32 (…, n, n), the columns' part of U.
        roles: n times `DENSE` or the column's place in its group.
        prunable: bool (N,).
        scales: float32 (…, N) for rounding to FP8, or None.

    Returns:
        float32 (…, N, n): (w_c − ŵ_c) / U_cc.
    """
    if weight.ndim > 2:
        of_each = [None] * len(weight) if scales is None else list(scales)
        problems = zip(weight, corner, of_each, strict=True)
        return torch.stack([solve_block(part, own, roles, prunable, each) for part, own, each in problems])
    columns = weight.T.contiguous()
    errors = torch.empty_like(columns)
    start = 0
    while start < len(roles):
        sparse = roles[start] != DENSE
        stop = start + 1
        while stop < len(roles) and stop - start < GROUP and (roles[stop] != DENSE) == sparse:
            stop += 1
        here = slice(start, stop)
        errors[here] = _solve_tile(columns[here], corner[here, here], prunable if sparse else None, scales)
        if stop < len(roles):
            columns[stop:].addmm_(corner[here, stop:].T, errors[here], alpha=-1)
        start = stop
    weight.copy_(columns.T)
    return errors.T


def _solve_tile(
    tile: torch.Tensor, corner: torch.Tensor, prunable: torch.Tensor | None, scales: torch.Tensor | None
) -> torch.Tensor:
    """Decides one group of four, or a few dense columns, in place and returns their errors.

    Args:
        tile: (n, N): column c of the weight is row c here; overwritten by the final values.
        corner: (n, n), the tile's part of U.
        prunable: bool (N,) or None where nothing is pruned.
        scales: (N,) for rounding, or None.

    Returns:
        (n, N): (w_c − ŵ_c) / U_cc.
    """
    pivots = corner.diagonal()
    kept = None
    if prunable is not None:
        # In the tile's type: filling where a mask says so takes several times as long on a CPU.
        kept = (~(_prune_mask((tile / pivots[:, None]).square()) & prunable)).to(tile.dtype)
    errors = torch.empty_like(tile)
    for c in range(len(tile)):
        final = tile[c] if kept is None else tile[c] * kept[c]
        if scales is not None:
            final = round_to_fp8(final, scales)
        torch.div(tile[c] - final, pivots[c], out=errors[c])
        tile[c] = final
        if c + 1 < len(tile):
            tile[c + 1 :].addr_(corner[c, c + 1 :], errors[c], alpha=-1)
    return errors


def _prune_mask(scores: torch.Tensor) -> torch.Tensor:
    """True for the two lowest scores in each column of (4, N); of equal scores the later is pruned."""
    # Whether each later one goes before the first, before the second, before the third.
    (b01, b02, b03), (b12, b13), (b23,) = ((scores[i + 1 :] <= scores[i]).byte() for i in range(GROUP - 1))
    ahead = torch.stack([b01 + b02 + b03, 1 - b01 + b12 + b13, 2 - b02 - b12 + b23, 3 - b03 - b13 - b23])
    return ahead < GROUP - KEPT
