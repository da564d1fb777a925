"""Which linear layers of a checkpoint are not quantized, in names that every reader of it understands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Set

from torch import nn

from offline_prune.model.loading import DRAFT_LAYER, SourceModel


def ignored(model: SourceModel, quantized: Set[str], experts: Set[str] = frozenset()) -> list[str]:
    """The `ignore` list of compressed-tensors: the head, whole blocks that were skipped, vision towers, draft heads,
    routers of experts.

    A server's own names differ from the files' and from transformers' in what they begin with, so a subtree is a
    regular expression for its last names. Draft heads (MTP) are in the files alone.

    Args:
        quantized: full names of the linear layers that are quantized.
        experts: the files' names of routed experts' layers, which all are.
    """
    tensors = model.tensors
    held = {f"{name}.{each.path}" for name, each in model.experts.items()}
    inside = tuple(f"{path}." for path in held)
    linears = {
        name
        for name, module in model.skeleton.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside)
    }
    files = {tensors.stored(f"{name}.weight").removesuffix(".weight") for name in quantized} | experts
    spelled = {tensors.stored(f"{name}.weight").removesuffix(".weight") for name in linears - quantized}
    # In the files alone, or in another form there.
    foreign = {
        name.removesuffix(".weight")
        for name in tensors
        if name.endswith(".weight") and (name in tensors.converted or not tensors.known(name))
    } - experts
    # A server has linear layers for them; transformers has parameters.
    routers = {name for name in _matrices(model) if name.startswith(_holders(model))} - files - spelled
    # Where a router is a linear layer, what holds it holds experts too.
    kept = _roots(linears - quantized, quantized | held) | _roots(spelled | foreign, files) | routers
    whole = (linears - quantized) | spelled | routers
    kept |= _numbered_on(tensors, len(model.blocks))
    found = [root if root in whole else _subtree(root, quantized | files) for root in kept]
    return list(dict.fromkeys(sorted(found, key=lambda each: (each.startswith("re:"), each))))


def _numbered_on(names: Iterable[str], layers: int) -> set[str]:
    """The names that vLLM gives MiMo's draft layers when it asks whether they are quantized: beyond the last layer."""
    matches = (DRAFT_LAYER.match(name) for name in names)
    return {f"{match[1] or ''}layers.{layers + int(match[2])}" for match in matches if match}


def _matrices(model: SourceModel) -> Iterator[str]:
    """Modules whose `weight` is a matrix, by the files' names."""
    for name in model.tensors:
        if name.endswith(".weight") and name not in model.tensors.converted and len(model.tensors.shape(name)) == 2:
            yield model.tensors.stored(name).removesuffix(".weight")


def _holders(model: SourceModel) -> tuple[str, ...]:
    """What holds experts and their router, by the beginnings of the files' names."""
    return tuple(f"{experts.stored.rpartition('.')[0]}." for experts in model.experts.values())


def _roots(names: Iterable[str], others: Set[str]) -> set[str]:
    """The shortest beginnings of names that none of the others has."""
    shared = {prefix for name in others for prefix in _beginnings(name)}
    return {next((prefix for prefix in _beginnings(name) if prefix not in shared), name) for name in names}


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _subtree(root: str, others: Set[str]) -> str:
    """A pattern for all that is inside, whatever stands before it, and for none of the others."""
    parts = root.split(".")
    for start in range(len(parts) - 1, -1, -1):
        pattern = rf"(.*\.)?{re.escape('.'.join(parts[start:]))}(\..*)?$"
        if not parts[start].isdigit() and not any(re.match(pattern, name) for name in others):
            return f"re:{pattern}"
    return f"re:{re.escape(root)}(\\..*)?$"
