"""What the files call the tensors of routed experts, and the refusal of files that hold them in another form."""

from __future__ import annotations

import re
from dataclasses import replace

from offline_prune.model.experts import Experts
from offline_prune.model.gated_mlp import Unsupported
from offline_prune.model.model_tensors import ModelTensors
from vllm_spense.format import Projections

#: transformers' operations that put experts together without changing them.
_PLAIN = {"MergeModulelist", "Concatenate"}
_NAME = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")


def with_names(experts: Experts, block: str, tensors: ModelTensors) -> Experts | Unsupported:
    """Experts whose files hold three matrices of each; `stored` and `projections` are the files' from here on.

    Args:
        block: the full name of the experts' block.
    """
    if not experts.stacked:
        layer = f"{block}.{experts.listed(0).path}"
        return replace(experts, stored=tensors.stored(layer).removesuffix(".0"))
    found: dict[tuple[int, int], tuple[str, str]] = {}
    sizes = {0: (experts.intermediate, experts.hidden), 1: (experts.hidden, experts.intermediate)}
    for place, parameter in enumerate(experts.stacked):
        whole = f"{block}.{experts.path}.{parameter}"
        for name in tensors.parts_of_parameter(whole):
            how, named = tensors.converted.get(name), _NAME.fullmatch(name)
            if how is None or named is None or not _PLAIN.issuperset(how.operations):
                form = f"{name} {tensors.shape(name if how else whole)}"
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
