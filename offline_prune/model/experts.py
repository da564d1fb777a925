"""Finds mixtures of experts by what they compute: modules that are called with a routing, and lists of gated MLPs.

An expert is a gated MLP of its own, which only the tokens that a router sends to it pass through. Most of transformers'
models have all experts of a layer in two 3-D tensors, whatever their files look like; code that comes with a model may
have a list of modules. Whether a module with two such tensors computes Σ w·down(f(gate(x)) ⊙ up(x)) over the experts of
each token is tried out on a small copy of it, so this works on a model that exists only on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from offline_prune.model.gated_mlp import GatedMlp, Unsupported, find_gated_mlp, gated_mlps, splits_into_gate_and_up
from vllm_spense.format import Projections

#: Is shown the number of an expert and the inputs (tokens, H) that were routed to it.
ExpertObserver = Callable[[int, torch.Tensor], None]

#: Of the small copy: experts, hidden size, intermediate size, tokens, experts of each token.
_TRIED = 3, 12, 8, 5, 2


@dataclass(frozen=True)
class Experts:
    """All routed experts of a decoder block.

    Attributes:
        path: the name, inside the block, of the module that holds them.
        count: E.
        hidden: H, the width of an expert's input.
        intermediate: I of one expert.
        projections: names of an expert's linear layers: the files', once `stored` is known.
        stacked: names of the parameters (E, 2·I, H), gate's rows first, and (E, H, I); None for a list of modules.
        stored: the files' full name of what holds the experts: names of expert e's tensors begin with it and e.
    """

    path: str
    count: int
    hidden: int
    intermediate: int
    projections: Projections
    stacked: tuple[str, str] | None
    stored: str = ""

    @property
    def holder(self) -> str:
        """The module that holds the experts and their router, by its name inside the block; may be empty."""
        return self.path.rpartition(".")[0]

    def parameters(self, block: nn.Module, expert: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Of one expert: what holds gate and up, one tensor of 2·I rows or two of I, and down (H, I). All are views."""
        if self.stacked:
            gate_up, down = (block.get_parameter(f"{self.path}.{name}")[expert] for name in self.stacked)
            return [gate_up], down
        mlp = self.listed(expert)
        return [layer.weight for layer in mlp.gate_up(block)], mlp.down(block).weight

    def layers(self) -> Iterator[str]:
        """The files' full names of all experts' linear layers."""
        for expert in range(self.count):
            for name in dict.fromkeys(self.projections.to_dict().values()):
                yield f"{self.stored}.{expert}.{name}"

    def assembled(
        self, name: str, read: Callable[[str], torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The module's parameters by full name, where it has experts stacked: each weight goes to its place there.

        Args:
            name: the block's.
            read: a tensor of the files, by its name there.
        """
        gate, up, down = self.projections.to_dict().values()
        found: dict[str, torch.Tensor] = {}
        for parameter, parts in zip(self.stacked or (), ((gate, up), (down,)), strict=False):
            full = f"{name}.{self.path}.{parameter}"
            for expert, (i, part) in product(range(self.count), enumerate(parts)):
                weight = read(f"{self.stored}.{expert}.{part}.weight")
                height, width = weight.shape
                if full not in found:
                    found[full] = weight.new_empty(self.count, len(parts) * height, width, device=device)
                found[full][expert, i * height : (i + 1) * height].copy_(weight, non_blocking=True)
        return found

    def listed(self, expert: int) -> GatedMlp:
        """One expert of a list."""
        return GatedMlp(f"{self.path}.{expert}", self.projections, self.hidden, self.intermediate)

    def mid(self, block: nn.Module, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """What an expert's down gets for inputs (tokens, H): f(gate(x)) ⊙ up(x), (tokens, I)."""
        if self.stacked:
            module = block.get_submodule(self.path)
            (gate_up,), _ = self.parameters(block, expert)
            return _activation(module)(nn.functional.linear(inputs, gate_up))
        mlp = self.listed(expert)
        seen: list[torch.Tensor] = []
        hook = mlp.down(block).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            block.get_submodule(mlp.path)(inputs)
        finally:
            hook.remove()
        return seen[0]

    @contextmanager
    def watched(self, block: nn.Module, observer: ExpertObserver, arrived: Callable[[], None]) -> Iterator[None]:
        """Inside, an observer is shown what the block's own router sends to each expert, whenever the block runs.

        Args:
            arrived: called when the experts have been shown all of a call's inputs; it may end the forward pass.
        """
        if not self.stacked:
            hooks = [
                block.get_submodule(self.listed(expert).path).register_forward_pre_hook(
                    lambda _, args, expert=expert: observer(expert, args[0].flatten(0, -2)) if args[0].numel() else None
                )
                for expert in range(self.count)
            ]
        else:

            def show(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
                for expert, inputs in routed(*_call(args, named), self.count):
                    observer(expert, inputs)
                arrived()

            hooks = [block.get_submodule(self.path).register_forward_pre_hook(show, with_kwargs=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class Mixture:
    """What a block with routed experts has in place of one MLP.

    Attributes:
        shared: gated MLPs of all tokens beside them.
    """

    experts: Experts
    shared: tuple[GatedMlp, ...] = ()

    @property
    def path(self) -> str:
        return self.experts.path

    @property
    def hidden(self) -> int:
        return self.experts.hidden

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the experts and of the shared MLPs."""
        return self.path, *(mlp.path for mlp in self.shared)


Mlp = GatedMlp | Mixture


def find_mlps(block: nn.Module) -> Mlp | Unsupported:
    """The gated MLP, or the mixture of experts, of one decoder block, on any device, the meta device included."""
    dense = list(gated_mlps(block))
    lists = [
        (path, [mlp for mlp in dense if mlp.path.startswith(f"{path}.")])
        for path, module in block.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    found = [
        Experts(path, len(inside), inside[0].hidden, inside[0].intermediate, inside[0].projections, None)
        for path, inside in lists
        if [mlp.path for mlp in inside] == [f"{path}.{i}" for i in range(len(inside))]
        and len({(mlp.hidden, mlp.intermediate, mlp.projections) for mlp in inside}) == 1
    ]
    for path, module in block.named_modules():
        if path and (stacked := _as_stacked(path, module)):
            found.append(stacked)
    if len(found) != 1:
        return find_gated_mlp(block)
    (experts,) = found
    return Mixture(experts, tuple(mlp for mlp in dense if not mlp.path.startswith(f"{experts.path}.")))


def routed(hidden: torch.Tensor, index: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that some token is routed to, and its inputs in the tokens' order.

    Args:
        hidden: (tokens, H).
        index: integer (tokens, k), the experts of each token; numbers from `count` on stand for none.
    """
    flat = index.flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat, minlength=count)[:count].tolist()
    inputs = hidden[order[: sum(sizes)] // index.shape[1]]
    for expert, part in enumerate(inputs.split(sizes)):
        if len(part):
            yield expert, part


def _call(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what stacked experts are called with: hidden states (tokens, H), and each token's experts (tokens, k)."""
    tensors = [value for value in (*args, *named.values()) if isinstance(value, torch.Tensor)]
    hidden = next(tensor for tensor in tensors if tensor.is_floating_point())
    index = next(tensor for tensor in tensors if not tensor.is_floating_point())
    return hidden.flatten(0, -2), index.flatten(0, -2)


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """(…, 2·I) → (…, I), f(gate) ⊙ up, as the module's own code has it."""
    code: Any = module
    if hasattr(code, "_apply_gate"):
        return code._apply_gate
    activation = code.act_fn

    def apply(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    return apply


def _as_stacked(path: str, module: nn.Module) -> Experts | None:
    found = dict(module.named_parameters(recurse=False))
    if len(found) != 2 or any(parameter.ndim != 3 for parameter in found.values()):
        return None
    (up_name, gate_up), (down_name, down) = found.items()
    count, hidden, intermediate = down.shape
    if gate_up.shape != (count, 2 * intermediate, hidden):
        return None
    # The files' names for an expert's layers are found with the files.
    names = Projections(up_name, up_name, down_name)
    return Experts(path, count, hidden, intermediate, names, (up_name, down_name)) if _proven(module, names) else None


def _proven(module: nn.Module, names: Projections) -> bool:
    """Whether a small copy of the module computes what experts compute."""
    experts, hidden, intermediate, tokens, k = _TRIED
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, generator=generator)
    down = torch.randn(experts, hidden, intermediate, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    trial: Any = copy.deepcopy(module).eval()
    setattr(trial, names.gate, nn.Parameter(gate_up, requires_grad=False))
    setattr(trial, names.down, nn.Parameter(down, requires_grad=False))
    for name, value in vars(module).items():
        # Whatever the module calls its number of experts.
        if type(value) is int and value == len(getattr(module, names.down)) and "expert" in name:
            setattr(trial, name, experts)
    if hasattr(trial, "config"):
        trial.config._experts_implementation = "eager"
    try:
        with torch.inference_mode():
            found = trial(x, index, weights)
            activation = _activation(trial)
            expected = torch.zeros_like(x)
            for token in range(tokens):
                for place, expert in enumerate(index[token].tolist()):
                    mid = activation(gate_up[expert] @ x[token])
                    expected[token] += weights[token, place] * (down[expert] @ mid)
            return splits_into_gate_and_up(activation, intermediate) and torch.allclose(
                found, expected, rtol=1e-4, atol=1e-4
            )
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, ValueError, LookupError):
        return False  # Other modules have two such tensors too, but are not called like experts.
