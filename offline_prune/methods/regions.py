"""How many intermediate indices of each MLP are sparse and how many dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from offline_prune.model.gated_mlp import Glu, Unsupported
from offline_prune.model.loading import SourceModel
from offline_prune.settings import PruneSettings, fit_regions
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions

#: What the first MLP's sparsity may add to the others', on average: a few blocks had better share it with the first.
_MOST_MORE = 0.1


def model_regions(model: SourceModel, settings: PruneSettings) -> tuple[dict[str, Regions], int]:
    """The regions of every MLP that will be pruned, by module name, and their common alignment.

    Raises:
        SpenseError: a block without a gated MLP that may not be skipped, none with one, or sizes that do not fit; the
            first MLP shall stay dense and the others cannot take its place.
    """
    regions: dict[str, Regions] = {}
    alignments = []
    if not any(isinstance(block.mlp, Glu) for block in model.blocks):
        first = model.blocks[0]
        assert isinstance(first.mlp, Unsupported)
        raise SpenseError(
            f"{settings.model}: no block has a gated MLP (gate, up, down), so there is nothing to prune; "
            f"{first.name}: found {first.mlp.found}"
        )
    for block in model.blocks:
        if isinstance(block.mlp, Glu):
            name = f"{block.name}.{block.mlp.path}"
            regions[name], alignment = fit_regions(
                block.mlp.intermediate, settings.wanted_sparsity, settings.alignment, name
            )
            alignments.append(alignment)
        elif not settings.skip_unsupported:
            raise SpenseError(
                f"{block.name}: found {block.mlp.found}; expected one gated MLP (gate, up, down). "
                "--skip-unsupported leaves such blocks as they are"
            )
    projections = {block.mlp.projections for block in model.blocks if isinstance(block.mlp, Glu)}
    if len(projections) > 1:
        raise SpenseError(f"{settings.model}: its MLPs name their projections differently: {projections}")
    if settings.wanted_dense_first:
        moved = with_dense_first(regions, min(alignments))
        if moved is None and settings.dense_first:
            raise SpenseError(
                f"--dense-first: the other {len(regions) - 1} MLPs cannot take over the first one's sparsity; expected "
                f"room in them, and so many that it adds at most {_MOST_MORE:.0%} to theirs"
            )
        regions = moved or regions
    return regions, min(alignments)


def mean_sparsity(regions: Iterable[Regions]) -> float:
    """Share of zeros in the weights of several MLPs of one width."""
    every = list(regions)
    return sum(each.sparse for each in every) / sum(each.intermediate for each in every) / 2


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
