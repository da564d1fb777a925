"""Calling one decoder block of any architecture, in whole or only the part after its attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from offline_prune.model.experts import Mlp
from offline_prune.runtime.matmul_precision import fast_matmul

Observer = Callable[[torch.Tensor], None]

#: All of them exact; each is taken where the ones before it do not apply.
_ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class Enough(Exception):
    """Ends a forward pass whose output nobody needs."""


def forward(block: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """The block's output for hidden states (sequences, length, H)."""
    kernels = _attention(hidden.device, hidden.dtype)
    with torch.inference_mode(), fast_matmul(), sdpa_kernel(kernels, set_priority=True):
        output = block(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@cache
def _attention(device: torch.device, dtype: torch.dtype) -> list[SDPBackend]:
    """The attention kernels to choose from.

    cuDNN, the fastest, says only when it is called that it has no kernel for a GPU, so it is tried once.
    """
    if device.type == "cuda":
        query, key = (torch.zeros(1, heads, 256, 128, device=device, dtype=dtype) for heads in (8, 2))
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        except RuntimeError as error:
            warnings.warn(f"cuDNN's attention does not work here, another is taken: {error}", stacklevel=2)
            return list(_ATTENTION[1:])
    return list(_ATTENTION)


def watch(
    block: nn.Module,
    hidden: torch.Tensor,
    kwargs: dict[str, Any],
    observers: dict[str, Observer],
    last: str | None,
) -> torch.Tensor | None:
    """Runs the block and shows observers the inputs of the submodules they name.

    Args:
        last: submodule that need not run any more, nor what is after it; None for the whole block.

    Returns:
        The block's output if it ran to its end.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name in observers:
                observers[name](_first(args, named))
            if name == last:
                raise Enough

        return show

    names = dict.fromkeys([*observers, last] if last else observers)
    hooks = [block.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        return forward(block, hidden, kwargs)
    except Enough:
        return None
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def calling(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module runs a function in place of its own code, or of the function it ran before; its hooks stay."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@dataclass(frozen=True)
class Output:
    """What a module returns for hidden states.

    Attributes:
        width: of the hidden states that come out.
        values: how many values it returns, of which they are the first; 0 for a bare tensor.
    """

    width: int
    values: int


@dataclass(frozen=True)
class Split:
    """Where a block's attention ends: the residual stream there, and only it, decides the block's output.

    Attributes:
        point: the child that gets the residual stream after the attention as its input.
        before: children that run ahead of the attention and only feed it.
        attention: the attention children, and what each returns.
    """

    point: str
    before: tuple[str, ...]
    attention: dict[str, Output]

    @contextmanager
    def skipping(self, block: nn.Module) -> Iterator[None]:
        """Inside, the block takes the residual stream after its attention as its input.

        Attention that returns zeros adds nothing to it, to the bit.
        """
        with ExitStack() as stack:
            for name in self.before:
                stack.enter_context(calling(block.get_submodule(name), _first_of))
            for name, output in self.attention.items():
                stack.enter_context(calling(block.get_submodule(name), _silent(output)))
            yield


def find_split(block: nn.Module, mlp: Mlp, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Split | None:
    """Tries out where the block can be entered after its attention.

    Whatever child has linear layers and runs before the first that holds an MLP counts as attention. Every child that
    runs after it is a candidate; the right one is found by running the rest of the block on its input.

    Args:
        hidden: (sequences, length, H), any real input of the block.

    Returns:
        None where no such point exists, as in blocks whose attention and MLP stand side by side.
    """
    holders = {path.split(".")[0] for path in mlp.paths}
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, Output | None] = {}

    def record(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            inputs[name] = _first(args, named)
            first = output[0] if isinstance(output, tuple) else output
            values = len(output) if isinstance(output, tuple) else 0
            outputs[name] = Output(first.shape[-1], values) if isinstance(first, torch.Tensor) else None

        return seen

    hooks = [child.register_forward_hook(record(name), with_kwargs=True) for name, child in block.named_children()]
    try:
        expected = forward(block, hidden, kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    ran = list(inputs)
    holder = next((name for name in ran if name in holders), None)
    if holder is None:
        return None
    attention = {
        name: output
        for name in ran[: ran.index(holder)]
        if _has_linears(block.get_submodule(name)) and (output := outputs[name])
    }
    if not attention:
        return None
    names = list(attention)
    first, last = ran.index(names[0]), ran.index(names[-1])
    for point in ran[last + 1 : ran.index(holder) + 1]:
        split = Split(point, tuple(ran[:first]), attention)
        if inputs[point].shape == hidden.shape:
            with split.skipping(block):
                if torch.equal(forward(block, inputs[point], kwargs), expected):
                    return split
    return None


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _first(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a module is called with: by that name, or the first tensor."""
    if "hidden_states" in named:
        return named["hidden_states"]
    return next(value for value in (*args, *named.values()) if isinstance(value, torch.Tensor))


def _first_of(*args: Any, **named: Any) -> torch.Tensor:
    return _first(args, named)


def _silent(output: Output) -> Callable[..., Any]:
    def forward(*args: Any, **named: Any) -> Any:
        hidden = _first(args, named)
        zeros = hidden.new_zeros((*hidden.shape[:-1], output.width))
        return (zeros, *[None] * (output.values - 1)) if output.values else zeros

    return forward
