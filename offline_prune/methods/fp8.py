"""FP8 E4M3 weights with one scale per output channel, as compressed-tensors' float-quantized format stores them."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP8_SMALLEST_NORMAL = torch.finfo(FP8).smallest_normal
#: Scales are stored, and therefore also computed, in this type: every reader then multiplies by the same number.
SCALE_DTYPE = torch.bfloat16
#: Compensation lets weights outgrow the largest original one. E4M3 is a floating-point format, so room for that
#: costs next to nothing, while saturated weights cost more than all other rounding (docs/pruning.md).
COMPENSATION_HEADROOM = 1.5
#: Scales that are tried in an octave.
_STEPS = 16
#: Weights that are rounded at once with them: what keeps a GPU busy, or stays in a CPU's cache.
_AT_ONCE = {"cuda": 2**24, "cpu": 2**18}
#: The bits of a float32 that say which power of two it lies above.
_EXPONENT = 0x7F800000


def channel_scales(weight: torch.Tensor, headroom: float = 1.0) -> torch.Tensor:
    """headroom · max |w| / 448 of each row.

    Args:
        weight: (…, N, K) float.
        headroom: how far weights may grow before they saturate.

    Returns:
        float32 (…, N, 1), positive, exactly representable in BF16; 1 for a row of zeros.
    """
    return _scales_for(weight.abs().amax(dim=-1, keepdim=True).float(), headroom)


def _scales_for(largest: torch.Tensor, headroom: float) -> torch.Tensor:
    scales = (headroom * largest / FP8_MAX).to(SCALE_DTYPE).float()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def least_squares_scales(weight: torch.Tensor, headroom: float = 1.0) -> torch.Tensor:
    """Each row's scale, from that of `channel_scales(weight, headroom)` up to twice it, with the least ‖w − ŵ‖².

    E4M3's steps double with each power of two, so twice a scale rounds all but the smallest weights as the scale does,
    and one octave holds all there is to choose from: which weights come to lie where the steps are relatively small.

    Args:
        weight: (…, N, K) float.
        headroom: how far weights may at least grow before they saturate.

    Returns:
        As `channel_scales`.
    """
    found = []
    for chunk in weight.flatten(0, -2).split(max(1, _AT_ONCE[weight.device.type] // weight.shape[-1])):
        chunk = chunk.float()
        largest = chunk.abs().amax(dim=1, keepdim=True)
        best = least = torch.full_like(largest, torch.inf)
        for step in range(_STEPS):
            scales = _scales_for(largest, headroom * 2 ** (step / _STEPS))
            error = (round_to_fp8(chunk, scales) - chunk).square_().sum(1, keepdim=True)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(least, error)
        found.append(best)
    return torch.cat(found).view(*weight.shape[:-1], 1)


def to_fp8(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 value of weight / scale, saturating.

    Args:
        weight: (N, K) float.
        scales: (N, 1) float32.

    Returns:
        float8_e4m3fn (N, K) without −0.0, whose bits differ from zero and confuse whoever counts zeros by bytes.
    """
    quantized = (weight.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    bits = quantized.view(torch.uint8)
    return torch.where(bits == 0x80, torch.zeros_like(bits), bits).view(FP8)


def dequantize(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 (N, K) from E4M3 (N, K) and scales (N, 1)."""
    return quantized.float() * scales.float()


def round_to_fp8(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`weight` as FP8 would return it: float32, the shape of `weight`; `scales` broadcasts against it."""
    values = (weight / scales).clamp_(-FP8_MAX, FP8_MAX)
    rounded = values.to(FP8).float() if values.is_cuda else _nearest_fp8(values)
    return rounded.mul_(scales)


def _nearest_fp8(values: torch.Tensor) -> torch.Tensor:
    """Rounds float32 to E4M3 in place, without its type, which torch turns back into float32 slowly on CPUs.

    E4M3's steps are 2⁻³ of a value's power of two, and float32's are 2⁻²³ of it: adding 1.5 · 2²⁰ times that power of
    two and taking it away again rounds to the nearest, ties to even.
    """
    large = values.abs().clamp_min_(FP8_SMALLEST_NORMAL)
    large.view(torch.int32).bitwise_and_(_EXPONENT)
    large.mul_(1.5 * 2**20)
    return values.add_(large).sub_(large)
