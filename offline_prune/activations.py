"""Calibration activations: hidden states between two blocks, and the statistics of what a linear layer sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from offline_prune.glu import Glu
from offline_prune.model import SourceModel
from offline_prune.precision import fast_matmul
from vllm_spense.errors import SpenseError

Observer = Callable[[torch.Tensor], None]


class Hessian:
    """H = Σ x·xᵀ of one linear layer's inputs, float32 (K, K).

    Only blocks of rows from the diagonal rightwards are accumulated; the rest follows by symmetry.
    """

    _ROWS = 512

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, size, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Adds (tokens, K), any float type."""
        x = inputs.float()
        for start in range(0, x.shape[1], self._ROWS):
            stop = start + self._ROWS
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])

    def matrix(self) -> torch.Tensor:
        """float32 (K, K), symmetric."""
        upper = self._sum.triu()
        return upper + upper.triu(1).T


class Energy:
    """diag(H) = Σ x_j² of one linear layer's inputs, float32 (K,)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.diagonal = torch.zeros(size, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Adds (tokens, K), any float type."""
        self.diagonal += inputs.float().square().sum(0)


class _ReachedDown(Exception):
    """Ends a forward pass whose output nobody needs."""


class _Recorder(nn.Module):
    """Stands for a decoder block while the model's own code prepares masks and positions."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = (block,)  # In a tuple, so that it does not become a submodule.
        self.kwargs: dict[str, Any] = {}
        self.hidden = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.hidden, self.kwargs = hidden_states, kwargs
        return hidden_states


class Stream:
    """The hidden states of every calibration sequence at the input of one block, and how to call the blocks.

    Args:
        model: its embeddings are loaded for the duration of the call.
        tokens: int64 (samples, length).
        batch_tokens: about how many tokens go through a block at once.
    """

    def __init__(
        self, model: SourceModel, tokens: torch.Tensor, device: torch.device, dtype: torch.dtype, batch_tokens: int
    ) -> None:
        self.device = device
        batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
        self.hidden: list[torch.Tensor] = []
        self.kwargs: list[dict[str, Any]] = []
        self._attention: list[dict[str, Any]] = [{} for _ in batches]
        with _recording(model, device, dtype) as recorders:
            for batch in batches:
                model.skeleton.base_model(input_ids=batch.to(device), use_cache=False)
                self.hidden.append(recorders[0].hidden.to(dtype).cpu())
                # No padding and no cache: all batches share their masks and positions, but for the batch size.
                if not self.kwargs:
                    model.skeleton.base_model(input_ids=batch[:1].to(device), use_cache=False)
                    self.kwargs = [recorder.kwargs for recorder in recorders]

    def observe(
        self,
        index: int,
        block: nn.Module,
        mlp: Glu,
        on_input: Observer | None = None,
        on_mid: Observer | None = None,
    ) -> None:
        """Shows observers the inputs, (tokens, H), and the intermediate activations, (tokens, I), of a block's MLP."""
        hooks = []
        if on_input is not None:
            hooks.append(_watch(mlp.gate_up(block)[0], on_input))
        hooks.append(_watch(mlp.down(block), on_mid, stop=True))
        try:
            for batch in range(len(self.hidden)):
                try:
                    self._forward(index, block, batch, mlp)
                except _ReachedDown:
                    continue
        finally:
            for hook in hooks:
                hook.remove()

    def advance(self, index: int, block: nn.Module, name: str, mlp: Glu | None) -> None:
        """Replaces the hidden states by the block's outputs.

        Raises:
            SpenseError: an output is not finite.
        """
        for batch in range(len(self.hidden)):
            output = self._forward(index, block, batch, mlp)
            if not torch.isfinite(output).all():
                raise SpenseError(f"{name}: its output on the calibration text is not finite")
            self.hidden[batch] = output.cpu()
        self._attention = [{} for _ in self.hidden]

    def _forward(self, index: int, block: nn.Module, batch: int, mlp: Glu | None) -> torch.Tensor:
        hidden = self.hidden[batch].to(self.device)
        kwargs = self.kwargs[index]
        with torch.inference_mode(), fast_matmul(), _replayed(block, mlp, self._attention[batch]):
            output = block(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def _recording(model: SourceModel, device: torch.device, dtype: torch.dtype) -> Iterator[list[_Recorder]]:
    """The model with its embeddings loaded and a recorder in place of every block."""
    names = [block.name for block in model.blocks]
    parent = model.module(names[0].rpartition(".")[0])
    assert isinstance(parent, nn.ModuleList)
    originals = list(parent)
    recorders = [_Recorder(block) for block in originals]
    with model.outside_blocks(device, dtype), torch.inference_mode():
        for i, recorder in enumerate(recorders):
            parent[i] = recorder
        try:
            yield recorders
        finally:
            for i, block in enumerate(originals):
                parent[i] = block


def _watch(layer: nn.Linear, observer: Observer | None, stop: bool = False) -> Any:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if observer is not None:
            observer(inputs[0].flatten(0, -2))
        if stop:
            raise _ReachedDown

    return layer.register_forward_pre_hook(hook)


@contextmanager
def _replayed(block: nn.Module, mlp: Glu | None, cache: dict[str, Any]) -> Iterator[None]:
    """Runs the block's attention on the first pass and returns its stored output on later ones.

    A block is passed through three times with the same input; attention does not depend on what changes in
    between. Whatever child of the block has linear layers and does not hold the MLP counts as attention.
    """
    originals: dict[str, Callable[..., Any]] = {}
    if mlp is not None:
        for name, child in block.named_children():
            if name != mlp.path.split(".")[0] and any(isinstance(m, nn.Linear) for m in child.modules()):
                originals[name] = child.forward
                child.forward = _remember(name, child.forward, cache)
    try:
        yield
    finally:
        for name in originals:
            del block.get_submodule(name).forward


def _remember(name: str, forward: Callable[..., Any], cache: dict[str, Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if name not in cache:
            output = forward(*args, **kwargs)
            first, *rest = output if isinstance(output, tuple) else (output,)
            cache[name] = (first.cpu(), isinstance(output, tuple), [None] * len(rest))
            return output
        first, is_tuple, rest = cache[name]
        source = args[0] if args else kwargs["hidden_states"]
        first = first.to(source.device)
        return (first, *rest) if is_tuple else first

    return call
