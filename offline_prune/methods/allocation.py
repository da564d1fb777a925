"""Which share of each MLP stays dense, from what pruning it alone costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from offline_prune.calibration.sensitivity import Call
from offline_prune.methods.dense_selection import order_by_priority, spensegpt_plus_priority
from offline_prune.methods.wanda import prune_by_score, wanda_scores
from offline_prune.model.gated_mlp import GatedMlp, linear
from vllm_spense.format import Regions

RATIOS = (0.0, 0.25, 0.5, 0.75)


@torch.no_grad()
def losses(block: nn.Module, mlp: GatedMlp, calls: list[Call], step: int) -> dict[int, float]:
    """Sparse indices → KL that pruning this MLP alone by Wanda's mask adds, as gradients predict it."""
    inputs: dict[str, torch.Tensor] = {}
    gate, down = f"{mlp.path}.{mlp.projections.gate}", f"{mlp.path}.{mlp.projections.down}"

    def add(name: str, module: nn.Module, args: Any) -> None:
        energy = args[0].float().square().flatten(0, -2).sum(0)
        inputs[name] = inputs[name] + energy if name in inputs else energy

    handles = [
        linear(block, name).register_forward_pre_hook(lambda module, args, name=name: add(name, module, args))
        for name in (gate, down)
    ]
    for call in calls:
        block(call.hidden, **call.kwargs)
    for handle in handles:
        handle.remove()
    layers = mlp.gate_up(block)
    gate_up = torch.cat([layer.weight for layer in layers]).float()
    first, second = gate_up.chunk(2)
    out = linear(block, down).weight.float()
    priority = spensegpt_plus_priority(first, second, out, inputs[gate], inputs[down])
    size = mlp.intermediate
    found = {0: 0.0}
    for ratio in RATIOS:
        sparse = round((1 - ratio) * size / step) * step
        order = order_by_priority(priority, Regions(sparse, size - sparse))
        chosen = torch.zeros(size, dtype=torch.bool, device=order.device)
        chosen[order[:sparse]] = True
        everywhere = torch.ones(gate_up.shape[1], dtype=torch.bool, device=order.device)
        rows = prune_by_score(
            gate_up, wanda_scores(gate_up, inputs[gate]), sparse_rows=chosen.repeat(2), sparse_columns=everywhere
        )
        columns = torch.arange(size, device=order.device) < sparse
        moved = prune_by_score(
            out[:, order],
            wanda_scores(out[:, order], inputs[down][order]),
            sparse_rows=torch.ones(len(out), dtype=torch.bool, device=order.device),
            sparse_columns=columns,
        )
        pruned = torch.empty_like(moved)
        pruned[:, order] = moved
        heights = [layer.out_features for layer in layers]
        names = [name for name, module in block.named_modules() if any(module is layer for layer in layers)]
        weights = {f"{n}.weight": w for n, w in zip(names, rows.split(heights), strict=True)} | {
            f"{down}.weight": pruned
        }
        weights = {name: weight.to(linear(block, down).weight.dtype) for name, weight in weights.items()}
        total, count = 0.0, 0
        for call in calls:
            other = functional_call(block, weights, (call.hidden,), call.kwargs)
            other = other[0] if isinstance(other, tuple) else other
            each = ((other.float() - call.output.float()) * call.gradient.float()).sum(-1).square()
            total, count = total + each.sum().item(), count + each.numel()
        found[sparse] = total / count / 2
    return found


def allocate(tables: Mapping[str, Mapping[int, float]], total: int, step: int) -> dict[str, int]:
    """MLP → sparse indices, `total` of them in all, such that the sum of losses is least.

    The losses are taken to be piecewise linear between the measured numbers, on the lower convex hull of these; then
    the cheapest next step at each moment is the optimum (Fox 1966).
    """
    slopes = []
    for place, (name, table) in enumerate(tables.items()):
        hull: list[tuple[int, float]] = []
        for point in sorted(table.items()):
            while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-1][0]) >= (
                point[1] - hull[-1][1]
            ) * (hull[-1][0] - hull[-2][0]):
                hull.pop()
            hull.append(point)
        for (a, low), (b, high) in itertools.pairwise(hull):
            slopes += [((high - low) / (b - a), a, place, name, (b - a) // step)]
    found = dict.fromkeys(tables, 0)
    left = total // step
    for _, _, _, name, steps in sorted(slopes):
        taken = min(left, steps)
        found[name] += taken * step
        left -= taken
    return found
