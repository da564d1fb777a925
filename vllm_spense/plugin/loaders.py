"""Weight loaders that give a rank its share of both regions.

vLLM's own loaders take one contiguous chunk: rank 0 would hold nothing but sparse rows, the last rank nothing but
dense ones. Loaders here are plain functions that capture plain values and fill through `copy_`: vLLM's reload
counts the elements copied and reads the function's name, and a captured layer would never be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from vllm_spense.errors import FormatError
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning.synthetic import random_weight
from vllm_spense.layout import Shard

Loader = Callable[..., None]
#: Says whether it loaded something.
ExpertLoader = Callable[..., bool]

#: Of the values that `random_weight` draws.
_DUMMY_STANDARD_DEVIATION = 16


def rows_loader(layer: str, intermediate: int, shard: Shard, projections: int) -> Loader:
    """Loads anything with one entry per output row of an output-split layer: weight, weight_scale, bias.

    Rows of the rank's parameter, for gate and up merged: [gate sparse | gate dense | up sparse | up dense].

    Args:
        layer: the layer's name, for messages.
        intermediate: I, rows of one projection in the checkpoint.
        shard: the rank's share of each region.
        projections: how many the layer merges.

    Returns:
        `load(param, loaded_weight, loaded_shard_id)`, where the id is the projection's index, or None or a tuple of
        indices where the checkpoint holds the projections in one tensor.
    """
    sparse, dense = shard.sparse, shard.dense
    s, d = shard.regions.sparse, shard.regions.dense

    def load_rows(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: int | tuple[int, ...] | None = None,
    ) -> None:
        if loaded_shard_id is None:
            loaded_shard_id = tuple(range(projections))
        ids = (loaded_shard_id,) if isinstance(loaded_shard_id, int) else loaded_shard_id
        _check(layer, param, loaded_weight, (len(ids) * intermediate, *param.shape[1:]))
        for i, rows in zip(ids, loaded_weight.split(intermediate), strict=True):
            param.data.narrow(0, i * (s + d), s).copy_(rows[sparse])
            param.data.narrow(0, i * (s + d) + s, d).copy_(rows[dense])

    return load_rows


def columns_loader(layer: str, intermediate: int, shard: Shard) -> Loader:
    """Loads the weight of an input-split layer, (N, I) in the checkpoint; columns of the rank: [sparse | dense]."""
    sparse, dense = shard.sparse, shard.dense
    s, d = shard.regions.sparse, shard.regions.dense

    def load_columns(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        _check(layer, param, loaded_weight, (param.shape[0], intermediate))
        param.data.narrow(1, 0, s).copy_(loaded_weight[:, sparse])
        param.data.narrow(1, s, d).copy_(loaded_weight[:, dense])

    return load_columns


def replicated_loader(layer: str) -> Loader:
    """Loads what every rank holds all of: the weight_scale of an input-split layer."""

    def load_replicated(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        _check(layer, param, loaded_weight, tuple(param.shape))
        param.data.copy_(loaded_weight)

    return load_replicated


def expert_rows_loader(layer: str, intermediate: int, shard: Shard, local: Mapping[int, int]) -> ExpertLoader:
    """Loads gate's and up's weights and scales of one expert after the other: see `rows_loader`.

    Args:
        local: number of an expert in the checkpoint → on this rank; −1 or nothing for one that it does not hold.

    Returns:
        `load(param, loaded_weight, weight_name, shard_id, expert_id, return_success)`, where the shard is `w1` for gate
        and `w3` for up.
    """
    load_rows = rows_loader(layer, intermediate, shard, 2)

    def load_projection(param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: str) -> None:
        load_rows(param, loaded_weight, ("w1", "w3").index(shard_id))

    return _of_expert(load_projection, local)


def expert_columns_loader(layer: str, intermediate: int, shard: Shard, local: Mapping[int, int]) -> ExpertLoader:
    """Loads down's weights of one expert after the other: see `columns_loader` and `expert_rows_loader`."""
    return _of_expert(_of_down(columns_loader(layer, intermediate, shard)), local)


def expert_loader(layer: str, local: Mapping[int, int]) -> ExpertLoader:
    """Loads what every rank holds all of, down's scales, of one expert after the other: see `expert_rows_loader`."""
    return _of_expert(_of_down(replicated_loader(layer)), local)


def _of_down(load: Loader) -> Loader:
    """The same for the one projection whose shard says nothing."""

    def load_down(param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: str) -> None:
        load(param, loaded_weight)

    return load_down


def _of_expert(load: Loader, local: Mapping[int, int]) -> ExpertLoader:
    """Fills one expert's part of a parameter by `load(part, loaded_weight, shard_id)`."""

    def load_expert(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        here = local.get(expert_id, -1)
        if here >= 0:
            load(torch.nn.Parameter(param.data[here], requires_grad=False), loaded_weight, shard_id)
        return here >= 0

    return load_expert


def fill_dummy_experts(
    gate_up: torch.Tensor, gate_up_scale: torch.Tensor, down: torch.Tensor, down_scale: torch.Tensor, regions: Regions
) -> None:
    """As `fill_dummy`, for all experts of a rank: (E, 2·I, H), (E, 2·I, 1), (E, H, I), (E, H, 1)."""
    hidden = down.shape[1]
    of_gate_up = Problem(gate_up.shape[1], hidden, regions, "output", projections=2)
    of_down = Problem(hidden, down.shape[2], regions, "input")
    for expert in range(len(down)):
        fill_dummy(gate_up[expert], gate_up_scale[expert], of_gate_up)
        fill_dummy(down[expert], down_scale[expert], of_down)


def fill_dummy(weight: torch.Tensor, scale: torch.Tensor, problem: Problem) -> None:
    """Random values that obey the format, for `--load-format dummy`.

    vLLM's own are not 2:4, not positive, and in FP8 almost all zeros, which a GPU multiplies at less power.

    Args:
        weight: (N, K) FP8 E4M3, filled.
        scale: (N, 1) float32, filled.
    """
    weight.copy_(random_weight(problem, weight.device))
    scale.fill_(dummy_scale(problem.k))


def dummy_scale(k: int) -> float:
    """The weight scale at which outputs of a random weight (N, K) are about as large as its inputs."""
    return 1 / (_DUMMY_STANDARD_DEVIATION * k**0.5)


def _check(layer: str, param: torch.Tensor, loaded: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(loaded.shape) != expected:
        raise FormatError(
            "a tensor's shape does not fit the regions", layer=layer, found=tuple(loaded.shape), expected=expected
        )
    # copy_ would convert, say, BF16 weights to FP8 without their scales.
    if param.dtype == torch.float8_e4m3fn != loaded.dtype:
        raise FormatError("a weight has the wrong dtype", layer=layer, found=loaded.dtype, expected=param.dtype)
