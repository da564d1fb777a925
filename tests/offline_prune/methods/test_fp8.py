"""FP8 weights and their scales."""

import pytest
import torch

from offline_prune.methods import fp8
from offline_prune.methods.fp8 import channel_scales, dequantize, least_squares_scales, round_to_fp8, to_fp8


def test_scales_are_what_bf16_readers_will_use() -> None:
    scales = channel_scales(torch.randn(64, 32))
    assert torch.equal(scales, scales.bfloat16().float())
    assert scales.shape == (64, 1)


def test_the_largest_weight_of_a_row_becomes_about_448() -> None:
    weight = torch.randn(64, 32)
    largest = to_fp8(weight, channel_scales(weight)).float().abs().amax(1)
    assert ((largest >= 416) & (largest <= 448)).all()


def test_a_row_of_zeros_has_scale_one() -> None:
    assert channel_scales(torch.zeros(2, 8)).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("headroom", [1.0, 1.5])
def test_scales_of_least_squared_error(headroom: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fp8._AT_ONCE, "cpu", 3 * 64)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 16)[:, None]
    weight[3] = 0
    best = least_squares_scales(weight, headroom)
    assert best.shape == (16, 1)
    assert torch.equal(best, best.bfloat16().float())
    assert best[3] == 1

    def error(scales: torch.Tensor) -> torch.Tensor:
        return (round_to_fp8(weight, scales) - weight).square().sum(1)

    lowest = channel_scales(weight, headroom)
    assert (best >= lowest).all()
    assert (error(best) <= error(lowest)).all()
    assert error(best).sum() < 0.95 * error(lowest).sum()
    # An octave further nothing is left to choose: the same weights round the same way.
    assert torch.allclose(error(2 * best), error(best), rtol=1e-2)


def test_rounding_to_fp8_and_back_is_the_rounding_of_the_loop() -> None:
    weight = torch.randn(64, 32)
    scales = channel_scales(weight)
    rounded = round_to_fp8(weight, scales)
    assert torch.equal(dequantize(to_fp8(weight, scales), scales), rounded)
    assert torch.equal(round_to_fp8(rounded, scales), rounded)
    assert ((rounded - weight).norm() / weight.norm()).item() < 2**-4


def test_rounding_is_that_of_the_type() -> None:
    """Every E4M3 value, halfway between each two, a little to either side of that, and what lies beyond."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (values[1:] + values[:-1]) / 2
    positive = torch.cat(
        [values, halfway, halfway * (1 + 2**-20), halfway * (1 - 2**-20), torch.tensor([1e-9, 449, 1e9])]
    )
    expected = positive.clamp(max=448).to(torch.float8_e4m3fn).float()
    one = torch.ones(1)
    assert torch.equal(round_to_fp8(positive, one), expected)
    assert torch.equal(round_to_fp8(-positive, one), -expected)
    assert round_to_fp8(torch.tensor([torch.nan]), one).isnan().all()


@pytest.mark.parametrize("weight", [-1e-9, -0.0])
def test_there_is_no_negative_zero(weight: float) -> None:
    assert to_fp8(torch.tensor([[weight, 1.0]]), torch.tensor([[1.0]])).view(torch.uint8)[0, 0] == 0


def test_growth_saturates_instead_of_becoming_nan() -> None:
    assert to_fp8(torch.tensor([[1000.0, -1000.0]]), torch.tensor([[1.0]])).float().tolist() == [[448.0, -448.0]]
