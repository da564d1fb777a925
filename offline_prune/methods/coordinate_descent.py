"""Coordinate descent after SparseGPT: masks chosen anew, and the weights that stay with them.

SparseGPT decides a group of four before it knows what later groups lose. Once all are decided, each can be
decided again with all others as they stand. With Δ = Ŵ − W, f = ½·tr(Δ·H·Δᵀ) and R = Δ·H its slope, a group's best
values without zeros are v = ŵ − R_g·G, G = (H_gg)⁻¹. Zeros at a pair z of the four then cost ½·v_z·(G_zz)⁻¹·v_zᵀ more
than v, and what stays is best at v_k − v_z·(G_zz)⁻¹·G_zk (Optimal Brain Surgeon for two weights at once; Hassibi &
Stork 1993). Of the six pairs the cheapest one goes, so f never rises. Columns that are not pruned take v.

All functions are pure: tensors in, tensors out. Shapes that begin with … also take a batch, as `sparsegpt` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from vllm_spense.format import GROUP, KEPT

#: Places in a group of four of the two that go, in the order in which the kernel knows them too.
PAIRS = tuple(combinations(range(GROUP), GROUP - KEPT))
#: Of the two that stay then.
_STAYING = tuple(tuple(place for place in range(GROUP) if place not in pair) for pair in PAIRS)
#: Dense columns that are solved for at once.
_DENSE_BLOCK = 1024


class Groups(NamedTuple):
    """What decides about each of n groups of four columns, float32.

    Attributes:
        inverse: (…, n, 4, 4): G.
        quadratic: (…, n, 6, 2, 2): (G_zz)⁻¹ of each pair z.
        follow: (…, n, 6, 2, 2): (G_zz)⁻¹·G_zk, what the two that stay lose by each of the two that go.
    """

    inverse: torch.Tensor
    quadratic: torch.Tensor
    follow: torch.Tensor

    def subset(self, groups: slice) -> Groups:
        return Groups(
            self.inverse[..., groups, :, :], self.quadratic[..., groups, :, :, :], self.follow[..., groups, :, :, :]
        )


#: `solve_block` or its Triton twin.
Solver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def descend(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    hessian: torch.Tensor,
    damping: float | Sequence[float],
    *,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    passes: int,
    block_size: int = 128,
    row_chunks: int = 1,
) -> torch.Tensor:
    """Passes over all groups of four, and over the dense columns of rows that have any, left to right.

    R is made anew for each block of columns, and only kept up to date inside it: a pass is 2·N·K² flop of GEMMs, as
    SparseGPT's is. On a GPU one kernel walks the groups of a block; `solve_block` is its twin in plain torch.

    Args:
        weight: float (…, N, K), W.
        pruned: float32 (…, N, K), Ŵ, 2:4 in its sparse rows and columns.
        hessian: float32 (…, K, K), H.
        damping: λ / mean(diag H), of a batch that of each; positive if H is singular; H + λ·I stands for H above.
        sparse_rows: bool (N,); other rows stay as they are.
        sparse_columns: bool (K,); True comes in runs of whole groups of four.
        passes: how many.
        block_size: sparse columns at a time.
        row_chunks: see `sparsegpt.sparsegpt`.

    Returns:
        float32 (…, N, K).
    """
    if not passes:
        return pruned
    everywhere = bool(sparse_rows.all())
    work = pruned.clone() if everywhere else pruned[..., sparse_rows, :]
    delta = work - (weight if everywhere else weight[..., sparse_rows, :])
    heights = [int(chunk.sum()) for chunk in sparse_rows.tensor_split(row_chunks)]
    mean = hessian.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    added = (torch.as_tensor(damping, dtype=mean.dtype, device=mean.device) * mean).float()
    blocks = list(_blocks(sparse_columns, block_size))
    groups = group_tables(hessian, added, sparse_columns)
    solve = _solver(work.device)

    for _ in range(passes):
        done = 0
        for here, sparse in blocks:
            corner = hessian[..., here, here].clone()
            corner.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
            slope = torch.cat([chunk @ hessian[..., here] for chunk in delta.split(heights, -2)], -2)
            slope.addcmul_(delta[..., here], added[..., None, None])
            if sparse:
                count = slope.shape[-1] // GROUP
                change = solve(work[..., here], slope, corner, *groups.subset(slice(done, done + count)))
                done += count
            else:
                change = -torch.cholesky_solve(slope.mT, torch.linalg.cholesky(corner)).mT
                work[..., here].add_(change)
            delta[..., here].add_(change)

    if everywhere:
        return work
    result = pruned.clone()
    result[..., sparse_rows, :] = work
    return result


def group_tables(hessian: torch.Tensor, added: torch.Tensor, sparse_columns: torch.Tensor) -> Groups:
    """Of every group of four among the sparse columns, with `added`, float32 (…), on the diagonal of H (…, K, K)."""
    first = sparse_columns.nonzero().view(-1, GROUP)
    corners = hessian[..., first[:, :, None], first[:, None, :]].double()
    corners.diagonal(dim1=-2, dim2=-1).add_(added[..., None, None])
    inverse = torch.linalg.inv(corners)
    quadratic, follow = [], []
    for pair, stay in zip(PAIRS, _STAYING, strict=True):
        of_pair = torch.linalg.inv(inverse[..., pair, :][..., pair])
        quadratic.append(of_pair)
        follow.append(of_pair @ inverse[..., pair, :][..., stay])
    return Groups(*(table.float() for table in (inverse, torch.stack(quadratic, -3), torch.stack(follow, -3))))


def _blocks(sparse_columns: torch.Tensor, block_size: int) -> Iterator[tuple[slice, bool]]:
    """Runs of columns that are all sparse, of at most `block_size`, or all dense, and which of both they are."""
    flags = sparse_columns.tolist()
    start = 0
    while start < len(flags):
        stop, most = start + 1, block_size if flags[start] else _DENSE_BLOCK
        while stop < len(flags) and stop - start < most and flags[stop] == flags[start]:
            stop += 1
        yield slice(start, stop), flags[start]
        start = stop


def _solver(device: torch.device) -> Solver:
    if device.type != "cuda":
        return solve_block
    from offline_prune.methods import coordinate_descent_triton

    return coordinate_descent_triton.solve_block


def solve_block(
    weight: torch.Tensor,
    slope: torch.Tensor,
    corner: torch.Tensor,
    inverse: torch.Tensor,
    quadratic: torch.Tensor,
    follow: torch.Tensor,
) -> torch.Tensor:
    """Decides neighbouring groups of four in place, one after the other, and returns by how much weights changed.

    Args:
        weight: float32 (…, N, n), overwritten by the new values.
        slope: float32 (…, N, n), R of these columns; overwritten.
        corner: float32 (…, n, n), the columns' part of the damped H.
        inverse, quadratic, follow: of these n / 4 groups, as `Groups` has them.

    Returns:
        float32 (…, N, n).
    """
    if weight.ndim > 2:
        problems = zip(weight, slope, corner, inverse, quadratic, follow, strict=True)
        return torch.stack([solve_block(*problem) for problem in problems])
    columns, slopes = weight.T.contiguous(), slope.T.contiguous()
    changes = torch.empty_like(columns)
    of_pairs = _of_pairs(quadratic, follow)
    half = len(PAIRS) // 2
    for i, of_group in enumerate(inverse):
        here, later = slice(GROUP * i, GROUP * (i + 1)), slice(GROUP * (i + 1), None)
        free = torch.addmm(columns[here], of_group, slopes[here], alpha=-1)
        found = (of_pairs[i] @ free).view(len(PAIRS), GROUP + 2, -1)
        cost = found[:, :1].square().addcmul_(found[:, 1:2], found[:, 1:2])
        # The least of six, as a tournament: `argmin` takes several times as long.
        better = cost[half:] < cost[:half]
        cost, after = torch.minimum(cost[half:], cost[:half]), torch.where(better, found[half:, 2:], found[:half, 2:])
        least, best = cost[0], after[0]
        for row in range(1, half):
            best = torch.where(cost[row] < least, after[row], best)
            least = torch.minimum(cost[row], least)
        torch.sub(best, columns[here], out=changes[here])
        columns[here] = best
        slopes[later].addmm_(corner[later, here], changes[here])
    weight.copy_(columns.T)
    return changes.T


def _of_pairs(quadratic: torch.Tensor, follow: torch.Tensor) -> torch.Tensor:
    """(n, 36, 4), to be multiplied by v: of each pair two numbers whose squares add up to twice what it costs, then the
    group's new values, exact zeros at the pair."""
    first = quadratic[..., 0, 0].sqrt()
    both = quadratic[..., 0, 1] / first
    second = (quadratic[..., 1, 1] - both.square()).clamp_min(0).sqrt()
    rows = quadratic.new_zeros(len(quadratic), len(PAIRS), GROUP + 2, GROUP)
    for p, (pair, stay) in enumerate(zip(PAIRS, _STAYING, strict=True)):
        rows[:, p, 0, pair] = torch.stack([first[:, p], both[:, p]], 1)
        rows[:, p, 1, pair[1]] = second[:, p]
        for k, kept in enumerate(stay):
            rows[:, p, 2 + kept, kept] = 1
            rows[:, p, 2 + kept, pair] = -follow[:, p, :, k]
    return rows.flatten(1, 2)
