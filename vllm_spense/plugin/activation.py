"""What lies between gate_up and down in one kernel: scales, SiLU, product, quantization.

gate_up hands raw sums to the model's activation, `FusedSiluAndMul`, and that hands FP8 to down. Neither is a tensor, so
only models whose MLP is plainly down(SiluAndMul(gate_up(x))) are run like this.
"""

from __future__ import annotations

import weakref
from collections.abc import Set
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul

from vllm_spense.ops import elementwise_ops

#: Whose MLP is down(SiluAndMul(gate_up(x))) in vLLM, with nothing in between.
PLAIN_MLPS = frozenset(
    {
        "Exaone4ForCausalLM", "Glm4ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM",
    }
)  # fmt: skip


class RawSums(NamedTuple):
    """gate_up's output by region and before its scales: what `glue.silu_mul_quant` takes."""

    raw: torch.Tensor
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    boundary: int


class Quantized(NamedTuple):
    """A linear layer's input in FP8, (M, K), and a scale for each token, (M, 1)."""

    values: torch.Tensor
    scale: torch.Tensor


class Claim:
    """Whether the activation behind a gate_up layer is `FusedSiluAndMul`."""

    waiting: weakref.ref[Claim] | None = None

    def __init__(self) -> None:
        self.made = False

    @classmethod
    def of_next_activation(cls, engine: VllmConfig) -> Claim:
        """For a layer that is being built: models build an MLP's activation after its linear layers."""
        claim = cls()
        if may_stand_in(FusedSiluAndMul, engine, PLAIN_MLPS):
            cls.waiting = weakref.ref(claim)
        return claim


class FusedSiluAndMul(SiluAndMul):
    """vLLM's activation, which also takes `RawSums` and then returns `Quantized`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if Claim.waiting and (claim := Claim.waiting()):
            claim.made = True
        Claim.waiting = None

    def forward(self, x: torch.Tensor | RawSums) -> torch.Tensor | Quantized:
        if isinstance(x, RawSums):
            return Quantized(*elementwise_ops.silu_mul_quant(*x))
        return super().forward(x)


def may_stand_in(ours: type[CustomOp], engine: VllmConfig, architectures: Set[str]) -> bool:
    """Makes vLLM build `ours` for the op that it derives from, in models that are plain enough for what it hands on.

    Returns:
        Whether that is done: not for other architectures, and not if a platform has an op of its own.
    """
    model = engine.model_config
    # LoRA reads inputs and adds to outputs in the model's dtype.
    if model is None or engine.lora_config is not None or not architectures >= set(model.architectures):
        return False
    vllms = ours.__base__
    assert vllms is not None
    if vllms.__name__ not in op_registry_oot:
        vllms.register_oot(ours)  # type: ignore[attr-defined]
        # Under which vLLM's `custom_ops` go on to mean it.
        ours.name = vllms.name  # type: ignore[attr-defined]
    return op_registry_oot[vllms.__name__] is ours
