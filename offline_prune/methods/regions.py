"""How many intermediate indices of each MLP are sparse and how many dense."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

from vllm_spense.errors import SpenseError
from vllm_spense.format import MIN_ALIGNMENT, Regions

#: Regions that are multiples of this stay multiples of 32 on each of 8 tensor parallel ranks.
PREFERRED_ALIGNMENT = 256
#: How far the sparsity that an alignment allows may be from the one asked for.
SPARSITY_TOLERANCE = 0.005
#: What the first MLP's sparsity may add to the others', on average: a few blocks had better share it with the first.
_MOST_MORE = 0.1


def model_regions(
    sizes: Mapping[str, int],
    sparsity: float,
    alignment: int | None,
    dense_first: bool,
    required: bool,
    experts: Collection[str] = (),
) -> tuple[dict[str, Regions], int]:
    """The regions of every MLP, by module name, and their common alignment.

    Args:
        sizes: module name → intermediate size I, in the model's order.
        sparsity: MLP sparsity (1 − ρ) / 2 of the whole model.
        alignment: see `fit_regions`.
        dense_first: keep the first MLP dense where the others can take over its sparsity.
        required: it is an error where they cannot.
        experts: names that stand for all routed experts of a block: these have the same regions in all blocks.

    Raises:
        SpenseError: sizes that do not fit, or the first MLP has to stay dense and the others cannot take its place.
    """
    regions: dict[str, Regions] = {}
    alignments = []
    for name, intermediate in sizes.items():
        regions[name], found = fit_regions(intermediate, sparsity, alignment, name)
        alignments.append(found)
    if dense_first:
        moved = None if experts else with_dense_first(regions, min(alignments))
        if moved is None and required:
            raise SpenseError(
                f"--dense-first: the experts of all {len(experts)} blocks have the same regions; expected no experts"
                if experts
                else f"--dense-first: the other {len(regions) - 1} MLPs cannot take over the first one's sparsity; "
                f"expected room in them, and so many that it adds at most {_MOST_MORE:.0%} to theirs"
            )
        regions = moved or regions
    return regions, min(alignments)


def fit_regions(intermediate: int, sparsity: float, alignment: int | None, layer: str) -> tuple[Regions, int]:
    """The regions closest to an MLP sparsity, and the alignment they have.

    Args:
        intermediate: I.
        sparsity: (1 − ρ) / 2.
        alignment: or None for the largest power of two from 256 down to 32 that fits.

    Raises:
        SpenseError: no region sizes within half a percent of sparsity; names those that would fit.
    """
    step = PREFERRED_ALIGNMENT
    tried = []
    while step >= MIN_ALIGNMENT:
        tried.append(step)
        step //= 2
    for step in tried if alignment is None else [alignment]:
        if intermediate % step == 0:
            dense = round((1 - 2 * sparsity) * intermediate / step) * step
            regions = Regions(intermediate - dense, dense)
            if abs(regions.mlp_sparsity - sparsity) <= SPARSITY_TOLERANCE:
                return regions, step
    step = alignment or MIN_ALIGNMENT
    if intermediate % step:
        divisor = math.gcd(intermediate, PREFERRED_ALIGNMENT)
        advice = f"; --alignment {divisor} divides it" if divisor >= MIN_ALIGNMENT else ""
        raise SpenseError(
            f"{layer}: intermediate size {intermediate} is not a multiple of the alignment {step}{advice}"
        )
    choices = [(intermediate - dense) / intermediate / 2 for dense in range(0, intermediate + 1, step)]
    nearest = sorted(sorted(choices, key=lambda s: abs(s - sparsity))[:4])
    fitting = ", ".join(f"{s:.4g}" for s in nearest)
    raise SpenseError(
        f"{layer}: sparsity {sparsity:g} does not fit intermediate size {intermediate} with alignment {step}; "
        f"--sparsity values that fit nearby: {fitting}"
    )


def mean_sparsity(regions: Iterable[Regions]) -> float:
    """Share of zeros in the weights of several MLPs of one width."""
    known = list(regions)
    return sum(each.sparse for each in known) / sum(each.intermediate for each in known) / 2


def with_dense_first(regions: Mapping[str, Regions], step: int) -> dict[str, Regions] | None:
    """The same sparsity of the whole model with a dense first MLP: the others share its sparse indices evenly.

    Args:
        regions: of all MLPs in their order.
        step: of which all sizes are multiples, and stay so.

    Returns:
        None where the others have no room for that, or are too few.
    """
    first, *others = regions
    sizes = {each.intermediate for each in regions.values()}
    units = regions[first].sparse // step
    if len(sizes) > 1 or len(others) * _MOST_MORE < 1:
        return None
    (intermediate,) = sizes
    moved = {first: Regions(0, intermediate)}
    for i, name in enumerate(others):
        # Those that get one unit more are spread evenly, and the ends, the most sensitive ones, are not among them.
        more = _share(i + 1, units, len(others)) - _share(i, units, len(others))
        sparse = regions[name].sparse + more * step
        if sparse > intermediate:
            return None
        moved[name] = Regions(sparse, intermediate - sparse)
    return moved


def _share(blocks: int, units: int, count: int) -> int:
    """Units that the first so many blocks get of all that `count` blocks get, rounded to the nearest."""
    return (2 * blocks * units + count) // (2 * count)
