"""How many intermediate indices of each MLP are sparse and how many dense."""

from __future__ import annotations

from offline_prune.glu import Glu
from offline_prune.model import SourceModel
from offline_prune.settings import PruneSettings, fit_regions
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions


def model_regions(model: SourceModel, settings: PruneSettings) -> tuple[dict[str, Regions], int]:
    """The regions of every MLP that will be pruned, by module name, and their common alignment.

    Raises:
        SpenseError: a block without a gated MLP that may not be skipped, none with one, or sizes that do not fit.
    """
    regions: dict[str, Regions] = {}
    alignments = []
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
    if not regions:
        raise SpenseError(f"{settings.model}: no block has a gated MLP, so there is nothing to prune")
    projections = {block.mlp.projections for block in model.blocks if isinstance(block.mlp, Glu)}
    if len(projections) > 1:
        raise SpenseError(f"{settings.model}: its MLPs name their projections differently: {projections}")
    return regions, min(alignments)
