"""The bytes of a compressed weight against their specification, byte by byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES, compress, decompress, metadata_shape, value_bytes

FP8 = torch.float8_e4m3fn
SIZES = [(32, 32), (64, 64), (160, 96), (96, 352), (256, 512)]


def weight(n: int, k: int, zeros: float, seed: int = 0) -> torch.Tensor:
    """(N, K) FP8 with two non-zeros in four, of which a share is zero after all."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randint(1, 120, (n, k // 4, 4), generator=generator, dtype=torch.uint8)
    out.scatter_(2, torch.rand(out.shape, generator=generator).argsort(-1)[..., :2], 0)
    return (out * (torch.rand(out.shape, generator=generator) >= zeros)).view(n, k).view(FP8)


@pytest.mark.parametrize("zeros", [0, 0.3, 1])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_nothing_is_lost(n: int, k: int, zeros: float) -> None:
    w = weight(n, k, zeros)
    compressed = compress(w)
    rows, pitch = metadata_shape(n, k)
    assert compressed.numel() == value_bytes(n, k) + rows * pitch
    assert torch.equal(decompress(compressed, n, k).view(torch.uint8), w.view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    row=st.integers(0, 10**6),
    group=st.integers(0, 10**6),
    kept=st.sets(st.integers(0, 3), max_size=2),
)
def test_every_group_lies_where_the_specification_says(
    size: tuple[int, int], row: int, group: int, kept: set[int]
) -> None:
    n, k = size
    row, group = row % n, group % (k // 4)
    w = torch.zeros(n, k, dtype=torch.uint8)
    for column in kept:
        w[row, 4 * group + column] = 100 + column
    compressed = compress(w.view(FP8))

    # What cuSPARSELt 0.8.0 makes of each pattern, read off its output on an H100.
    first, second = {
        (): (2, 3), (0,): (0, 3), (1,): (1, 3), (2,): (2, 3), (3,): (2, 3),
        (0, 1): (0, 1), (0, 2): (0, 2), (0, 3): (0, 3), (1, 2): (1, 2), (1, 3): (1, 3), (2, 3): (2, 3),
    }[tuple(sorted(kept))]  # fmt: skip
    values = [100 + column if column in kept else 0 for column in (first, second)]
    at = row * k // 2 + 2 * group
    assert compressed[at : at + 2].tolist() == values

    # PTX ISA: thread t of lane group q of warp w holds row 16 w + q + 8 (t & 1), and groups from 8 (t >> 1) on.
    warp, q, high_row = row % TILE // 16, row % 8, row % 16 // 8
    half, byte, nibble = group % 16 // 8, group % 8 // 2, group % 2
    tile = row // TILE * metadata_shape(n, k)[1] + group // 16 * TILE_BYTES
    metadata = compressed[value_bytes(n, k) + tile + 128 * warp + 16 * q + 4 * byte + 2 * half + high_row]
    assert int(metadata) >> 4 * nibble & 15 == first | second << 2
