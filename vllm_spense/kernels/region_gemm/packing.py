"""The bytes of a compressed 2:4 FP8 weight, as Hopper's sparse tensor cores read them.

cuSPARSELt documents none of this, but what it compresses for compute capability 9.0 is what the hardware defines:

- values: (N, K / 2) row-major, the two kept values of every group of four, in order;
- metadata, after them: tiles of 64 rows × 64 columns, row-major, 512 bytes each, sizes rounded up. Four bits a group,
  the low two the column of its first kept value. A tile is in the register order of `wgmma.sp` for 8-bit types
  (PTX ISA, "Sparse wgmma"): warp w, lane 4·q + t holds row 16·w + q + 8·(t & 1), groups 8·(t >> 1) … + 7 as eight
  nibbles, and byte b of its word lies at 128·w + 16·q + 4·b + t.

`cusparselt.compress` must agree with `compress` here before the one-launch path reads its bytes (`library_agrees`).
"""

from __future__ import annotations

import torch

from vllm_spense.format import GROUP

#: Rows and columns of a metadata tile, and its bytes.
TILE, TILE_BYTES = 64, 512


def value_bytes(n: int, k: int) -> int:
    return n * k // 2


def metadata_shape(n: int, k: int) -> tuple[int, int]:
    """(tiles of 64 rows, bytes of each tile row)."""
    return -(-n // TILE), -(-k // TILE) * TILE_BYTES


def compress(weight: torch.Tensor) -> torch.Tensor:
    """The reference twin of `cusparselt.compress`.

    Args:
        weight: (N, K) float8_e4m3fn, 2:4 along K, N and K multiples of 32.

    Returns:
        uint8 (bytes,).
    """
    n, k = weight.shape
    groups = weight.view(torch.uint8).view(n, k // GROUP, GROUP)
    # cuSPARSELt keeps −0.0 like any other value.
    kept = groups != 0
    first, second = _kept_columns(kept)
    values = torch.stack([groups.gather(2, column[..., None].long()).squeeze(2) for column in (first, second)], dim=-1)
    # Of a group with one kept value or none, the other value must read as zero; its gathered byte is.
    return torch.cat([values.flatten(), _tiled(first | second << 2).flatten()])


def _kept_columns(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the first and second kept value of each group, uint8.

    One value alone goes first if it can (column 0, 1, 2, paired with column 3), second if it stands in column 3, with
    column 2 as the first. No value at all: columns 2 and 3.
    """
    columns = torch.arange(GROUP, device=kept.device)
    lowest = torch.where(kept, columns, GROUP).amin(-1)
    highest = torch.where(kept, columns, -1).amax(-1)
    first = lowest.clamp(max=GROUP - 2)
    second = torch.where(highest > first, highest, GROUP - 1)
    return first.to(torch.uint8), second.to(torch.uint8)


def _tiled(nibbles: torch.Tensor) -> torch.Tensor:
    """(N, K / 4) nibbles → metadata bytes (row tiles, tiles along K, 512); what pads a tile reads columns 2 and 3."""
    n, groups = nibbles.shape
    padded = torch.nn.functional.pad(nibbles, (0, -groups % (TILE // GROUP), 0, -n % TILE), value=2 | 3 << 2)
    low, high = padded.unflatten(1, (-1, 2)).unbind(-1)
    # rows: (tile, warp w, t & 1, q); bytes along K: (tile, t >> 1, b) → (tiles, w, q, b, t >> 1, t & 1)
    shaped = (low | high << 4).unflatten(0, (-1, 4, 2, 8)).unflatten(-1, (-1, 2, 4))
    return shaped.permute(0, 4, 1, 3, 6, 5, 2).flatten(2)


def decompress(compressed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Inverse of `compress`: (N, K) float8_e4m3fn with its zeros."""
    values = compressed[: value_bytes(n, k)].view(n, k // GROUP, 2)
    row_tiles, pitch = metadata_shape(n, k)
    tiles = compressed[value_bytes(n, k) :].view(row_tiles, pitch // TILE_BYTES, 4, 8, 4, 2, 2)
    # (row tile, K tile, w, q, b, t >> 1, t & 1) → rows × bytes along K
    packed = tiles.permute(0, 2, 6, 3, 1, 5, 4).flatten(4).flatten(0, 3)[:n, : k // 8]
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    out = torch.zeros(n, k // GROUP, GROUP, dtype=torch.uint8, device=compressed.device)
    out.scatter_(2, (nibbles >> 2).long()[..., None], values[..., 1:])
    out.scatter_add_(2, (nibbles & 3).long()[..., None], values[..., :1])
    return out.view(n, k).view(torch.float8_e4m3fn)
