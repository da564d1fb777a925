"""What lies between gate_up and down in one kernel: scales, SiLU, product, quantization.

gate_up hands raw sums to the model's activation, `FusedSiluAndMul`, and that hands FP8 to down. Neither is a tensor, so
only models whose MLP is plainly down(SiluAndMul(gate_up(x))) are run like this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_spense.ops import elementwise_ops
from vllm_spense.plugin.pairing import Quantized, current_pairing, mispaired

#: Whose MLP is down(SiluAndMul(gate_up(x))) in vLLM, with nothing in between.
PLAIN_MLPS = frozenset(
    {
        "Exaone4ForCausalLM", "Glm4ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM",
    }
)  # fmt: skip


class RawSums(NamedTuple):
    """gate_up's output by region, before its scales: what `elementwise_ops.silu_mul_quant` takes; the layer's name."""

    raw: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    boundary: int
    gate_up: str


class FusedSiluAndMul(SiluAndMul):
    """vLLM's activation, which also takes `RawSums` and then returns `Quantized`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        pairing = current_pairing()
        self.link = pairing.next_activation() if pairing else None

    def forward(self, x: torch.Tensor | RawSums) -> torch.Tensor | Quantized:
        """(M, 2·I) in the model's dtype → (M, I) in it; or of raw sums (M, 2·I) → FP8 (M, I) for down.

        Raises:
            RuntimeError: the sums are those of another MLP.
        """
        if not isinstance(x, RawSums):
            return super().forward(x)
        if self.link is None or self.link.gate_up != x.gate_up:
            raise mispaired(x.gate_up, f"the activation of {self.link.gate_up}" if self.link else "another activation")
        values, scale = elementwise_ops.silu_mul_quant(x.raw, x.x_scale, x.w_scale, x.boundary)
        return Quantized(values, scale, self.link.mlp)
