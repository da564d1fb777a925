"""HyperPrune (Sun & Sakuma, ICLR 2026) in its smallest form: one small network makes the 2:4 masks of all layers.

From the paper's abstract: a light hypernetwork, shared by all layers and conditioned on learned embeddings of layer and
component, makes the masks, layer after layer; *continual pruning* keeps what it has learned on earlier layers; *feature
outlier regularization* keeps the weights of inputs that are much larger than others. Sizes, features and weights of
the terms are ours. The kept weights are the original ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import nn

from offline_prune.methods.wanda import wanda_scores
from offline_prune.runtime.matmul_precision import fast_matmul
from vllm_spense.format import GROUP, KEPT

#: Which of a group's weights stay: bool (6, 4).
PATTERNS = torch.tensor([[i in kept for i in range(GROUP)] for kept in combinations(range(GROUP), KEPT)])
_PAIRS = tuple(combinations(range(GROUP), 2))
_EMBEDDING, _HIDDEN, _FEATURES = 8, 32, 3 * GROUP + len(_PAIRS)
#: Temperature of the relaxed choice among the patterns.
_TEMPERATURE = 0.5
#: Of the two regularizers, against a relative error of the layer's output.
_OUTLIER, _CONTINUAL = 0.01, 0.1
#: Groups of an earlier layer whose masks must stay, and earlier layers that a step looks at.
_REMEMBERED, _RECALLED = 512, 4


class HyperNetwork(nn.Module):
    """Features of groups of four and the embedding of where they are → how much each pattern is wanted.

    A pattern's score begins as the sum of what Wanda gives its weights; the network learns what to add to that.

    Args:
        layers: how many blocks there are.
        components: how many kinds of linear layers each has.
    """

    def __init__(self, layers: int, components: int) -> None:
        super().__init__()
        self.layer = nn.Embedding(layers, _EMBEDDING)
        self.component = nn.Embedding(components, _EMBEDDING)
        self.hidden = nn.Linear(_FEATURES + 2 * _EMBEDDING, _HIDDEN)
        self.scores = nn.Linear(_HIDDEN, len(PATTERNS))
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)

    def forward(self, features: torch.Tensor, layer: int, component: int) -> torch.Tensor:
        """float (groups, 6) from features (groups, 18); the first four are the logarithms of Wanda's scores."""
        where = torch.cat([self.layer.weight[layer], self.component.weight[component]])
        hidden = nn.functional.silu(self.hidden(torch.cat([features, where.expand(len(features), -1)], 1)))
        return features[:, :GROUP] @ PATTERNS.T.to(features) + self.scores(hidden)


def features(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """What the network sees of each group.

    That is logarithms of Wanda's scores, of magnitudes and of inputs, each about its mean; and how the group's weights
    go together, 4·w_i·H_ij·w_j for each pair, divided by the sum of the group's scores.

    Args:
        weight: float (N, K).
        hessian: (K, K).

    Returns:
        float32 (N·K/4, 18).
    """
    energy = hessian.diagonal()
    scores = wanda_scores(weight, energy)
    parts = (scores, weight.square(), energy.expand_as(weight))
    logarithms = [part.clamp_min(part.mean() * 1e-8).log().reshape(-1, GROUP) for part in parts]
    starts = torch.arange(0, len(hessian), GROUP, device=hessian.device)
    groups, total = weight.unflatten(1, (-1, GROUP)), scores.unflatten(1, (-1, GROUP)).sum(2)
    pairs = [GROUP * groups[..., i] * groups[..., j] * hessian[starts + i, starts + j] / total for i, j in _PAIRS]
    together = torch.stack(pairs, 2).flatten(0, 1).nan_to_num()
    return torch.cat([*(part - part.mean() for part in logarithms), together], 1)


def learned_masks(
    layers: Iterable[tuple[str, int, int, torch.Tensor, torch.Tensor]], network: HyperNetwork, steps: int, rate: float
) -> dict[str, torch.Tensor]:
    """Adam on the network, layer after layer, on the error that a layer's mask makes in its output.

    With Δ = W − M∘W and M a pattern for each group (drawn from the network's scores by a Gumbel softmax; straight
    through), it minimizes tr(Δ·H·Δᵀ) / tr(W·H·Wᵀ), plus the share of large inputs' energy that pruned weights would
    have carried, plus the mean square by which scores of groups of earlier layers have changed.

    Args:
        layers: name, index of the block and of the component, weight (N, K), H (K, K), in the order of pruning.
        network: is trained.
        steps: of Adam on each layer.
        rate: Adam's learning rate.

    Returns:
        bool (N, K) of each layer: True where a weight stays.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    device = network.scores.weight.device
    generator = torch.Generator(device).manual_seed(0)
    past: list[tuple[torch.Tensor, int, int, torch.Tensor]] = []
    masks = {}
    for name, layer, component, weight, hessian in layers:
        weight, energy = weight.detach().float(), hessian.diagonal()
        seen = features(weight, hessian)
        outliers = (energy / energy.mean()).clamp_max(100.0) / energy.numel()
        with fast_matmul():
            power = _error(weight, hessian)
            for _ in range(steps):
                scores = network(seen, layer, component)
                uniform = torch.rand(scores.shape, generator=generator, device=device).clamp(1e-9, 1 - 1e-7)
                soft = ((scores - (-uniform.log()).log()) / _TEMPERATURE).softmax(1)
                hard = nn.functional.one_hot(soft.argmax(1), len(PATTERNS)).float()
                mask = ((hard - soft).detach() + soft) @ PATTERNS.to(scores)
                pruned = 1 - mask.view_as(weight)
                loss = _error(pruned * weight, hessian) / power + _OUTLIER * (pruned.mean(0) * outliers).sum()
                for index in torch.randperm(len(past), generator=generator, device=device)[:_RECALLED].tolist():
                    known, where, what, expected = past[index]
                    loss = loss + _CONTINUAL / _RECALLED * (network(known, where, what) - expected).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            chosen = network(seen, layer, component).argmax(1)
            masks[name] = PATTERNS.to(device)[chosen].view_as(weight)
            sample = seen[torch.randint(len(seen), (_REMEMBERED,), generator=generator, device=device)]
            past.append((sample, layer, component, network(sample, layer, component)))
    return masks


def _error(delta: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(Δ·H·Δᵀ)."""
    return ((delta @ hessian) * delta).sum()
