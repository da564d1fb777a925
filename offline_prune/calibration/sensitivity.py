"""What errors in the residual stream do to the dense model's predictions, to second order, one block in memory.

Of tokens drawn from the model's own predictions, ℓ the negative log-likelihood and g = ∂ℓ/∂h the gradient at a block's
output h, E[g·gᵀ] is the Fisher information. So a small error e in h changes predictions by KL ≈ ½ · E[(g·e)²].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from offline_prune.calibration.hidden_states import Stream
from offline_prune.calibration.recording import head, packed
from offline_prune.model.loading import SourceModel
from offline_prune.runtime.matmul_precision import fast_matmul

#: Sequences, and tokens of each, that gradients are taken from.
SEQUENCES, LENGTH = 16, 512


class Call(NamedTuple):
    """A block's call on one sequence: input, other arguments, output and the gradient there, as the block has them."""

    hidden: torch.Tensor
    kwargs: dict[str, Any]
    output: torch.Tensor
    gradient: torch.Tensor


def some_of(tokens: torch.Tensor) -> torch.Tensor:
    """At most `SEQUENCES` of a text, evenly spread, and of each the first `LENGTH` tokens: int64 (n, length)."""
    return tokens[:: -(-len(tokens) // SEQUENCES), :LENGTH]


def backwards(
    model: SourceModel, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[tuple[int, nn.Module, list[Call]]]:
    """The blocks of the dense model from the last to the first, each in memory when it is yielded, and its calls.

    Args:
        tokens: int64 (n, length).
        seed: of the tokens that are drawn from the predictions.
    """
    stream = Stream(model, tokens, device, dtype, tokens.shape[1])
    states = [stream.hidden.to("cpu", copy=True)]
    for index, block in enumerate(model.blocks):
        stream.advance(index, model.load(block.name, device, dtype), block.name)
        model.unload(block.name)
        states.append(stream.hidden.to("cpu", copy=True))
    gradients = _at_the_head(model, tokens, stream, states[-1], dtype, seed)
    for index, block in reversed(list(enumerate(model.blocks))):
        module = model.load(block.name, device, dtype)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        calls = []
        for i, gradient in enumerate(gradients):
            hidden, output = (stream.unpacked(state[i : i + 1].to(device)) for state in states[index : index + 2])
            calls.append(Call(hidden, _plain(stream.arguments(index, slice(i, i + 1))), output, gradient))
        yield index, module, calls
        if index:
            gradients = [_through(module, call) for call in calls]
        model.unload(block.name)
        del states[-1]


def weights_of_channels(
    model: SourceModel, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, seed: int
) -> Sequence[torch.Tensor]:
    """`channel_weights` of every block's output, in host memory.

    Args:
        tokens, seed: as `backwards` has them.
    """
    found = [channel_weights(calls).cpu() for _, _, calls in backwards(model, tokens, device, dtype, seed)]
    return found[::-1]


def channel_weights(calls: list[Call]) -> torch.Tensor:
    """E[(g_c · ‖h‖)²] over the tokens, of each channel c, float32 (H,): how much errors relative to the size of a
    token's residual stream count. They are scaled such that an error as large as the stream in every channel is 1."""
    total = shares = torch.zeros((), device=calls[0].output.device)
    for call in calls:
        streams = len(call.output) if call.output.ndim > 3 else 0
        output, gradient = (packed(each, streams).float().square() for each in (call.output, call.gradient))
        size = output.sum(-1, keepdim=True)
        total = total + (gradient * size).flatten(0, -2).sum(0)
        shares = shares + (output / size).flatten(0, -2).mean(0) / len(calls)
    return total / (total @ shares)


def _at_the_head(
    model: SourceModel, tokens: torch.Tensor, stream: Stream, last: torch.Tensor, dtype: torch.dtype, seed: int
) -> list[torch.Tensor]:
    """g of each sequence at the last block's output."""
    random = torch.Generator(stream.device).manual_seed(seed)
    found: list[torch.Tensor] = []
    with head(model, stream.device, dtype, gradients=True) as of:
        for i, state in enumerate(last.split(1)):
            hidden = stream.unpacked(state.to(stream.device)).clone().requires_grad_()
            logits = of(tokens[i : i + 1], hidden)[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random).squeeze(1)
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            found += torch.autograd.grad(loss, hidden)
    return found


def _through(block: nn.Module, call: Call) -> torch.Tensor:
    """g at a block's input, from that at its output."""
    hidden = call.hidden.clone().requires_grad_()
    # Of these kernels only this one has a gradient that is the same each time.
    with fast_matmul(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        output = block(hidden, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        (found,) = torch.autograd.grad(output, hidden, call.gradient)
    return found


def _plain(value: Any) -> Any:
    """Arguments that were recorded in inference mode as autograd may keep them."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict) and type(value) is dict:
        return {name: _plain(each) for name, each in value.items()}
    return tuple(map(_plain, value)) if type(value) is tuple else value
