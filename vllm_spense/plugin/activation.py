"""What lies between gate_up and down in one kernel: scales, SiLU, product, quantization.

gate_up hands raw sums to the model's activation, `FusedSiluAndMul`, and that hands FP8 to down. Neither is a tensor, so
only MLPs that are plainly down(SiluAndMul(gate_up(x))) are run like this: `plain_mlp.reason_against` finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_spense.ops import elementwise_ops
from vllm_spense.plugin.pairing import Quantized


class RawSums(NamedTuple):
    """gate_up's output by region, before its scales: what `elementwise_ops.silu_mul_quant` takes.

    `mlp` is the name of the module that gate_up is in, `leading` as in `Quantized`.
    """

    raw: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    boundary: int
    mlp: str
    leading: Sequence[int] = ()


class FusedSiluAndMul(SiluAndMul):
    """vLLM's activation, which also takes `RawSums` and then returns `Quantized`."""

    def forward(self, x: torch.Tensor | RawSums) -> torch.Tensor | Quantized:
        """(…, 2·I) in the model's dtype → (…, I) in it; or of raw sums (M, 2·I) → FP8 (M, I) for down."""
        if not isinstance(x, RawSums):
            return super().forward(x)
        values, scale = elementwise_ops.silu_mul_quant(x.raw, x.x_scale, x.w_scale, x.boundary)
        return Quantized(values, scale, x.mlp, x.leading)
