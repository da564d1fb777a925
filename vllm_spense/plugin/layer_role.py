"""What a linear layer of vLLM is to the pruned module that it is in, where its name does not tell."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

from vllm_spense.errors import FormatError
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Split


def split_of(layer: torch.nn.Module, regions: Regions, prefix: str) -> Split | None:
    """How a layer's weight is split, by what vLLM built it as.

    vLLM merges gate and up itself, loads them merged from the files, or runs a module of transformers' that has them in
    one layer; only some models say which in `packed_modules_mapping`, and some say it too late. gate and up have the
    same regions, so which of them comes first does not matter.

    Args:
        layer: not yet filled: vLLM asks while it is being constructed.
        regions: of the pruned module.
        prefix: the layer's name.

    Returns:
        None for a layer that is neither gate with up nor down.

    Raises:
        FormatError: gate and up in one layer that vLLM would shard as if it were one matrix.
    """
    intermediate = regions.intermediate
    if isinstance(layer, RowParallelLinear):
        return "input" if layer.input_size == intermediate else None
    if isinstance(layer, MergedColumnParallelLinear):
        return "output" if list(layer.output_sizes) == [intermediate, intermediate] else None
    if isinstance(layer, ColumnParallelLinear) and layer.output_size == 2 * intermediate:
        if layer.tp_size > 1:
            raise FormatError(
                "vLLM runs gate and up as one layer here and does not know that it is two, so it cannot be sharded",
                layer=prefix,
                key="tensor_parallel_size",
                found=layer.tp_size,
                expected=1,
            )
        return "output"
    return None
