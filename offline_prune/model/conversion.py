"""How a model's parameters are made of the tensors of its files: by transformers' rules, and by one that it lacks.

Some models (Granite-MoE, Qwen3-VL-MoE) have all experts of a layer in one tensor, in their files too, and transformers
has no rule for files that hold each expert by itself. A pruned checkpoint holds them so, under the names that vLLM's
classes of these models take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from vllm_spense.format import Projections

#: What published files, and vLLM's loaders of them, call an expert's layers.
CONVENTIONS = (Projections("gate_proj", "up_proj", "down_proj"), Projections("w1", "w3", "w2"))


@dataclass(frozen=True)
class Conversion:
    """What is done to a tensor of the files beside renaming it.

    Attributes:
        position: of its kind among those that become one parameter, in the order in which they are put together.
        operations: transformers' classes.
        foreign: whether transformers has no rule for the tensor's name, and so does not read it.
    """

    position: int
    operations: tuple[str, ...]
    foreign: bool = False


class _Experts(WeightConverter):
    """A rule of Spense's own."""

    __slots__ = ()


class Conversions:
    """What becomes of each tensor of a model's files.

    Attributes:
        rules: transformers', and Spense's own for experts that the model stacks.
        places: the model's parameters and buffers by name.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.places: dict[str, Any] = dict(model.state_dict())
        self._prefix = model.base_model_prefix
        self.rules: list[Any] = list(get_model_conversion_mapping(model))
        self._sort()
        self.rules += list(self._for_experts())
        self._sort()

    def __call__(self, name: str) -> tuple[str, Conversion | None]:
        """What transformers renames a tensor of the files to, a parameter or buffer or nothing it knows; and how it is
        converted, if it is not renamed alone."""
        to, pattern = self.renamed(name)
        if to not in self.places and name in self.places:
            to, pattern = rename_source_key(name, [], [], self._prefix, self.places)
        return to, None if pattern is None else self._steps[pattern]

    def renamed(self, name: str) -> tuple[str, str | None]:
        """Where transformers puts a tensor of the files, and which pattern of `converters` matched it."""
        return rename_source_key(name, self._renamings, self.converters, self._prefix, self.places)

    def _sort(self) -> None:
        self._renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self._steps = {
            pattern: Conversion(
                position, tuple(type(step).__name__ for step in rule.operations), isinstance(rule, _Experts)
            )
            for rule in reversed(self.converters)
            for position, pattern in enumerate(rule.source_patterns)
        }

    def _for_experts(self) -> Iterator[_Experts]:
        """Rules for stacked experts of which transformers reads no form that holds each by itself."""
        names, made = CONVENTIONS[0], set()
        for owner, (gate_up, down) in _stacked(self.places):
            if any(self(f"{owner}.0.{each.down}.weight")[0] in self.places for each in CONVENTIONS):
                continue
            # As it is called in every layer.
            inner = re.split(r"\.\d+\.", owner)[-1]
            if inner not in made:
                made.add(inner)
                single = f"{inner}.*."
                yield _Experts(
                    [f"{single}{names.gate}.weight", f"{single}{names.up}.weight"],
                    f"{inner}.{gate_up}",
                    [MergeModulelist(dim=0), Concatenate(dim=1)],
                )
                yield _Experts(f"{single}{names.down}.weight", f"{inner}.{down}", [MergeModulelist(dim=0)])


def _stacked(places: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Modules with two parameters of three dimensions whose shapes are those of stacked experts, (E, 2·I, H) and
    (E, H, I), and the parameters' names."""
    inside: dict[str, list[str]] = {}
    for name, tensor in places.items():
        if tensor.ndim == 3:
            owner, _, leaf = name.rpartition(".")
            inside.setdefault(owner, []).append(leaf)
    for owner, leaves in inside.items():
        if owner and len(leaves) == 2:
            count, hidden, intermediate = places[f"{owner}.{leaves[1]}"].shape
            if tuple(places[f"{owner}.{leaves[0]}"].shape) == (count, 2 * intermediate, hidden):
                yield owner, (leaves[0], leaves[1])
