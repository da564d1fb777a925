"""The norm before a linear layer together with that layer's quantization: one kernel that lets the GEMM begin early.

The norm of a decoder layer hands FP8 to the linear layer after it, and runs the down_proj before it as well. Neither is
a tensor, so only decoder layers are run like this that are plainly qkv(norm(x)) and gate_up(norm(x)):
`plain_layer.is_in_plain` finds out.

Down's way, from its input to the next layer's:

1. `InputSplitLinearMethod.apply` multiplies nothing: it returns a `DeferredGemm`, which is all that the GEMM takes.
2. vLLM's decoder layer returns that, and the next one, or the end of the model, hands it to its `FusedRMSNorm`.
3. The norm calls one op with all of it, `spense::gemm_add_norm_quant`. Inside, the plan of that key multiplies by the
   path for this number of tokens, and leaves one or two outputs; the norm's kernel adds them to each other and to the
   residual stream, applies the scales, and rounds to FP8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_spense.kernels.region_gemm import reference
from vllm_spense.ops import elementwise_ops, gemm
from vllm_spense.plugin.pairing import Quantized, current_pairing


class DeferredGemm(NamedTuple):
    """A GEMM that the next norm runs: what `ops.region_gemm` takes, and the scales that its raw sums lack.

    `x` is (M, K) FP8, `x_scale` (M, 1) and `w_scale` (N, 1) float32; `tensors` and `key` are the layer's plan's.
    """

    x: torch.Tensor
    tensors: Sequence[torch.Tensor]
    key: str
    x_scale: torch.Tensor
    w_scale: torch.Tensor

    def outputs(self) -> torch.Tensor:
        """(M, N), for a norm whose kernel is not ours."""
        raw = gemm.region_gemm(self.x, self.tensors, self.key)
        return reference.scaled(raw, self.x_scale, self.w_scale).to(raw.dtype)


class FusedRMSNorm(RMSNorm):
    """vLLM's norm, which also takes `DeferredGemm`, and returns `Quantized` where the layer after it takes that."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        pairing = current_pairing()
        self.link = pairing.next_norm() if pairing else None
        self.plain = self.has_weight and self.variance_size_override is None

    def forward(
        self, x: torch.Tensor | DeferredGemm, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor | Quantized, torch.Tensor]:
        """As vLLM's, but for the types: x (M, K) or the GEMM that makes it."""
        if residual is None or not (self.plain and self.link and self.link.takes_fp8):
            return super().forward(x.outputs() if isinstance(x, DeferredGemm) else x, residual)
        own = self.weight.data, self.variance_epsilon
        if isinstance(x, DeferredGemm):
            scales = x.x_scale, x.w_scale
            values, scale, total = elementwise_ops.gemm_add_norm_quant(x.x, x.tensors, x.key, scales, residual, *own)
        else:
            values, scale, total = elementwise_ops.add_norm_quant(x, residual, *own)
        return Quantized(values, scale, self.link.reader), total


def only_norms_read_layers(engine: VllmConfig) -> bool:
    """Whether what a plain decoder layer returns goes to a norm and nowhere else: not to another process of a
    pipeline, nor to a draft model."""
    return engine.parallel_config.pipeline_parallel_size == 1 and engine.speculative_config is None
