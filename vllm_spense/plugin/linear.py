"""The linear methods of pruned layers: output-split (gate, up) and input-split (down).

With X quantized per token and W per output channel, Y = (X₈·W₈ᵀ) · s_x · s_wᵀ. The scales go into the kernel after the
GEMM if that is ours. Else the GEMM multiplies by them where it can and Inductor's kernels take longer, else those do.

A weight's way: `loaders` fill this rank's `weight`; `process_weights_after_loading` checks it, `arrange` decides who
applies the scales and in which order the rows run, `layer_plan.plan_layer` packs it and decides how it runs, and the
packed tensors become parameters of the layer. `apply` hands those and the plan's key to the op.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_spense import layout
from vllm_spense.conformance import require_extent
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Problem, Scales, Split, sum_dtype
from vllm_spense.kernels.region_gemm.reference import scaled
from vllm_spense.layout import Shard
from vllm_spense.ops import elementwise_ops, gemm
from vllm_spense.ops.dense_copies import DenseCopies
from vllm_spense.ops.layer_plan import LayerPlan, plan_layer
from vllm_spense.plugin import compile_key, loaders, plain_layer, plain_mlp, soundness
from vllm_spense.plugin.activation import FusedSiluAndMul, RawSums
from vllm_spense.plugin.loaders import Loader
from vllm_spense.plugin.norms import DeferredGemm, only_norms_read_layers
from vllm_spense.plugin.pairing import Pairing, Quantized, mispaired
from vllm_spense.plugin.parents import parent_of

FP8 = torch.float8_e4m3fn
#: A vLLM linear layer. Its parameters and settings are attributes that torch.nn.Module's type does not know.
Layer = Any


class RegionLinearMethod(LinearMethodBase):
    """What both splits share. One instance serves one layer.

    Args:
        regions: of the unsharded layer, whatever the tensor parallel size.
        name: the layer's name.
        pairing: the links of the model's modules.
        copies: the dense copies of the model's layers.
    """

    split: ClassVar[Split]
    #: Of the weight as it is loaded.
    problem: Problem
    #: Of the weight as it runs.
    plan: LayerPlan
    #: Whether `apply` returns what the next module's kernel finishes, in place of outputs.
    defers_epilogue = False

    def __init__(self, regions: Regions, name: str, pairing: Pairing, copies: DenseCopies) -> None:
        self.regions = regions
        self.name = name
        #: What `Quantized` may be made for: this layer, or the module that it is in.
        self.reads_for = name, name.rpartition(".")[0]
        self.pairing = pairing
        self.copies = copies
        self.quantize = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        self.engine = engine = get_current_vllm_config()
        self.dummy = engine.load_config.load_format == "dummy"
        self.sleeps = getattr(engine.model_config, "enable_sleep_mode", False)
        self.max_tokens = engine.scheduler_config.max_num_batched_tokens

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers this rank's `weight` (N, K) FP8 E4M3 and `weight_scale` (N, 1) float32.

        Raises:
            FormatError: the regions do not add up to the intermediate size, or the tensor parallel size does not
                divide them.
        """
        # transformers may have gate and up in one layer, which vLLM then takes for one matrix.
        both = self.split == "output" and output_size == 2 * self.regions.intermediate
        self.projections = 2 if both else len(output_partition_sizes)
        intermediate = output_size // self.projections if self.split == "output" else input_size
        require_extent(self.regions, intermediate, self.name)
        shard = layout.shard(self.regions, layer.tp_rank, layer.tp_size, self.name)
        n, k = sum(output_partition_sizes), input_size_per_partition
        self.dtype = params_dtype
        self.tp_size = layer.tp_size
        self.problem = Problem(n, k, shard.regions, self.split, sum_dtype(params_dtype), self.projections)

        weight_loader, scale_loader = self.make_loaders(layer, shard)
        weight = torch.empty(n, k, dtype=FP8)
        # NaN until loaded: vLLM does not notice when a quantized checkpoint lacks a tensor.
        weight.view(torch.uint8).fill_(0x7F)
        scale = torch.full((n, 1), torch.nan, dtype=torch.float32)
        layer.register_parameter("weight", BasevLLMParameter(data=weight, weight_loader=weight_loader))
        layer.register_parameter("weight_scale", BasevLLMParameter(data=scale, weight_loader=scale_loader))

    @abstractmethod
    def make_loaders(self, layer: Layer, shard: Shard) -> tuple[Loader, Loader]:
        """Loaders of `weight` and `weight_scale`."""

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Replaces `weight` by `weight_…`, one parameter for each tensor of the layer's plan, and makes that plan.

        Raises:
            FormatError: the sparse region is not 2:4, or a weight or its scale is missing or no number.
        """
        weight, scale = layer.weight.data, layer.weight_scale.data
        if self.dummy:
            loaders.fill_dummy(weight, scale, self.problem)
        self._require_sound(weight, scale)
        del layer.weight
        weight, problem = self.arrange(layer, weight)
        if weight.is_cuda and not self.sleeps:
            # Or torch would cut packed weights out of what loaded ones leave, and the remainders would be of no use to
            # anything as large as a KV cache. Where the engine may sleep, vLLM has a pool of its own for weights, and
            # gives back itself what is left over in that.
            torch.cuda.empty_cache()
        self.plan, packed = plan_layer(weight, problem, self.name, self.max_tokens, self.copies)
        for name, tensor in packed.items():
            layer.register_parameter(f"weight_{name}", Parameter(tensor, requires_grad=False))
        layer.weight_scale = Parameter(scale, requires_grad=False)
        # LoRA looks under this name for the layer's device.
        layer.weight_packed = self.tensors(layer)[0]
        compile_key.record(self.engine, self.name, self.plan.key, *self.plan.tensors, *self.choices())

    @abstractmethod
    def arrange(self, layer: Layer, weight: torch.Tensor) -> tuple[torch.Tensor, Problem]:
        """W as it runs, and its GEMM; sets `defers_epilogue`."""

    def has_own_norms(self, layer: Layer, size: int, device: torch.device) -> bool:
        """Whether the norms around the layer's MLP are kernels of ours, for hidden states of this size."""
        plain = self.pairing.norms and plain_layer.is_in_plain(layer)
        return plain and elementwise_ops.fuses_norm(size, self.dtype, device)

    def choices(self) -> tuple[object, ...]:
        """What else was decided about this layer on this machine, and shows in how it is traced."""
        return (self.defers_epilogue,)

    @soundness.said_by_workers()
    def _require_sound(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        soundness.require_loaded(weight, self.name)
        for sparse, _ in self.problem.split_regions(weight):
            layout.require_2of4(sparse, self.name)
        soundness.require_scales(scale, self.name)

    def tensors(self, layer: Layer) -> list[torch.Tensor]:
        """The packed weight, in the order of the plan's `tensors`."""
        return [getattr(layer, f"weight_{name}") for name in self.plan.tensors]

    def gemm(self, layer: Layer, x: torch.Tensor, scales: Scales | None = None) -> torch.Tensor:
        """(M, K) FP8 → raw sums (M, N), or outputs where the GEMM scales."""
        return gemm.region_gemm(x, self.tensors(layer), self.plan.key, scales)

    def apply(self, layer: Layer, x: Any, bias: torch.Tensor | None = None) -> Any:
        """Y = X·Wᵀ + b.

        Args:
            x: (…, K) in the model's dtype, or `Quantized`.
            bias: (N,), in the order of the weight's rows.

        Returns:
            (…, N) in the model's dtype; gate and up merged: [gate | up]. Or what `deferred` returns.

        Raises:
            RuntimeError: x was made for another layer.
        """
        if isinstance(x, Quantized):
            if x.reader not in self.reads_for:
                raise mispaired(x.reader, self.name)
            values, scale, leading = x.values, x.scale, x.leading
        else:
            values, scale = self.quantize(x.reshape(-1, self.problem.k))
            leading = () if x.dim() == 2 else x.shape[:-1]
        if self.plan.problem.scaled:
            y = self.gemm(layer, values, (scale, layer.weight_scale))
            y = y if bias is None else y + bias
        elif self.defers_epilogue and bias is None and (self.split == "output" or not leading):
            return self.deferred(layer, values, scale, leading)
        else:
            y = self.scaled(layer, self.gemm(layer, values), scale, bias)
        return y.view(*leading, self.problem.n) if leading else y

    @abstractmethod
    def deferred(
        self, layer: Layer, x: torch.Tensor, x_scale: torch.Tensor, leading: Sequence[int]
    ) -> RawSums | DeferredGemm:
        """What the next module's kernel finishes; x is (M, K) FP8, x_scale (M, 1), `leading` as in `Quantized`."""

    def scaled(self, layer: Layer, raw: torch.Tensor, x_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Raw sums (M, N) → outputs (M, N) in the model's dtype."""
        y = scaled(raw, x_scale, layer.weight_scale)
        if bias is not None:
            y = y + bias
        return y.to(self.dtype)


class OutputSplitLinearMethod(RegionLinearMethod):
    """gate and up, merged or alone: the regions are rows, and each region's GEMM writes its own columns."""

    split = "output"

    def __init__(self, regions: Regions, name: str, pairing: Pairing, copies: DenseCopies) -> None:
        super().__init__(regions, name, pairing, copies)
        self.norm = pairing.built_gate_up(name)

    def arrange(self, layer: Layer, weight: torch.Tensor) -> tuple[torch.Tensor, Problem]:
        """By region, where the activation that follows takes raw sums: it can take them in any order. Else the GEMM
        scales if it can: the compiler's kernel of the activation takes four times as long with scales in it."""
        device = weight.device
        merged = self.problem.projections == 2
        takes_sums = (
            merged and self.pairing.activations and plain_mlp.is_plain(parent_of(layer), layer, FusedSiluAndMul)
        )
        self.defers_epilogue = takes_sums and elementwise_ops.fuses_activation(self.problem, device)
        self.norm.takes_fp8 = merged and self.has_own_norms(layer, self.problem.k, device)
        if self.defers_epilogue:
            return self.problem.by_region(weight), self.problem.region_major()
        return weight, replace(self.problem, scaled=gemm.applies_scales(self.problem, device))

    def choices(self) -> tuple[object, ...]:
        return *super().choices(), self.norm.takes_fp8

    def deferred(self, layer: Layer, x: torch.Tensor, x_scale: torch.Tensor, leading: Sequence[int]) -> RawSums:
        boundary, mlp = self.problem.regions.sparse, self.reads_for[1]
        return RawSums(self.gemm(layer, x), x_scale, layer.weight_scale, boundary, mlp, leading)

    def make_loaders(self, layer: Layer, shard: Shard) -> tuple[Loader, Loader]:
        load_rows = loaders.rows_loader(self.name, self.regions.intermediate, shard, self.projections)
        # A bias goes with the weight's rows. The layer creates it after the weights, with the loader it finds here.
        layer.weight_loader = load_rows
        return load_rows, load_rows


class InputSplitLinearMethod(RegionLinearMethod):
    """down: the regions are columns; the sparse GEMM writes the output, the dense GEMM accumulates into it."""

    split = "input"

    def __init__(self, regions: Regions, name: str, pairing: Pairing, copies: DenseCopies) -> None:
        super().__init__(regions, name, pairing, copies)
        self.only_norms_read = only_norms_read_layers(self.engine)

    def arrange(self, layer: Layer, weight: torch.Tensor) -> tuple[torch.Tensor, Problem]:
        """Where the next norm is a kernel of ours it adds up the regions' sums and applies the scales, or else the GEMM
        does: the compiler has no kernel to fuse that with."""
        own_norm = self.has_own_norms(layer, self.problem.n, weight.device)
        own_norm = own_norm and self.dtype == self.problem.out_dtype
        # Of several ranks each has scales of its own, and their outputs are added up before any norm.
        self.defers_epilogue = own_norm and self.only_norms_read and self.tp_size == 1
        scaled = own_norm and not self.defers_epilogue
        return weight, replace(self.problem, scaled=scaled, separate_outputs=self.defers_epilogue)

    def deferred(self, layer: Layer, x: torch.Tensor, x_scale: torch.Tensor, leading: Sequence[int]) -> DeferredGemm:
        return DeferredGemm(x, self.tensors(layer), self.plan.key, x_scale, layer.weight_scale)

    def make_loaders(self, layer: Layer, shard: Shard) -> tuple[Loader, Loader]:
        load_columns = loaders.columns_loader(self.name, self.regions.intermediate, shard)
        return load_columns, loaders.replicated_loader(self.name)
