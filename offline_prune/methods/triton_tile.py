"""What the Triton kernels that walk a tile of columns share."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

#: Rows that one warp walks; each of its lanes then holds whole groups of four columns of all of them.
ROWS = 8


@triton.jit
def column(tile, columns, c):
    """Column c (ROWS,) of a tile (ROWS, COLUMNS)."""
    return tl.sum(tl.where((columns == c)[None, :], tile, 0.0), axis=1)
