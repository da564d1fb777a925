"""Everything of vLLM that Spense uses although it is not vLLM's public interface for plugins.

Each function says what it depends on; a test of the same name fails where a new vLLM has changed it. All of it was read
in the sources of `versions.CHECKED`. One more dependency is a list of classes whose source has a certain form, `PLAIN`
in `plain_layer.py`; the tests of that module hold it to vLLM's sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm import __version__
from vllm.model_executor.custom_op import CustomOp, maybe_get_oot_by_class
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import ChannelWiseTorchFP8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 import (  # noqa: E501
    CompressedTensorsW8A8Fp8MoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_spense.kernels.region_gemm.unpruned_gemm import StockGemm

#: vLLM's classes that `unpruned_linear.py` derives from: attributes `fp8_linear`, `config`, `layer_param_names`,
#: `logical_output_size`, and the arguments of `apply_scaled_mm`. And those that `experts.py` does: attributes
#: `moe_config` and `expert_map` of the layer, `weight_quant` and `input_quant` of the stock method, and the arguments
#: of `create_weights`, `apply` and of the weights' loaders.
__all__ = [
    "ChannelWiseTorchFP8ScaledMMLinearKernel",
    "CompressedTensorsW8A8Fp8",
    "CompressedTensorsW8A8Fp8MoEMethod",
    "CutlassFP8ScaledMMLinearKernel",
    "FusedMoEMethodBase",
    "RoutedExperts",
    "arrange_loras",
    "local_experts",
    "mapped_name",
    "on_engine_completion",
    "stand_in",
    "stock_gemm",
]

#: What `ModelConfig.architecture` says of a model that vLLM runs by way of transformers.
_TRANSFORMERS = tuple(f"Transformers{kind}{moe}ForCausalLM" for kind in ("", "MultiModal") for moe in ("", "MoE"))


def on_engine_completion(architectures: Iterable[str], complete: Callable[[VllmConfig], None]) -> None:
    """Calls `complete` while vLLM constructs the configuration of an engine for such a model. Idempotent.

    That is in the process that the user started, before any worker: an error there is the command's last line.

    Depends on `VllmConfig.__post_init__` looking up the model's architecture in `MODELS_CONFIG_MAP` and calling what it
    finds, before it makes the quantization config and chooses the sizes of CUDA graphs.
    """
    for architecture in (*architectures, *_TRANSFORMERS):
        theirs = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if getattr(theirs, "completed_by", None) is not complete:
            MODELS_CONFIG_MAP[architecture] = _then(theirs, complete)


def _then(theirs: type[VerifyAndUpdateConfig], complete: Callable[[VllmConfig], None]) -> type[VerifyAndUpdateConfig]:
    def verify_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        theirs.verify_and_update_config(vllm_config)
        complete(vllm_config)

    members = {
        "verify_and_update_config": classmethod(verify_and_update_config),
        "completed_by": staticmethod(complete),
    }
    return type(f"{theirs.__name__}ThenSpense", (theirs,), members)


def local_experts(layer: Any) -> dict[int, int]:
    """Number of each expert of a `RoutedExperts` in the checkpoint → its number on this rank.

    Depends on `_map_global_expert_id_to_local_expert_id`, which returns −1 for an expert of another rank.
    """
    count = layer.moe_config.num_experts
    numbers = ((expert, layer._map_global_expert_id_to_local_expert_id(expert)) for expert in range(count))
    return {expert: here for expert, here in numbers if here >= 0}


def stand_in(ours: type[CustomOp]) -> bool:
    """Makes vLLM build `ours` wherever a model names the op that it derives from. Idempotent.

    Returns:
        Whether that is done; not if a platform has put an op of its own there.

    Depends on `CustomOp.register_oot`, and on `name`, under which the engine's `custom_ops` go on to mean the op.
    """
    theirs = ours.__base__
    assert theirs is not None
    assert issubclass(theirs, CustomOp), theirs
    if maybe_get_oot_by_class(theirs) is theirs:
        theirs.register_oot(ours)
        ours.name = theirs.name  # type: ignore[attr-defined]
    return maybe_get_oot_by_class(theirs) is ours


def stock_gemm() -> StockGemm:
    """The FP8 GEMM with scales that vLLM runs for an unpruned layer.

    Depends on the operator `_C::cutlass_scaled_mm`, which `CutlassFP8ScaledMMLinearKernel` calls.
    """
    from vllm_spense.kernels.region_gemm.unpruned_gemm import StockGemm

    return StockGemm(_cutlass, __version__)


def _cutlass(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
    torch.ops._C.cutlass_scaled_mm(out, x, weight.t(), x_scale, w_scale, None)
    return out


#: A layer's A and B of a LoRA, each a tensor or, where the layer merges several, a list → the same in another order.
Arrange = Callable[[Any, Any], tuple[Any, Any]]


def arrange_loras(arrangement: Callable[[torch.nn.Module], Arrange | None]) -> None:
    """Makes vLLM put a LoRA of some layers into another order before it takes a rank's chunk. Idempotent.

    Args:
        arrangement: linear layer → what orders its LoRAs; None for a layer whose LoRAs vLLM takes as they are.

    Depends on `_all_lora_classes`, whose first class with a true `can_replace_layer` `from_layer` makes the layer's
    LoRAs of; on that method's keywords; and on `set_lora`, which gets the whole A and B and slices them.
    """
    # Loads much, and only engines with LoRA need it.
    import vllm.lora.utils as lora_utils

    theirs = lora_utils._all_lora_classes
    if not any(getattr(each, "arrangement", None) is arrangement for each in theirs):
        lora_utils._all_lora_classes = (*(_arranging(each, arrangement) for each in theirs), *theirs)


def _arranging(theirs: Any, arrangement: Callable[[torch.nn.Module], Arrange | None]) -> Any:
    def can_replace_layer(cls: Any, **given: Any) -> bool:
        return arrangement(given["source_layer"]) is not None and theirs.can_replace_layer(**given)

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        arrange = arrangement(self.base_layer)
        assert arrange is not None
        theirs.set_lora(self, index, *arrange(lora_a, lora_b))

    members = {
        "can_replace_layer": classmethod(can_replace_layer),
        "set_lora": set_lora,
        "arrangement": staticmethod(arrangement),
    }
    return type(f"{theirs.__name__}OfRegions", (theirs,), members)


def mapped_name(mapper: WeightsMapper, name: str) -> str | None:
    """A tensor's or module's name in vLLM's model; None for one that vLLM drops.

    Depends on `WeightsMapper._map_name`.
    """
    return mapper._map_name(name)
