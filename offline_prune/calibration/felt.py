"""What errors in the residual stream do to the dense model's predictions, to second order."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from offline_prune.model.loading import SourceModel


class Felt:
    """Gradients ∂ℓ/∂h at every block's output h, ℓ the negative log-likelihood of tokens that are drawn from the model's
    own predictions: of an error e of one token in h, KL ≈ ½ · E[(∂ℓ/∂h · e)²].

    Args:
        source: whole on the device.
        tokens: int64 (n, length).

    Attributes:
        calls: of each block, for each sequence: arguments, output, gradient.
    """

    def __init__(self, source: SourceModel, tokens: torch.Tensor, device: torch.device, seed: int) -> None:
        model: Any = source.skeleton
        blocks = [source.module(block.name) for block in source.blocks]
        self.calls: list[list[tuple[Any, Any, torch.Tensor, torch.Tensor]]] = [[] for _ in blocks]
        random = torch.Generator(device).manual_seed(seed)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for sequence in tokens.split(1):
            seen: list[tuple[Any, Any, torch.Tensor]] = []
            with ExitStack() as context, torch.enable_grad():
                context.enter_context(sdpa_kernel(SDPBackend.MATH))
                for block in blocks:
                    context.callback(block.register_forward_hook(partial(_keep, seen), with_kwargs=True).remove)
                logits = model(input_ids=sequence.to(device), use_cache=False).logits[0].float()
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(1)
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            for calls, (args, kwargs, hidden) in zip(self.calls, seen, strict=True):
                assert hidden.grad is not None
                args = tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in args)
                calls.append((args, kwargs, hidden.detach(), hidden.grad))

    def channels(self) -> list[torch.Tensor]:
        """Of each block's output: E[(∂ℓ/∂h_c · ‖h‖)²] of each channel c, float32 (H,)."""
        found = []
        for calls in self.calls:
            total = torch.zeros((), device=calls[0][2].device)
            for _, _, hidden, grad in calls:
                size = hidden.float().square().sum(-1, keepdim=True)
                total = total + (grad.float().square() * size).flatten(0, -2).sum(0)
            found.append(total)
        return found


def _keep(seen: list[tuple[Any, Any, torch.Tensor]], module: nn.Module, args: Any, kwargs: Any, found: Any) -> None:
    hidden = found[0] if isinstance(found, tuple) else found
    if not seen:
        hidden.requires_grad_()
    hidden.retain_grad()
    seen.append((args, kwargs, hidden))
