"""Random values for what `--load-format dummy` leaves near zero, in either engine.

vLLM fills weights with ±0.001, which in FP8 is zero, and a GPU multiplies zeros at less power than numbers; weights of
four bits it leaves as they are in memory. Layers that Spense runs get theirs while they load (`loaders.fill_dummy`).
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import nn
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A8Fp8,
    CompressedTensorsWNA16,
)

from vllm_spense.kernels.tuning.synthetic import random_fp8
from vllm_spense.plugin.experts import RegionExpertsMethod
from vllm_spense.plugin.linear import FP8, RegionLinearMethod
from vllm_spense.plugin.loaders import dummy_scale

#: Rows made at once: the KV cache has left little memory.
_CHUNK = 256
#: Schemes whose weights are four bits, eight of them in an int32.
_INT4 = (CompressedTensorsWNA16, CompressedTensorsW4A8Fp8)
#: The standard deviation of such weights in steps of their grid: the largest of 128 normal values is about 2.9 of its
#: own, and a group's scale makes it 8 steps.
_INT4_DEVIATION = 2.75
#: How much more a skewed router's first row varies than that of a balanced one.
_MOST_SKEWED = 3.0


@torch.inference_mode()
def fill_random(model: nn.Module, skewed: bool = False) -> None:
    """Fills a loaded model in place, wherever CUDA graphs already point, so that activations stay about as large as 1.

    Linear weights N × K become normal with variance 1 / K, those of experts E × N × K too, FP8 ones through their
    scales; norms become 1. A module gets the same values in every engine that has it.

    Args:
        skewed: let routers of mixtures prefer some experts: the deviation of the rows falls from 3 to 1/3 times the
            others', so that the first eighth of 128 experts gets about half of the tokens.

    Raises:
        ValueError: an FP8 weight without one scale for each of its outputs.
    """
    for name, module in model.named_modules():
        torch.manual_seed(crc32(name.encode()))
        if hasattr(module, "_k_scale"):
            set_default_quant_scales(module)
        if not isinstance(getattr(module, "quant_method", None), (RegionLinearMethod, RegionExpertsMethod)):
            _fill(name, dict(module.named_parameters(recurse=False)))
        if skewed and name.endswith(".gate"):
            experts = len(module.weight)
            fall = torch.arange(experts, device=module.weight.device) / (experts - 1)
            module.weight *= (_MOST_SKEWED ** (1 - 2 * fall)).unsqueeze(-1)


def _fill(name: str, parameters: dict[str, nn.Parameter]) -> None:
    if "weight_packed" in parameters:
        # Filled before they were packed.
        parameters = {kind: parameter for kind, parameter in parameters.items() if kind == "bias"}
    for kind, weight in [*parameters.items()]:
        if weight.dtype == FP8:
            _fill_fp8(name, weight, parameters.pop(f"{kind}_scale"))
            del parameters[kind]
    for kind, parameter in parameters.items():
        if parameter.ndim > 1 or kind == "bias":
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1)


def _fill_fp8(name: str, weight: nn.Parameter, scale: nn.Parameter) -> None:
    inputs, rest = divmod(weight.numel(), scale.numel())
    if rest or inputs not in weight.shape[-2:]:
        raise ValueError(f"{name}: {scale.numel()} scales for an FP8 weight of shape {tuple(weight.shape)}")
    # Kernels keep the weight as (N, K) or as its transposed view.
    scale.fill_(dummy_scale(inputs))
    for matrix in weight if weight.ndim > 2 else (weight,):
        for rows in matrix.split(_CHUNK):
            rows.copy_(random_fp8(*rows.shape, rows.device))


def fill_int4_before_packing() -> None:
    """From now on gives linear layers of four bits normal weights with variance 1 / K, before a kernel packs them."""
    for scheme in _INT4:
        scheme.process_weights_after_loading = _filled_first(scheme.process_weights_after_loading)


def _filled_first(process: Any) -> Any:
    def fill_and_process(scheme: Any, layer: nn.Module) -> None:
        with torch.no_grad():
            for rows in layer.weight_packed.data.split(_CHUNK):
                rows.copy_(random_int4(*rows.shape, rows.device))
            layer.weight_scale.data.fill_((8 * layer.weight_packed.shape[1]) ** -0.5 / _INT4_DEVIATION)
        process(scheme, layer)

    return fill_and_process


def random_int4(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """int32 (rows, columns), each eight weights: rounded normal values from -8 to 7, stored with 8 added."""
    normal = torch.randn(8, rows, columns, device=device) * _INT4_DEVIATION
    packed = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    for place, values in enumerate(normal.round().clamp(-8, 7).to(torch.int32) + 8):
        packed |= values << 4 * place
    return packed


def linear_kernels(model: nn.Module) -> tuple[str, ...]:
    """vLLM's names of what runs a model's linear layers: a kernel where the scheme has chosen one, or the method."""
    found = set()
    for module in model.modules():
        if isinstance(module, LinearBase):
            scheme = getattr(module, "scheme", None)
            runs = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None) or module.quant_method
            found.add(type(runs).__name__)
    return tuple(sorted(found))


def weight_bytes(model: nn.Module) -> int:
    """Memory of all parameters, storage that several of them share counted once."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
