"""What a checkpoint calls the tensors of routed experts, and the refusal of files that hold them in another form."""

from __future__ import annotations

import re
from dataclasses import replace

from offline_prune.model.conversion import CONVENTIONS
from offline_prune.model.experts import Experts
from offline_prune.model.gated_mlp import Unsupported
from offline_prune.model.model_tensors import ModelTensors, Part
from vllm_spense.format import Projections

#: transformers' operations that put experts together without changing them.
_PLAIN = {"MergeModulelist", "Concatenate"}
#: What published files of Qwen3-VL-MoE need.
_TRANSPOSED = ("Transpose",)
_NAME = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")


def with_names(experts: Experts, block: str, tensors: ModelTensors) -> Experts | Unsupported:
    """Experts whose files hold three matrices of each, or the parameters of all as they are; `stored` and `projections`
    are from here on what the files call each expert's matrices, or what the checkpoint will.

    Args:
        block: the full name of the experts' block.
        tensors: where it holds the parameters whole, they are taken apart in it.
    """
    if not experts.stacked:
        layer = f"{block}.{experts.listed(0).path}"
        return replace(experts, stored=tensors.stored(layer).removesuffix(".0"))
    if taken_apart := _taken_apart(experts, block, tensors):
        return taken_apart
    found: dict[tuple[int, int], tuple[str, str]] = {}
    sizes = {0: (experts.intermediate, experts.hidden), 1: (experts.hidden, experts.intermediate)}
    for place, parameter in enumerate(experts.stacked):
        whole = f"{block}.{experts.path}.{parameter}"
        for name in tensors.parts_of_parameter(whole):
            how, named = tensors.converted.get(name), _NAME.fullmatch(name)
            if how is None or named is None or not _PLAIN.issuperset(how.operations):
                form = f"{name} {tensors.shape(name if how else whole)}"
                form += f", which transformers converts by {', '.join(how.operations)}" if how else ""
                return Unsupported(f"a mixture of experts whose files do not hold each expert by itself: {form}")
            if tensors.shape(name) != sizes[place]:
                return Unsupported(f"a mixture of experts of which {name} has the shape {tensors.shape(name)}")
            found[int(named[2]), 2 * place + how.position] = named[1], named[3]
    stored = {prefix for prefix, _ in found.values()}
    leaves = [{leaf for (_, kind), (_, leaf) in found.items() if kind == which} for which in range(3)]
    missing = [(e, kind) for e in range(experts.count) for kind in range(3) if (e, kind) not in found]
    if len(found) != 3 * experts.count or missing or len(stored) != 1 or any(len(each) != 1 for each in leaves):
        which = f"expert {missing[0][0]}" if missing else "some experts"
        return Unsupported(
            f"a mixture of {experts.count} experts, {block}.{experts.path}, of which the files lack {which}"
        )
    return replace(experts, stored=stored.pop(), projections=Projections(*(each.pop() for each in leaves)))


def _taken_apart(experts: Experts, block: str, tensors: ModelTensors) -> Experts | None:
    """Experts of which the files hold each parameter in one tensor; it is taken apart in `tensors`."""
    gate_up, down = (f"{block}.{experts.path}.{parameter}" for parameter in experts.stacked or ())
    parts: dict[str, Part] = {}
    inner, hidden = experts.intermediate, experts.hidden
    stored = names = None
    for parameter, kinds, (height, width) in (
        (gate_up, ("gate", "up"), (inner, hidden)),
        (down, ("down",), (hidden, inner)),
    ):
        found = _whole(parameter, (experts.count, len(kinds) * height, width), tensors)
        if found is None:
            return None
        whole, transposed = found
        # What the files call the module, where they have the parameter's name.
        leaf = f".{parameter.rpartition('.')[2]}"
        here = whole.removesuffix(leaf) if whole.endswith(leaf) else f"{tensors.stored(block)}.{experts.path}"
        stored = stored or here
        names = names or _convention(here, gate_up, down, tensors)
        if names is None or here != stored:
            return None
        for expert in range(experts.count):
            for i, kind in enumerate(kinds):
                rows = range(i * height, (i + 1) * height)
                name = f"{stored}.{expert}.{names.to_dict()[kind]}.weight"
                parts[name] = Part(whole, expert, rows, width, transposed)
    assert stored is not None
    assert names is not None
    tensors.take_apart(parts)
    return replace(experts, stored=stored, projections=names)


def _whole(parameter: str, shape: tuple[int, int, int], tensors: ModelTensors) -> tuple[str, bool] | None:
    """The one tensor of the files that a parameter is, and whether its last two dimensions are exchanged there."""
    made_of = tensors.parts_of_parameter(parameter)
    if len(made_of) != 1:
        return None
    (name,) = made_of
    how = tensors.converted.get(name)
    found = tensors.shape(name if how else parameter)
    if found == shape and (how is None or how.operations == _TRANSPOSED):
        # transformers looks at the shape too.
        return name, False
    exchanged = shape[0], shape[2], shape[1]
    return (name, True) if how is not None and how.operations == _TRANSPOSED and found == exchanged else None


def _convention(stored: str, gate_up: str, down: str, tensors: ModelTensors) -> Projections | None:
    """What an expert's layers are called where these parameters are put together of them."""
    for names in CONVENTIONS:
        became = [tensors.conversions(f"{stored}.0.{leaf}.weight") for leaf in names.to_dict().values()]
        places = [(to, how.position) for to, how in became if how is not None and _PLAIN.issuperset(how.operations)]
        if places == [(gate_up, 0), (gate_up, 1), (down, 0)]:
            return names
    return None
