"""Finds gated MLPs (GLUs) by what they compute, not by what they are called.

A GLU is a module that maps x to down(f(gate(x)) ⊙ up(x)). Whether a candidate is one is tried out: its linear
layers are replaced by probes that return chosen vectors, and the vector that reaches `down` must be their
elementwise product under some f, which is exactly what makes intermediate indices permutable. No weights are
needed, so this works on a model that exists only on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from vllm_spense.format import Projections


@dataclass(frozen=True)
class GatedMlp:
    """A gated MLP inside a decoder block.

    Attributes:
        path: the module's name inside the block, such as `mlp`.
        projections: names of its linear layers inside it.
        hidden: H, the width of its input.
        intermediate: I.
    """

    path: str
    projections: Projections
    hidden: int
    intermediate: int

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the only one that its block has."""
        return (self.path,)

    def gate_up(self, block: nn.Module) -> tuple[nn.Linear, ...]:
        """The layers that hold gate and up: two, or one of 2·I rows."""
        names = dict.fromkeys((self.projections.gate, self.projections.up))
        return tuple(linear(block, f"{self.path}.{name}") for name in names)

    def down(self, block: nn.Module) -> nn.Linear:
        return linear(block, f"{self.path}.{self.projections.down}")


@dataclass(frozen=True)
class Unsupported:
    """Why a block cannot be pruned: `found` describes its MLP, which may be a gated one that is `shared` by blocks."""

    found: str
    shared: bool = False


def linear(module: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name inside a module."""
    return cast(nn.Linear, module.get_submodule(name))


def gated_mlps(block: nn.Module) -> Iterator[GatedMlp]:
    """All of one decoder block, experts in a list of modules among them, on any device, the meta device included."""
    for path, module in block.named_modules():
        if path and (mlp := _as_gated_mlp(path, module)):
            yield mlp


def find_gated_mlp(block: nn.Module) -> GatedMlp | Unsupported:
    """The gated MLP of one decoder block that has no experts, on any device, the meta device included."""
    found = list(gated_mlps(block))
    experts = _describe_experts(block, found)
    if experts:
        return Unsupported(experts)
    if len(found) == 1:
        return found[0]
    if found:
        return Unsupported(f"{len(found)} gated MLPs: " + ", ".join(mlp.path for mlp in found))
    linears = [
        f"{path} ({module.out_features} × {module.in_features})"
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return Unsupported("no gated MLP among its linear layers " + (", ".join(linears) or "(it has none)"))


def _describe_experts(block: nn.Module, found: list[GatedMlp]) -> str:
    hidden = {mlp.hidden for mlp in found} or set(_norm_widths(block))
    stacked = [f"{name} {shape}" for name, shape in _stacked_maps(block, hidden)]
    if stacked:
        return "a mixture of experts: " + ", ".join(stacked)
    for path, module in block.named_modules():
        inside = [mlp for mlp in found if mlp.path.startswith(f"{path}.")]
        if isinstance(module, nn.ModuleList) and inside:
            return f"a mixture of {len(module)} experts: {path}"
    return ""


def _stacked_maps(block: nn.Module, hidden: set[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Stacks of matrices that each map whole tokens, as experts do.

    The kernel of a convolution has three dimensions too, and so has a matrix that is diagonal block by block, of which
    every token meets all blocks, or one that is split by attention heads (XLNet). None's matrices are as wide as a
    token. Those that a state space has for each of its heads, beside its convolution (Zamba), may be. A vector that
    broadcasts over batch and tokens (RWKV) is no matrix.

    Args:
        hidden: widths of a token, as the block's gated MLPs or norms tell them.
    """
    for path, module in block.named_modules():
        if any(isinstance(each, nn.modules.conv._ConvNd) for each in (module, *module.children())):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim == 3 and 1 not in parameter.shape and hidden & set(parameter.shape[1:]):
                yield name, tuple(parameter.shape)


def _norm_widths(block: nn.Module) -> Iterator[int]:
    """Of modules that have vectors alone."""
    for module in block.modules():
        held = [parameter.shape for parameter in module.parameters()]
        if held and all(len(shape) == 1 for shape in held):
            yield held[0][0]


def _as_gated_mlp(path: str, module: nn.Module) -> GatedMlp | None:
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    for down_name, down in linears.items():
        intermediate, hidden = down.in_features, down.out_features
        others = {name: layer for name, layer in linears.items() if name != down_name}
        if any(layer.in_features != hidden for layer in others.values()):
            continue
        widths = [layer.out_features for layer in others.values()]
        if widths not in ([2 * intermediate], [intermediate, intermediate]):
            continue
        names = _probe(module, list(others), down_name, hidden, intermediate)
        if names:
            return GatedMlp(path, names, hidden, intermediate)
    return None


class _Source(nn.Module):
    """Stands for a linear layer; returns a chosen vector."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


class _Sink(nn.Module):
    """Stands for `down`; remembers what reaches it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.seen = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return torch.zeros(*x.shape[:-1], self.hidden)


def _probe(module: nn.Module, inputs: list[str], down: str, hidden: int, intermediate: int) -> Projections | None:
    trial = copy.deepcopy(module).eval()
    sources = [_Source() for _ in inputs]
    for name, source in zip(inputs, sources, strict=True):
        setattr(trial, name, source)
    sink = _Sink(hidden)
    setattr(trial, down, sink)

    def product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        values = (first, second) if len(sources) == 2 else (torch.cat([first, second], -1),)
        for source, value in zip(sources, values, strict=True):
            source.value = value
        trial(torch.zeros(1, 1, hidden))
        return sink.seen

    try:
        first_is_up, second_is_up = _linear_in(product, intermediate)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, ValueError, LookupError):
        return None  # Attention has linear layers of matching shapes too, but is not callable like an MLP.
    fused = len(inputs) == 1
    if second_is_up:
        return Projections(inputs[0], inputs[0] if fused else inputs[1], down)
    if first_is_up and not fused:
        return Projections(inputs[1], inputs[0], down)
    return None


def splits_into_gate_and_up(activation: Callable[[torch.Tensor], torch.Tensor], intermediate: int) -> bool:
    """Whether a function (…, 2·I) → (…, I) is the elementwise product of some f of the first half and the second."""
    return _linear_in(lambda first, second: activation(torch.cat([first, second], -1)), intermediate)[1]


def _linear_in(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], intermediate: int) -> tuple[bool, bool]:
    """Whether a function of two vectors (…, I) is elementwise and linear in the first one, and in the second one."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 1, intermediate, generator=generator)
    shuffle = torch.randperm(intermediate, generator=generator)
    z = product(a, b)
    elementwise = (
        z.shape == a.shape
        and bool(z.count_nonzero())
        and torch.allclose(product(a[..., shuffle], b[..., shuffle]), z[..., shuffle])
    )
    if not elementwise:
        return False, False
    first = torch.allclose(product(2 * a, b), 2 * z, rtol=1e-4)
    return first, torch.allclose(product(a, 2 * b), 2 * z, rtol=1e-4)
