"""Regions as tensors: the 2:4 rule, and which part of each region a tensor parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_spense.errors import FormatError
from vllm_spense.format import GROUP, KEPT, Regions


@dataclass(frozen=True)
class Shard:
    """One rank's intermediate indices: `sparse` and `dense` index the whole weight, `regions` the rank's own."""

    sparse: slice
    dense: slice

    @property
    def regions(self) -> Regions:
        return Regions(self.sparse.stop - self.sparse.start, self.dense.stop - self.dense.start)


def shard(regions: Regions, rank: int, size: int, layer: str | None = None) -> Shard:
    """The part of both regions that rank `rank` of `size` holds.

    Rank r takes [r·S/T, (r+1)·S/T) of the sparse region and [S + r·D/T, S + (r+1)·D/T) of the dense region, so
    the file never depends on T.

    Raises:
        FormatError: T does not divide a region, or would cut a group of four.
    """
    for name, extent, unit in (("sparse", regions.sparse, GROUP), ("dense", regions.dense, 1)):
        if extent % (size * unit):
            legal = [t for t in range(1, size) if not (regions.sparse % (t * GROUP) or regions.dense % t)]
            raise FormatError(
                f"tensor parallel size {size} does not divide the {name} region",
                layer=layer,
                key=f"regions.{name}",
                found=extent,
                expected=f"a multiple of {size * unit}; tensor parallel sizes that fit: {', '.join(map(str, legal))}",
            )
    s, d = regions.sparse // size, regions.dense // size
    return Shard(
        slice(rank * s, (rank + 1) * s),
        slice(regions.sparse + rank * d, regions.sparse + (rank + 1) * d),
    )


def rank_order(regions: Regions, size: int, layer: str | None = None) -> torch.Tensor:
    """All ranks' intermediate indices, one rank after another: the r-th of `size` chunks is what rank r holds.

    Returns:
        int64 (I,): [rank 0: sparse, dense | rank 1: sparse, dense | …].

    Raises:
        FormatError: as `shard`.
    """
    indices = torch.arange(regions.intermediate)
    shards = [shard(regions, rank, size, layer) for rank in range(size)]
    return torch.cat([indices[part] for each in shards for part in (each.sparse, each.dense)])


def excess_groups(weight: torch.Tensor) -> torch.Tensor:
    """Which groups break 2:4.

    Args:
        weight: (N, K), any dtype, K a multiple of 4.

    Returns:
        bool (N, K / 4): True where an aligned group of four holds more than two non-zeros. −0.0 counts as zero.
    """
    # FP8 has no comparison kernels everywhere; all bits but the sign are zero exactly for ±0.
    magnitude = weight.view(torch.uint8) & 0x7F if weight.element_size() == 1 else weight
    return (magnitude != 0).unflatten(-1, (-1, GROUP)).sum(-1) > KEPT


def require_2of4(weight: torch.Tensor, layer: str, file: object = None) -> None:
    """Proves that `weight` (N, K) is 2:4 along K.

    Raises:
        FormatError: naming the first group with more than two non-zeros.
    """
    broken = excess_groups(weight).nonzero()
    if len(broken):
        row, group = broken[0].tolist()
        values = weight[row, group * GROUP : (group + 1) * GROUP].float().tolist()
        raise FormatError(
            f"{len(broken)} group(s) of the sparse region are not 2:4; "
            f"the first is row {row}, columns {group * GROUP} to {group * GROUP + GROUP - 1}",
            file=file,
            layer=layer,
            found=values,
            expected="at most 2 non-zeros in 4",
        )


def keep_mask_2of4(scores: torch.Tensor) -> torch.Tensor:
    """Keeps the two highest scores in every aligned group of four; of equal scores the earlier stays.

    Args:
        scores: (N, K) float, K a multiple of 4.

    Returns:
        bool (N, K), exactly two True in each group.
    """
    grouped = scores.unflatten(-1, (-1, GROUP))
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(grouped, dtype=torch.bool)
    keep.scatter_(-1, order[..., :KEPT], True)
    return keep.flatten(-2)
