"""LoRA adapters on pruned layers that several ranks share.

vLLM gives rank r of T the r-th contiguous chunk of an adapter's rows (gate, up) or columns (down). What the rank holds
of the layer is a part of the sparse region and a part of the dense one. So the adapter is first put into the order in
which the ranks' parts follow one another: then the chunks are those parts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vllm_spense import layout
from vllm_spense.errors import FormatError
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Split
from vllm_spense.plugin.linear import RegionLinearMethod
from vllm_spense.plugin.vllm_internals import Arrange


def arrangement(layer: torch.nn.Module) -> Arrange | None:
    """How the LoRAs of a layer are ordered; None where it is not pruned, or not shared."""
    method = getattr(layer, "quant_method", None)
    ranks = getattr(layer, "tp_size", 1)
    if not isinstance(method, RegionLinearMethod) or ranks == 1:
        return None
    return partial(arranged, method.split, method.regions, ranks, method.name)


def arranged(split: Split, regions: Regions, ranks: int, layer: str, lora_a: Any, lora_b: Any) -> tuple[Any, Any]:
    """A and B of a whole layer, with its intermediate indices one rank after another.

    Args:
        lora_a: (r, K), or a list with one for each merged layer, or None for one without.
        lora_b: (N, r), likewise; N is 2·I where the files have gate and up in one tensor.

    Raises:
        FormatError: they are not of a layer with these regions.
    """
    order = layout.rank_order(regions, ranks, layer)
    if split == "output":
        return lora_a, _each(lora_b, partial(_reordered, dimension=0, order=order, layer=layer))
    return _each(lora_a, partial(_reordered, dimension=1, order=order, layer=layer)), lora_b


def _each(tensors: Any, change: Any) -> Any:
    if isinstance(tensors, list | tuple):
        return [None if tensor is None else change(tensor) for tensor in tensors]
    return change(tensors)


def _reordered(tensor: torch.Tensor, dimension: int, order: torch.Tensor, layer: str) -> torch.Tensor:
    found, intermediate = tensor.shape[dimension], len(order)
    if found in (intermediate, 2 * intermediate):
        blocks = range(0, found, intermediate)
        return tensor.index_select(dimension, torch.cat([order + start for start in blocks]).to(tensor.device))
    # vLLM warms up with zeros in the shape of a rank's part.
    if tensor.any():
        raise FormatError(
            "a LoRA adapter does not fit the layer", layer=layer, found=tuple(tensor.shape), expected=intermediate
        )
    return tensor
