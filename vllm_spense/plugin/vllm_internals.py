"""Everything of vLLM that Spense uses although it is not vLLM's public interface for plugins.

Each function says what it depends on; a test of the same name fails where a new vLLM has changed it. All of it was read
in the sources of `CHECKED`. Two more dependencies are lists of models whose source has a certain form, `PLAIN_MLPS` in
`activation.py` and `PLAIN_NORMS` in `norms.py`; the tests of these modules hold them to vLLM's sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from vllm import __version__
from vllm.model_executor.custom_op import CustomOp, maybe_get_oot_by_class
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import ChannelWiseTorchFP8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.models.utils import WeightsMapper

    from vllm_spense.kernels.region_gemm.unpruned_gemm import StockGemm

#: vLLM's classes that `unpruned_linear.py` derives from: attributes `fp8_linear`, `config`, `layer_param_names`,
#: `logical_output_size`, and the arguments of `apply_scaled_mm`.
__all__ = [
    "CHECKED",
    "ChannelWiseTorchFP8ScaledMMLinearKernel",
    "CompressedTensorsW8A8Fp8",
    "CutlassFP8ScaledMMLinearKernel",
    "mapped_name",
    "on_engine_completion",
    "stand_in",
    "stock_gemm",
]

#: Versions whose sources were read for what is in this file.
CHECKED = ("0.26.0", "0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")

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


def mapped_name(mapper: WeightsMapper, name: str) -> str | None:
    """A tensor's or module's name in vLLM's model; None for one that vLLM drops.

    Depends on `WeightsMapper._map_name`.
    """
    return mapper._map_name(name)
