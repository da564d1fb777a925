"""Block-wise tuning: the weights that a pruned MLP keeps, against what the dense model's block puts out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from offline_prune.calibration.hidden_states import Stream
from offline_prune.methods.fp8 import round_to_fp8
from offline_prune.methods.recipe import Recipe
from offline_prune.runtime import distributed
from offline_prune.runtime.matmul_precision import fast_matmul

#: Fewer tokens than this make a step's gradient mostly noise; a short calibration text gets fewer steps instead.
MIN_STEP_TOKENS = 128
#: More steps than this help where each has so many tokens, and do harm where all together teach too little.
_FEW_STEPS, _STEP_TOKENS = 128, 1024
#: Share of the steps in which the learning rate rises.
_WARM_UP = 0.05
#: It then falls linearly to this share of the largest and stays there for the same share of the steps. What these
#: make of the weights is averaged, which serves unseen text better than one that falls to zero: docs/notes/pruning.md.
_AVERAGED = 0.3
#: How far the target is the dense model's output, and not what the dense block makes of the pruned model's input.
#: All of the former would teach every block what the blocks before it get wrong on the calibration text alone.
_INHERITED = 0.5
#: The loss before and after is measured on this share of the text, but no more than so many tokens.
_JUDGED_SHARE, _JUDGED_TOKENS = 1 / 16, 4096


@dataclass(frozen=True)
class TuningReport:
    """‖f(x̃) − y‖² / ‖y‖², mean over tokens, of a block's output against the dense model's, before and after tuning;
    with the weights of the channels, where they have some."""

    before: float
    after: float


class _AsServed(torch.autograd.Function):
    """The weight that inference multiplies with; its gradient goes to the kept weights as if nothing were rounded."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, kept: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(kept)
        return (weight if scales is None else round_to_fp8(weight, scales)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] * kept).float(), None, None, None


