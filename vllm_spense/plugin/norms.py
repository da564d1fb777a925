"""The norm before a linear layer together with that layer's quantization: one kernel that lets the GEMM begin early.

The norm of a decoder layer hands FP8 to the linear layer behind it, and runs down, before it, as well. Neither is a
tensor, so only models are run like this whose decoder layers are plainly qkv(norm(x)) and gate_up(norm(x)).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_spense.kernels.region_gemm import reference
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.ops import elementwise_ops, gemm
from vllm_spense.plugin.activation import Quantized, may_stand_in

#: Whose decoder layers build, in this order, qkv_proj, gate_up_proj, the norm before qkv_proj and the norm before
#: gate_up_proj, and give each norm's output to that layer alone.
PLAIN_NORMS = frozenset({"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM"})


class Deferred(NamedTuple):
    """down's input, its weight as `ops.pack` returned it, and the weight's scales (N, 1): for the norm behind it."""

    x: Quantized
    packed: Mapping[str, torch.Tensor]
    problem: Problem
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
    """vLLM's norm, which also takes `Deferred`, and returns `Quantized` where the layer behind it takes that."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        first = NormClaim.waiting.pop(0) if NormClaim.waiting else None
        self.claim = first and first()
        self.plain = self.has_weight and self.variance_size_override is None

    def forward(
        self, x: torch.Tensor | Deferred, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor | Quantized, torch.Tensor]:
        if residual is None or not (self.plain and self.claim and self.claim.takes_fp8):
            return super().forward(finished(x) if isinstance(x, Deferred) else x, residual)
        own = self.weight.data, self.variance_epsilon
        if isinstance(x, Deferred):
            scales = x.x.scale, x.w_scale
            *fp8, total = elementwise_ops.gemm_add_norm_quant(x.x.values, x.packed, x.problem, scales, residual, *own)
        else:
            *fp8, total = elementwise_ops.add_norm_quant(x, residual, *own)
        return Quantized(*fp8), total


def finished(down: Deferred) -> torch.Tensor:
    """down's output (M, N) for a norm that is not ours."""
    raw = gemm.region_gemm(down.x.values, down.packed, down.problem)
    return reference.scaled(raw, down.x.scale, down.w_scale).to(raw.dtype)


def has_plain_norms(engine: VllmConfig) -> bool:
    """Whether norms may hand on FP8 in this engine's model."""
    return may_stand_in(FusedRMSNorm, engine, PLAIN_NORMS)


def only_norms_read_layers(engine: VllmConfig) -> bool:
    """Whether what a decoder layer returns goes to a norm and nowhere else, given `has_plain_norms`: not to another
    process of a pipeline, nor to a draft model."""
    return engine.parallel_config.pipeline_parallel_size == 1 and engine.speculative_config is None
