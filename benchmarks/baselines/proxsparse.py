"""ProxSparse (Liu et al., ICML 2025, arXiv:2502.00258) in its smallest form: a 2:4 mask learned end to end.

The weights move under the language model's own loss and a regularizer that is zero exactly where a group of four has
at most two non-zeros; what they show in the end is only which two to keep. The kept weights are the original ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_prune.runtime.matmul_precision import fast_matmul
from vllm_spense.format import GROUP, KEPT
from vllm_spense.layout import keep_mask_2of4

#: Sweeps of coordinate descent in a proximal step.
_SWEEPS = 6
#: Share of the steps in which the learning rate rises, as in the paper's code; it falls linearly in the rest.
_WARM_UP = 0.1


def regularizer(weight: torch.Tensor) -> torch.Tensor:
    """R(w) = Σ over the groups, Σ over their triples, |w_a·w_b·w_c|: zero if and only if the weight is 2:4.

    Args:
        weight: float (N, K).

    Returns:
        A scalar.
    """
    groups = weight.abs().unflatten(-1, (-1, GROUP)).unbind(-1)
    return torch.stack([prod(triple[1:], start=triple[0]) for triple in combinations(groups, KEPT + 1)]).sum()


def proximal(weight: torch.Tensor, strength: float) -> torch.Tensor:
    """argmin over w of ½·‖w − weight‖² + strength · R(w), group by group.

    Signs are those of `weight`, so w ≥ 0 may be assumed. Given the others, the best w_i is weight_i − strength · (the
    sum of the products of pairs of the others), or 0: coordinate descent never raises the objective. It is not convex,
    so descent starts from all four and from the three largest; the best of both and of keeping two is taken.

    Args:
        weight: float (N, K).
        strength: of the regularizer.

    Returns:
        (N, K).
    """
    magnitudes, order = weight.abs().unflatten(-1, (-1, GROUP)).sort(dim=-1, descending=True)
    target = magnitudes.movedim(-1, 0).contiguous()
    best = target.clone()
    best[KEPT:] = 0
    lowest = target[KEPT:].square().sum(0) / 2
    for size in (KEPT + 1, GROUP):
        found = target.clone()
        found[size:] = 0
        for _ in range(_SWEEPS):
            for i in range(size):
                a, b, c = (found[j] for j in range(GROUP) if j != i)
                torch.clamp(target[i] - strength * (a * (b + c) + b * c), min=0, out=found[i])
        a, b, c, d = found
        value = (found - target).square().sum(0) / 2 + strength * (a * b * (c + d) + c * d * (a + b))
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        best = torch.where(better, found, best)
    result = torch.empty_like(magnitudes).scatter_(-1, order, best.movedim(0, -1))
    return result.flatten(-2).copysign(weight)


def learned_masks(
    model: PreTrainedModel, layers: Iterable[str], tokens: torch.Tensor, rate: float, strength: float
) -> dict[str, torch.Tensor]:
    """AdamW on the next-token loss of one sequence a step, a proximal step after each; the model is changed.

    Args:
        model: the dense model, float32.
        layers: names of the linear layers to prune.
        tokens: int64 (samples, length), one pass over them.
        rate: AdamW's largest learning rate, relative to the root mean square of each layer's weights.
        strength: of the regularizer in one step, divided by that root mean square: what R's gradient takes from a
            typical weight is then the same share of it in every layer.

    Returns:
        bool (N, K) of each layer: True where a weight stays; two in each group of four along K.
    """
    linears = {name: model.get_submodule(name) for name in layers}
    weights = {name: layer.weight for name, layer in linears.items() if isinstance(layer.weight, nn.Parameter)}
    sizes = {name: weight.detach().square().mean().sqrt().item() for name, weight in weights.items()}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    groups = [{"params": [weight], "lr": rate * sizes[name]} for name, weight in weights.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = len(tokens)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (_WARM_UP * steps + 1), 1 - step / steps)
    )
    for sequence in tokens.to(model.device).split(1):
        optimizer.zero_grad()
        with fast_matmul():
            model(input_ids=sequence, labels=sequence, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(proximal(weight, strength / sizes[name]))
    return {name: keep_mask_2of4(weight.detach().abs()) for name, weight in weights.items()}
