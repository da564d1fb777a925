"""The methods of pruned experts: region by region, or as vLLM's own dense FP8 experts where no kernel of ours runs.

Both load this rank's share of both regions of each of its experts, whole experts under expert parallelism, into vLLM's
`w13_weight` (gate and up) and `w2_weight` (down), and check them. vLLM's router chooses the experts of each token, and
its runner adds up the ranks' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from vllm.logger import init_logger

from vllm_spense import layout
from vllm_spense.conformance import require_extent
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import Regions
from vllm_spense.ops import experts
from vllm_spense.ops.dispatch import SWITCH, Path
from vllm_spense.ops.machine import forced
from vllm_spense.plugin import loaders, soundness
from vllm_spense.plugin.vllm_internals import CompressedTensorsW8A8Fp8MoEMethod, FusedMoEMethodBase, local_experts

logger = init_logger("vllm.spense")

FP8 = torch.float8_e4m3fn
#: vLLM's `RoutedExperts`. Its parameters and settings are attributes that torch.nn.Module's type does not know.
Layer = Any
#: Settings of a layer that change what its experts compute, and that the twin does not know.
_FOREIGN = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "apply_router_weight_on_input")


class ExpertRegions:
    """Which indices of which experts this rank holds, how they are loaded, and whether they are sound.

    Args:
        regions: of every expert of the layer, whatever the parallel sizes.
        count: how many experts the checkpoint has in this layer.
        name: the layer's.
        dummy: whether vLLM fills the weights itself.
    """

    def __init__(self, regions: Regions, count: int, name: str, dummy: bool) -> None:
        self.regions, self.count, self.name, self.dummy = regions, count, name, dummy

    def reason_against_kernel(self, layer: Layer, device: torch.device) -> str | None:
        """Why Spense's kernel does not run this rank's experts, or None if it does; `SPENSE_PATH` may ask for stock's.

        Raises:
            FormatError: the tensor parallel size does not divide the regions.
            SpenseError: `SPENSE_PATH` insists on the kernel, and it cannot run.
        """
        path = forced()
        if path is Path.DENSE:
            return f"{SWITCH}={path}"
        moe = layer.moe_config
        parallel = moe.moe_parallel_config
        shard = layout.shard(self.regions, parallel.tp_rank, parallel.tp_size, self.name)
        count, top_k, activation = moe.num_local_experts, moe.experts_per_token, moe.activation.value
        reason = experts.reason_against_kernel(
            moe.hidden_dim, shard.regions, count, top_k, moe.in_dtype, activation, device
        )
        if reason and path is Path.ONE_LAUNCH:
            raise SpenseError(f"{SWITCH}={path} cannot be followed: {reason} (layer: {self.name})")
        return reason

    def create_weights(self, layer: Layer, num_experts: int, hidden_size: int) -> Regions:
        """Registers this rank's weights, FP8 E4M3, and scales, float32; returns its regions.

        Raises:
            FormatError: the regions do not add up to the intermediate size, or the tensor parallel size does not divide
                them; or the checkpoint has more or fewer experts.
            SpenseError: the experts compute something else than down(f(gate(x)) ⊙ up(x)).
        """
        moe = layer.moe_config
        require_extent(self.regions, moe.intermediate_size, self.name)
        if moe.num_experts != self.count:
            raise FormatError(
                "another number of experts than the model has",
                layer=self.name,
                key="experts",
                found=self.count,
                expected=moe.num_experts,
            )
        foreign = [name for name in _FOREIGN if getattr(layer, name, None)]
        activation = moe.activation.value
        if foreign or moe.has_bias or activation not in experts.ACTIVATIONS:
            found = ", ".join((*foreign, *["biases"] * bool(moe.has_bias), f"activation {activation}"))
            raise SpenseError(
                f"{self.name}: Spense does not run these experts: found {found}; expected no biases and one of "
                f"{' | '.join(experts.ACTIVATIONS)}. --quantization compressed-tensors serves the same files as dense"
            )
        parallel = moe.moe_parallel_config
        shard = layout.shard(self.regions, parallel.tp_rank, parallel.tp_size, self.name)
        local = local_experts(layer)
        rows = loaders.expert_rows_loader(self.name, self.regions.intermediate, shard, local)
        columns = loaders.expert_columns_loader(self.name, self.regions.intermediate, shard, local)
        size = shard.regions.intermediate
        shapes = {"w13": (num_experts, 2 * size, hidden_size), "w2": (num_experts, hidden_size, size)}
        for part, shape in shapes.items():
            weight = torch.empty(shape, dtype=FP8)
            # NaN until loaded: vLLM does not notice when a quantized checkpoint lacks a tensor.
            weight.view(torch.uint8).fill_(0x7F)
            scale = torch.full((*shape[:2], 1), torch.nan, dtype=torch.float32)
            whole = loaders.expert_loader(self.name, local)
            for name, tensor, load in (
                (f"{part}_weight", weight, rows if part == "w13" else columns),
                (f"{part}_weight_scale", scale, rows if part == "w13" else whole),
            ):
                parameter = Parameter(tensor, requires_grad=False)
                parameter.weight_loader = load  # type: ignore[attr-defined]
                layer.register_parameter(name, parameter)
        layer.w13_input_scale = layer.w2_input_scale = None
        return shard.regions

    @soundness.said_by_workers()
    def require_sound(self, layer: Layer, regions: Regions) -> None:
        """Raises FormatError unless every expert's sparse regions are 2:4, and its weights and scales numbers."""
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        if self.dummy:
            loaders.fill_dummy_experts(w13, layer.w13_weight_scale.data, w2, layer.w2_weight_scale.data, regions)
        for expert, (gate_up, down) in enumerate(zip(w13, w2, strict=True)):
            name = f"{self.name}, expert {expert} of this rank"
            for weight in (gate_up, down):
                soundness.require_loaded(weight, name)
            for projection in gate_up.chunk(2):
                layout.require_2of4(projection[: regions.sparse], name)
            layout.require_2of4(down[:, : regions.sparse], name)
        for part in ("w13", "w2"):
            soundness.require_scales(getattr(layer, f"{part}_weight_scale").data, self.name)


