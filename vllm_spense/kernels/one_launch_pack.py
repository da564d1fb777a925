"""The weight layout of the one-launch kernel, and the order in which it wants its activations.

A sparse tile holds 64 rows × 256 columns in 10,240 bytes: five byte planes of 64 × 32, one byte for every group of
four columns. The tile's columns form two halves, a and b, of 32 groups each:

    plane 0, 1   first and second kept value of each group of half a
    plane 2, 3   the same of half b
    plane 4      keep masks: high nibble half a, low nibble half b, the highest bit of a nibble is column 0 of the group

A dense tile holds 64 rows × 128 columns. Tiles of one row block follow each other along K.

Expanding a plane yields one column of every group at once, so a tile's columns come out sorted by their place in the
group: first all columns 0, then all columns 1, and so on, within each aligned block of 128. A dot product does not
care, as long as the activations (`kernel_order`) and the dense tiles have the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_spense.format import GROUP
from vllm_spense.kernels.problem import Problem

ROWS = 64
#: Columns of one half of a sparse tile, of a dense tile, and of the blocks that `kernel_order` sorts.
HALF = 128
SPARSE_COLUMNS = 2 * HALF
GROUPS = HALF // GROUP
PLANES = 5
#: Rows packed at once, which bounds the temporary memory of `pack`.
_CHUNK = 2048

# Keep mask of a group by which of its four columns are non-zero (bit 3 is column 0). Exactly two are kept: of groups
# with fewer non-zeros also zeros, the earliest.
_KEEP = [0b1100, 0b1001, 0b1010, 0b0011, 0b1100, 0b0101, 0b0110, 0, 0b1100, 0b1001, 0b1010, 0, 0b1100, 0, 0, 0]


def reason_against(problem: Problem) -> str | None:
    """Why the one-launch kernel cannot take this GEMM, or None if it can."""
    (sparse_rows, sparse_columns), (dense_rows, dense_columns) = problem.sparse_shape, problem.dense_shape
    for name, extent, multiple in (
        ("sparse rows", sparse_rows, ROWS),
        ("dense rows", dense_rows, ROWS),
        ("sparse columns", sparse_columns if problem.regions.sparse else 0, SPARSE_COLUMNS),
        ("dense columns", dense_columns if problem.regions.dense else 0, HALF),
    ):
        if extent % multiple:
            return f"{extent} {name} are not a multiple of {multiple}"
    return None


def kernel_order(x: torch.Tensor) -> torch.Tensor:
    """Columns sorted by their place in the group of four, within each aligned block of 128.

    Args:
        x: (…, K), any dtype, K a multiple of 128.

    Returns:
        (…, K): column 32·p + g of a block is the input's column 4·g + p. Contiguous.
    """
    return x.unflatten(-1, (x.shape[-1] // HALF, GROUPS, GROUP)).transpose(-1, -2).flatten(-3)


def pack(weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """Weights of one GEMM in the kernel's layout.

    Args:
        weight: (N, K) float8_e4m3fn, 2:4 in its sparse region, which comes first along N (output-split) or K
            (input-split). Not changed.
        problem: `reason_against` must be None for it.

    Returns:
        `sparse_tiles`: uint8 (row blocks, tiles, 5, 64, 32), `dense_tiles`: uint8 (row blocks, tiles, 64, 128).
    """
    assert reason_against(problem) is None, reason_against(problem)
    dim = 0 if problem.split == "output" else 1
    sparse, dense = weight.view(torch.uint8).split((problem.regions.sparse, problem.regions.dense), dim)
    return {"sparse_tiles": _by_chunks(_pack_sparse, sparse), "dense_tiles": _by_chunks(_pack_dense, dense)}


def _by_chunks(function: Callable[[torch.Tensor], torch.Tensor], region: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(rows) for rows in region.split(_CHUNK)])


def _pack_sparse(weight: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    w0, w1, w2, w3 = weight.unflatten(1, (k // GROUP, GROUP)).unbind(-1)
    # Any bit but the sign: −0.0 is not worth a place.
    code = sum(((w & 0x7F) != 0).to(torch.uint8) << (3 - place) for place, w in enumerate((w0, w1, w2, w3)))
    keep = torch.tensor(_KEEP, dtype=torch.uint8, device=weight.device)[code.int()]
    first = torch.where(keep & 8 != 0, w0, torch.where(keep & 4 != 0, w1, w2))
    second = torch.where(keep & 1 != 0, w3, torch.where(keep & 2 != 0, w2, w1))

    def tiles(plane: torch.Tensor) -> torch.Tensor:
        """(N, K / 4) → halves, row blocks, tiles, 64, 32"""
        shape = (n // ROWS, ROWS, k // SPARSE_COLUMNS, 2, GROUPS)
        return plane.reshape(shape).permute(3, 0, 2, 1, 4)

    (first_a, first_b), (second_a, second_b), (keep_a, keep_b) = tiles(first), tiles(second), tiles(keep)
    return torch.stack([first_a, second_a, first_b, second_b, keep_a << 4 | keep_b], 2)


def _pack_dense(weight: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    return kernel_order(weight).reshape(n // ROWS, ROWS, k // HALF, HALF).transpose(1, 2).contiguous()