class BlockTuning:
    """Adam on the non-zero weights of some linear layers, zeros fixed.

    It minimizes the mean over the tokens of ‖f(x̃) − t‖² / ‖t‖², t = ½·(y + f₀(x̃)), with f the pruned block after its
    attention, f₀ the same with the dense MLP, x̃ the residual stream there *of the pruned model* and y the block's
    output *in the dense model*. So it undoes, as far as this MLP can, what pruning and rounding did here and half of
    what they did before. The division weighs tokens as the norm at the next layer's entrance will. Where a layer has
    scales, rounding takes part: the loss is that of the rounded weights, the gradient goes straight through.

    Args:
        block: the pruned block, its weights in place. Left unchanged.
        layers: names inside the block of the linear layers to tune → their FP8 scales, or None for unrounded.
        original: the dense MLP's parameters, by name inside the block.
        index: of the block.
        stream: the pruned model's hidden states; `attend` has been called for this block.
        dense: the dense model's hidden states after this block.
        recipe: at most `tune_steps` make one pass over the calibration text, in an order drawn from `seed`; `tune_rate`
            is Adam's largest learning rate relative to the root mean square of each layer's kept weights.
        tokens_at_once: about how many go through the block together.
        channels: float32 (H,), weights of the squared error's channels; None weighs all alike.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, torch.Tensor | None],
        original: dict[str, torch.Tensor],
        index: int,
        stream: Stream,
        dense: Stream,
        recipe: Recipe,
        tokens_at_once: int,
        channels: torch.Tensor | None = None,
    ) -> None:
        self._block, self._layers, self._original, self._index = block, layers, original, index
        self._stream, self._channels = stream, channels
        self._pruned = {name: block.get_parameter(f"{name}.weight") for name in layers}
        self._weights = {name: each.detach().float().clone().requires_grad_() for name, each in self._pruned.items()}
        # In the gradients' dtype: a product of theirs with another type takes ten times as long on a CPU.
        self._kept = {n: (weight.detach() != 0).to(self._pruned[n].dtype) for n, weight in self._weights.items()}
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}
        sizes = {name: weight[weight != 0].square().mean().sqrt().item() for name, weight in self._start.items()}
        rates = [{"params": [each], "lr": recipe.tune_rate * sizes[name]} for name, each in self._weights.items()]
        self._optimizer = torch.optim.Adam(rates, fused=True)
        self._inputs, self._targets = stream.units(stream.hidden), stream.units(dense.hidden)
        self._at_once = stream.units_at_once(tokens_at_once)
        #: Tokens of a unit, on all ranks together.
        self._unit = self._inputs.shape[1] * distributed.size()
        order = torch.randperm(len(self._inputs), generator=torch.Generator().manual_seed(recipe.seed))
        self._order = order.to(self._inputs.device)
        count = step_count(len(order), self._unit, recipe.tune_steps)
        self._steps = self._order.tensor_split(count)
        # Not of self: a cycle would keep the moments until Python looks for cycles, while the next block is tuned.
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _share(step, count))
        self._averages: dict[str, torch.Tensor] = {}

    def process(self) -> tuple[dict[str, torch.Tensor], TuningReport]:
        """
        Returns:
            float32 (N, K) of each layer, the values that inference will multiply with, and the loss on a fixed part of
            the calibration text before and after. Should that not have fallen, the weights are what they were.
        """
        with self._stream.entered(self._block), fast_matmul():
            before = self._judge()
            for step, units in enumerate(self._steps):
                self._step(units)
                self._average(step)
            after = self._judge()
        best = {name: weight.detach() for name, weight in self._weights.items()} if after < before else self._start
        rounded = {
            name: weight if (scales := self._layers[name]) is None else round_to_fp8(weight, scales)
            for name, weight in best.items()
        }
        return rounded, TuningReport(before, min(before, after))

    def _step(self, units: torch.Tensor) -> None:
        self._optimizer.zero_grad()
        for loss in self._losses(units):
            (loss / distributed.size()).backward()
        for weight in self._weights.values():
            assert weight.grad is not None
            distributed.all_reduce(weight.grad)
        self._optimizer.step()
        self._schedule.step()

    @torch.no_grad()
    def _judge(self) -> float:
        """The loss on a fixed part of the text, the same on all ranks."""
        units = self._order[: max(1, min(int(_JUDGED_SHARE * len(self._order)), _JUDGED_TOKENS // self._unit))]
        total = torch.stack([loss.detach() for loss in self._losses(units)]).sum() / distributed.size()
        distributed.all_reduce(total)
        return total.item()

    def _losses(self, units: torch.Tensor) -> Iterator[torch.Tensor]:
        """Their sum is the loss; each is as much of it as goes through the block at once."""
        for chunk in units.split(self._at_once):
            served = {
                f"{name}.weight": _AsServed.apply(w, self._kept[name], self._layers[name], self._pruned[name].dtype)
                for name, w in self._weights.items()
            }
            sources = self._inputs, self._targets
            x, y = (source.index_select(0, chunk).to(self._stream.device) for source in sources)
            kwargs = self._stream.unit_arguments(self._index, chunk)
            with torch.no_grad():
                target = torch.lerp(self._output(self._original, x, kwargs), y.float(), _INHERITED)
            error, power = (self._output(served, x, kwargs) - target).square(), target.square().sum(-1)
            error = error.sum(-1) if self._channels is None else error @ self._channels
            yield (error / power).mean() * (len(chunk) / len(units))

    def _output(self, parameters: dict[str, torch.Tensor], x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        found = functional_call(self._block, parameters, (self._stream.unpacked(x),), kwargs)
        return self._stream.packed(found[0] if isinstance(found, tuple) else found).float()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Takes a step's weights into their averages; after the last step they become the weights."""
        first = int(len(self._steps) * (1 - _AVERAGED))
        for name, weight in self._weights.items():
            if step == first:
                self._averages[name] = weight.detach().clone()
            elif step > first:
                self._averages[name].lerp_(weight, 1 / (step - first + 1))
            if step == len(self._steps) - 1:
                weight.copy_(self._averages[name])


def step_count(units: int, tokens: int, asked: int) -> int:
    """How many steps one pass over the calibration text is worth.

    Args:
        units: of this rank.
        tokens: of a unit, on all ranks together.
        asked: the most steps.
    """
    worth = max(_FEW_STEPS, units * tokens // _STEP_TOKENS)
    return max(1, min(asked, worth, units // -(-MIN_STEP_TOKENS // tokens)))


def _share(step: int, steps: int) -> float:
    """Of the largest learning rate."""
    return min((step + 1) / (_WARM_UP * steps + 1), 1.0) * max(1 - step / steps, _AVERAGED)
