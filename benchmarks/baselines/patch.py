"""PATCH (Hourri, Mozaffari & Mehri Dehnavi, arXiv:2509.23410) in its smallest form, with masks of 2:4 that are given.

Each square tile of a weight is learned to be dense or 2:4, end to end with frozen weights: a logit for each tile, its
choice drawn by a Gumbel softmax of two classes (straight through), and a term that holds the dense share to a budget.
Which weights stay in a sparse tile is decided before, as in the paper's PATCH-Tile, here by Wanda. Sizes, temperature
and weights of the terms are ours. The kept weights are the original ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from offline_prune.methods.wanda import wanda_scores
from offline_prune.runtime.matmul_precision import fast_matmul
from vllm_spense.errors import SpenseError
from vllm_spense.layout import keep_mask_2of4

#: Of the relaxed choice that gradients go through.
_TEMPERATURE = 1.0
#: Of the budget's term, against the next-token loss in nats.
_BUDGET = 10.0


class Tiles(nn.Module):
    """A weight whose tiles are 2:4 or dense, each by a draw of its own.

    Args:
        weight: float (N, K), frozen.
        keep: bool (N, K), 2:4: what a sparse tile keeps.
        tile: side of a tile; divides N and K.
        logit: of every tile in the beginning.
        generator: of the Gumbel noise.

    Attributes:
        logits: (N / tile, K / tile); a tile with a high one is dense.
    """

    def __init__(self, weight: torch.Tensor, keep: torch.Tensor, tile: int, logit: float, generator: torch.Generator):
        super().__init__()
        rows, columns = (size // tile for size in weight.shape)
        self.logits = nn.Parameter(torch.full((rows, columns), logit, device=weight.device))
        # What dense tiles have more than sparse ones.
        self.register_buffer("more", (weight * ~keep).unflatten(1, (columns, tile)).unflatten(0, (rows, tile)))
        self.generator = generator

    def forward(self, sparse: torch.Tensor) -> torch.Tensor:
        """(N, K), from what its sparse tiles alone would have."""
        uniform = torch.rand(self.logits.shape, generator=self.generator, device=self.logits.device)
        # The difference of two Gumbel variables.
        noise = uniform.clamp(1e-7, 1 - 1e-7).logit()
        soft = ((self.logits + noise) / _TEMPERATURE).sigmoid()
        dense = (soft > 0.5).float() - soft.detach() + soft
        return sparse + (self.more * dense[:, None, :, None]).flatten(0, 1).flatten(1, 2)


def learned_masks(
    model: PreTrainedModel,
    energies: Mapping[str, torch.Tensor],
    tokens: torch.Tensor,
    share: float,
    tile: int,
    steps: int,
    rate: float,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Adam on the logits, on the next-token loss of one sequence a step; the model is changed.

    In the end the tiles with the highest logits of all layers are dense, as many as the budget has.

    Args:
        model: the dense model, float32.
        energies: linear layers to prune → sum of squares of each input, (K,), for Wanda's scores.
        tokens: int64 (samples, length); after the last the first follows.
        share: of all tiles that are dense.
        tile: side of a tile.
        steps: of Adam.
        rate: Adam's learning rate.

    Returns:
        bool (N, K) of each layer, True where a weight stays; and the next-token loss of each step.

    Raises:
        SpenseError: a weight that cannot be cut into such tiles.
    """
    model.requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(0)
    keeps, tiles = {}, {}
    logit = torch.tensor(share).logit().item()
    for name, energy in energies.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        if any(size % tile for size in weight.shape):
            raise SpenseError(f"{name}: found a weight of shape {tuple(weight.shape)}, expected multiples of {tile}")
        keeps[name] = keep_mask_2of4(wanda_scores(weight, energy))
        tiles[name] = Tiles(weight.detach(), keeps[name], tile, logit, generator)
        weight.data *= keeps[name]
        parametrize.register_parametrization(layer, "weight", tiles[name])
    optimizer = torch.optim.Adam([each.logits for each in tiles.values()], lr=rate)
    losses = []
    for sequence in itertools.islice(itertools.cycle(tokens.to(model.device).split(1)), steps):
        optimizer.zero_grad()
        with fast_matmul():
            loss = model(input_ids=sequence, labels=sequence, use_cache=False).loss
        dense = torch.cat([each.logits.flatten() for each in tiles.values()]).sigmoid().mean()
        (loss + _BUDGET * (dense / share - 1).square()).backward()
        optimizer.step()
        losses.append(loss.item())
    logits = torch.cat([each.logits.detach().flatten() for each in tiles.values()])
    chosen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    chosen[logits.topk(round(share * len(logits))).indices] = True
    masks = {}
    for (name, each), mine in zip(
        tiles.items(), chosen.split([each.logits.numel() for each in tiles.values()]), strict=True
    ):
        dense_tiles = mine.view_as(each.logits)
        masks[name] = keeps[name] | dense_tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    return masks, losses