class RegionExpertsMethod(FusedMoEMethodBase):
    """Runs the regions by `ops.experts.expert_mlp`. One instance serves one layer.

    Args:
        kernel_tokens: the most tokens of a step, where the kernel runs them; None where plain torch does.
    """

    def __init__(self, layer: Layer, parts: ExpertRegions, kernel_tokens: int | None = None) -> None:
        super().__init__(layer.moe_config)
        self.parts = parts
        self.kernel_tokens = kernel_tokens

    def create_weights(
        self,
        layer: Layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers this rank's weights: see `ExpertRegions.create_weights`."""
        self.dtype = params_dtype
        self.regions = self.parts.create_weights(layer, num_experts, hidden_size)
        self.activation = layer.moe_config.activation.value

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Replaces vLLM's weights by `weight_…`, one parameter for each tensor of `ExpertWeights`.

        Raises:
            FormatError: a sparse region is not 2:4, or a weight or its scale is missing or no number.
        """
        self.parts.require_sound(layer, self.regions)
        packed = experts.pack(
            layer.w13_weight.data,
            layer.w13_weight_scale.data,
            layer.w2_weight.data,
            layer.w2_weight_scale.data,
            self.regions,
            self.dtype,
            by_kernel=self.kernel_tokens is not None,
        )
        if self.kernel_tokens is not None:
            experts.prepare(packed, layer.moe_config.experts_per_token, self.kernel_tokens)
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            delattr(layer, name)
        for name, tensor in packed.tensors().items():
            layer.register_parameter(f"weight_{name}", Parameter(tensor, requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Layer) -> None:
        """None: none of vLLM's fused experts runs."""

    def apply(
        self,
        layer: Layer,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """(M, H), the weighted sum of this rank's part of each token's experts."""
        local = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        weights = experts.ExpertWeights(
            **{name: getattr(layer, f"weight_{name}") for name in experts.ExpertWeights.__dataclass_fields__}
        )
        return experts.expert_mlp(x, local, topk_weights, weights, self.activation)


class DenseExpertsMethod(CompressedTensorsW8A8Fp8MoEMethod):
    """vLLM's own dense FP8 experts, of which each rank holds a part of both regions. One instance serves one layer.

    Args:
        stock: vLLM's method for this layer.
        reason: why Spense's kernel does not run.
    """

    def __init__(self, stock: CompressedTensorsW8A8Fp8MoEMethod, parts: ExpertRegions, reason: str) -> None:
        super().__init__(stock.weight_quant, stock.input_quant, stock.moe)
        self.parts = parts
        logger.info_once("pruned experts run as dense FP8 by vLLM's own kernels, not by Spense's: %s", reason)

    def create_weights(self, layer: Layer, num_experts: int, hidden_size: int, *args: Any, **given: Any) -> None:
        """Registers this rank's weights: see `ExpertRegions.create_weights`."""
        super().create_weights(layer, num_experts, hidden_size, *args, **given)
        self.regions = self.parts.create_weights(layer, num_experts, hidden_size)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Checks the weights and gives them to vLLM's kernel.

        Raises:
            FormatError: a sparse region is not 2:4, or a weight or its scale is missing or no number.
        """
        self.parts.require_sound(layer, self.regions)
        super().process_weights_after_loading(layer)
