"""FP8 layers that were not pruned (attention) on the kernels of those that were: a dense region, and no sparse one.

At decode sizes they, too, take as long as their weights take to arrive, and the one-launch path fetches faster. The
weight is the one that vLLM made: nothing is stored twice.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from vllm_spense import ops
from vllm_spense.format import Regions
from vllm_spense.kernels.problem import Problem, sum_dtype


class UnprunedScheme(CompressedTensorsW8A8Fp8):
    """vLLM's scheme for FP8 weights per channel, activations per token, until its weights are there."""

    problem: Problem | None = None

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        self.max_tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        self.quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Takes the layer over if a fast path can run it from vLLM's own weight."""
        super().process_weights_after_loading(layer)
        weight = layer.weight.data.t()
        n, k = weight.shape
        problem = Problem(n, k, Regions(0, n), "output", sum_dtype(layer.orig_dtype))
        if weight.is_contiguous() and ops.runs_fast(problem, weight.device):
            self.problem = problem
            layer.register_buffer("weight_compressed", weight.new_empty(0, dtype=torch.uint8), persistent=False)
            ops.prepare(problem, self.max_tokens, weight.device)

    def apply_weights(self, layer: Any, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        # vLLM may have quantized x already, for its own kernel.
        if self.problem is None or not isinstance(x, torch.Tensor):
            return super().apply_weights(layer, x, bias)
        x_fp8, x_scale = self.quantize(x.reshape(-1, self.problem.k))
        packed = {"compressed": layer.weight_compressed, "dense": layer.weight.t()}
        y = ops.region_gemm(x_fp8, packed, self.problem) * x_scale * layer.weight_scale.view(1, -1)
        if bias is not None:
            y = y + bias
        return y.to(x.dtype).view(*x.shape[:-1], self.problem.n)
