"""Unpruned layers: vLLM's own FP8 layers, with another kernel where it is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform

from vllm_spense.kernels.region_gemm.problem import sum_dtype
from vllm_spense.kernels.region_gemm.reference import scaled
from vllm_spense.ops import elementwise_ops
from vllm_spense.ops.unpruned_ops import prepare_unpruned, unpruned_gemm
from vllm_spense.plugin import compile_key, plain_layer
from vllm_spense.plugin.pairing import NormLink, Pairing, Quantized, mispaired
from vllm_spense.plugin.vllm_internals import (
    ChannelWiseTorchFP8ScaledMMLinearKernel,
    CompressedTensorsW8A8Fp8,
    CutlassFP8ScaledMMLinearKernel,
    stock_gemm,
)


class UnprunedFp8(CompressedTensorsW8A8Fp8):
    """vLLM's scheme for FP8 per channel and token, which picks the kernel."""

    layer_name: str | None = None
    #: To the norm before this layer, if it is one of attention's that has a norm before it.
    norm: NormLink | None = None

    @classmethod
    def instead_of(cls, scheme: Any, layer_name: str | None, pairing: Pairing) -> Any:
        """This scheme, if the given one of vLLM's is what it can stand for; else the given one."""
        if type(scheme) is not CompressedTensorsW8A8Fp8 or scheme.is_static_input_scheme:
            return scheme
        if scheme.strategy != QuantizationStrategy.CHANNEL:
            return scheme
        ours = cls(scheme.weight_quant, scheme.is_static_input_scheme)
        ours.layer_name = layer_name
        if layer_name and layer_name.endswith(".qkv_proj"):
            ours.norm = pairing.built_qkv(layer_name)
        return ours

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            input_size=input_size,
            output_size=output_size,
            params_dtype=params_dtype,
            weight_loader=weight_loader,
            **kwargs,
        )
        found = self.fp8_linear
        if type(found) is CutlassFP8ScaledMMLinearKernel and params_dtype == torch.bfloat16:
            self.fp8_linear = UnprunedKernel(found.config, found.layer_param_names)
            self.fp8_linear.layer_name, self.fp8_linear.norm = self.layer_name, self.norm
            self.fp8_linear.engine = get_current_vllm_config()
        elif type(found) is ChannelWiseTorchFP8ScaledMMLinearKernel and current_platform.is_cpu():
            self.fp8_linear = UnprunedOnCpu(found.config, found.layer_param_names)
            self.fp8_linear.dtype = sum_dtype(params_dtype)


class UnprunedOnCpu(ChannelWiseTorchFP8ScaledMMLinearKernel):
    """vLLM's kernel, with weights in a type that a CPU multiplies, as pruned layers have them there.

    torch's own product of FP8 matrices takes several hundred times as long on Intel CPUs with AMX.
    """

    dtype: torch.dtype

    def get_output_padding(self) -> int | None:
        """None: it is torch's own product that wants more rows."""
        return None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        layer.weight = torch.nn.Parameter(weight.data.to(self.dtype), requires_grad=False)

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[Any],
    ) -> torch.Tensor:
        out = scaled(A.to(B.dtype) @ B, As, Bs)
        out = out if bias is None else out + bias
        return out.to(out_dtype).view(*output_shape)


class UnprunedKernel(CutlassFP8ScaledMMLinearKernel):
    """vLLM's kernel, or ours for few tokens, if it was faster there."""

    ours = False
    quantizes = False
    layer_name: str | None = None
    norm: NormLink | None = None
    engine: VllmConfig

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        k, n = weight.shape
        self.ours = (
            weight.t().is_contiguous()
            and n == self.logical_output_size
            and prepare_unpruned(n, k, weight.device, stock_gemm())
        )
        self.quantizes = self.ours and elementwise_ops.fuses_norm(k, torch.bfloat16, weight.device)
        if self.norm:
            self.norm.takes_fp8 = self.quantizes and plain_layer.is_in_plain(layer)
        compile_key.record(self.engine, f"{n} × {k}", self.ours, self.quantizes)

    def apply_weights(self, layer: torch.nn.Module, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.quantizes:
            return super().apply_weights(layer, x, bias)
        if isinstance(x, Quantized):
            if x.reader != self.layer_name:
                raise mispaired(x.reader, str(self.layer_name))
            values, x_scale = x.values, x.scale
        else:
            # After attention there is no kernel of the compiler's that could quantize on the way.
            values, x_scale = elementwise_ops.quantize(x.reshape(-1, x.shape[-1]))
        weight, scale, *_ = self._get_layer_params(layer)
        return self.apply_scaled_mm(
            A=values, B=weight, out_dtype=torch.bfloat16, As=x_scale, Bs=scale, bias=bias,
            output_shape=[values.shape[0], weight.shape[1]],
        )  # fmt: skip

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[Any],
    ) -> torch.Tensor:
        if self.ours and bias is None and out_dtype == torch.bfloat16:
            return unpruned_gemm(A, B.t(), As, Bs).view(*output_shape)
        return super().apply_scaled_mm(
            A=A, B=B, out_dtype=out_dtype, As=As, Bs=Bs, bias=bias, output_shape=output_shape
        )
