"""Random values for what `--load-format dummy` leaves near zero, in either engine.

vLLM fills weights with ±0.001, which in FP8 is zero, and a GPU multiplies zeros at less power than numbers. Layers that
Spense runs get theirs while they load (`loaders.fill_dummy`).
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from vllm_spense.kernels.tuning.synthetic import random_fp8
from vllm_spense.plugin.linear import FP8, RegionLinearMethod
from vllm_spense.plugin.loaders import dummy_scale

#: Rows made at once: the KV cache has left little memory.
_CHUNK = 256


@torch.inference_mode()
def fill_random(model: nn.Module) -> None:
    """Fills a loaded model in place, wherever CUDA graphs already point, so that activations stay about as large as 1.

    Linear weights N × K become normal with variance 1 / K, FP8 ones through their scales; norms become 1.

    Raises:
        ValueError: an FP8 weight without one scale for each of its N outputs.
    """
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if hasattr(module, "_k_scale"):
            set_default_quant_scales(module)
        if not isinstance(getattr(module, "quant_method", None), RegionLinearMethod):
            _fill(name, dict(module.named_parameters(recurse=False)))


def _fill(name: str, parameters: dict[str, nn.Parameter]) -> None:
    weight = parameters.get("weight")
    if weight is not None and weight.dtype == FP8:
        scale = parameters.pop("weight_scale")
        if scale.numel() not in weight.shape:
            raise ValueError(f"{name}: {scale.numel()} scales for an FP8 weight of shape {tuple(weight.shape)}")
        # Kernels keep the weight as (N, K) or as its transposed view.
        scale.fill_(dummy_scale(weight.numel() // scale.numel()))
        for rows in weight.split(_CHUNK):
            rows.copy_(random_fp8(*rows.shape, rows.device))
        del parameters["weight"]
    for kind, parameter in parameters.items():
        if parameter.ndim > 1 or kind == "bias":
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1)


def weight_bytes(model: nn.Module) -> int:
    """Memory of all parameters, storage that several of them share counted once."""
    storages = (parameter.untyped_storage() for parameter in model.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
