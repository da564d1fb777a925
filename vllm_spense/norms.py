"""The norm before a linear layer together with that layer's quantization: one kernel that lets the GEMM begin early.

The norm of a decoder layer hands FP8 to the linear layer behind it, and takes raw sums from down before it. Neither is
a tensor, so only models are run like this whose decoder layers are plainly qkv(norm(x)) and gate_up(norm(x)).
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_spense import glue
from vllm_spense.activation import Quantized, may_stand_in
from vllm_spense.kernels import reference

#: Whose decoder layers build, in this order, qkv_proj, gate_up_proj, the norm before qkv_proj and the norm before
#: gate_up_proj, and give each norm's output to that layer alone.
PLAIN_NORMS = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM"})


class Unscaled(NamedTuple):
    """down's output (M, N) before its scales, and these: of the tokens (M, 1) and of the columns (N, 1)."""

    raw: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor


class NormClaim:
    """What a linear layer says to the norm before it: whether it takes `Quantized`."""

    #: Of the decoder layer that is being built, before and after its gate_up.
    of_attention: ClassVar[weakref.ref[NormClaim] | None] = None
    waiting: ClassVar[list[weakref.ref[NormClaim] | None]] = []

    def __init__(self) -> None:
        self.takes_fp8 = False

    @classmethod
    def of_qkv(cls, engine: VllmConfig) -> NormClaim:
        """For a layer that is being built."""
        claim = cls()
        cls.waiting = []
        cls.of_attention = weakref.ref(claim) if has_plain_norms(engine) else None
        return claim

    @classmethod
    def of_gate_up(cls, engine: VllmConfig) -> NormClaim:
        """For a layer that is being built, behind its decoder layer's qkv: the norms come next."""
        claim = cls()
        cls.waiting = [cls.of_attention, weakref.ref(claim)] if has_plain_norms(engine) else []
        cls.of_attention = None
        return claim


class FusedRMSNorm(RMSNorm):
    """vLLM's norm, which also takes `Unscaled`, and returns `Quantized` where the layer behind it takes that."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        first = NormClaim.waiting.pop(0) if NormClaim.waiting else None
        self.claim = first and first()
        self.plain = self.has_weight and self.variance_size_override is None

    def forward(
        self, x: torch.Tensor | Unscaled, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor | Quantized, torch.Tensor]:
        scales = None
        if isinstance(x, Unscaled):
            scales = x.x_scale, x.w_scale
            x = x.raw
        if residual is None or not (self.plain and self.claim and self.claim.takes_fp8):
            return super().forward(x if scales is None else reference.scaled(x, *scales).to(x.dtype), residual)
        values, scale, total = glue.add_norm_quant(x, residual, self.weight.data, self.variance_epsilon, scales)
        return Quantized(values, scale), total


def has_plain_norms(engine: VllmConfig) -> bool:
    """Whether norms may hand on FP8 in this engine's model."""
    return may_stand_in(FusedRMSNorm, engine, PLAIN_NORMS)


def only_norms_read_layers(engine: VllmConfig) -> bool:
    """Whether what a decoder layer returns goes to a norm and nowhere else, given `has_plain_norms`: not to another
    process of a pipeline, nor to a draft model."""
    return engine.parallel_config.pipeline_parallel_size == 1 and engine.speculative_config is None
