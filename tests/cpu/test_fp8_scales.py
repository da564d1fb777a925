"""FP8 scales by squared error, for the benchmark that compares them."""

from __future__ import annotations

import torch

from benchmarks.fp8_scales import MULTIPLES, least_squares_scales
from offline_prune.quantize import channel_scales, round_to_fp8


def test_the_scale_of_least_squared_error_is_no_worse_than_any_other() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 16)[:, None]
    weight[3] = 0
    best = least_squares_scales(weight)
    assert best.shape == (16, 1)

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (round_to_fp8(weight, scales) - weight).square().sum(1)

    every = [error(channel_scales(weight, multiple)) for multiple in MULTIPLES]
    assert 1.0 in MULTIPLES
    assert all((error(best) <= other).all() for other in every)
    assert error(best).sum() < 0.99 * error(channel_scales(weight)).sum()
