"""The routed experts of one block on their way through pruning and rounding."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from offline_prune.block_pruning import ENERGY_TOKENS, BlockPruning
from offline_prune.calibration.expert_hessians import ExpertHessians, MidStatistics
from offline_prune.calibration.hessian import Energy, Hessian
from offline_prune.calibration.hidden_states import Stream
from offline_prune.checkpoint.block_state_dict import BlockStateDict
from offline_prune.checkpoint.writer import Say
from offline_prune.methods.dense_selection import selection_hash
from offline_prune.methods.prune_mlp import Pruned, prune_down, select_and_prune
from offline_prune.methods.recipe import Grouping, Layout, Recipe, Selection
from offline_prune.model.experts import Experts, Mixture
from offline_prune.report import PROJECTIONS, LayerReport, ProjectionSums, projection_report, projection_sums
from offline_prune.runtime import deterministic_reduce
from offline_prune.runtime.profiler import stage
from vllm_spense.format import Regions

#: Experts that are pruned in one batch: enough to keep a GPU busy, and what memory a batch may take beside the rest.
_AT_ONCE, _BATCH_BYTES = 32, {"cuda": 2**33, "cpu": 2**28}


def experts_at_once(experts: Experts, recipe: Recipe, device: torch.device) -> int:
    """How many experts of a layer are pruned in one batch. Does not depend on what memory is free, as results might."""
    if recipe.layout is Layout.NONE:
        # Each expert's columns are processed in an order of its own.
        return 1
    return max(1, min(_AT_ONCE, experts.count, _BATCH_BYTES[device.type] // batch_bytes(experts)))


def batch_bytes(experts: Experts) -> int:
    """Of each expert in a batch: H and three matrices of its size, or of down's, and copies of the weights."""
    hidden, inner = experts.hidden, experts.intermediate
    return 4 * 4 * max(hidden, inner) ** 2 + 10 * 4 * 2 * inner * hidden


@dataclass(frozen=True)
class MixturePruning:
    """One block's experts and shared MLPs, and all that decides what becomes of them; nothing of it is tuned.

    Attributes: see `BlockPruning`.
        regions: of the experts and of each shared MLP, by its path inside the block.
    """

    index: int
    block: str
    mixture: Mixture
    module: nn.Module
    stream: Stream
    stored: BlockStateDict
    regions: dict[str, Regions]
    recipe: Recipe
    tokens_at_once: int
    say: Say

    def process(self) -> list[LayerReport]:
        """Prunes the experts and then the shared MLPs, which stand side by side."""
        start = time.perf_counter()
        layers = [replace(self._prune_experts(), seconds=time.perf_counter() - start)]
        for mlp in self.mixture.shared:
            shared = BlockPruning(
                self.index,
                self.block,
                mlp,
                self.module,
                self.stream,
                self.stored,
                self.regions[mlp.path],
                replace(self.recipe, tune_steps=0),
                self.tokens_at_once,
                self.say,
            )
            layers.append(shared.process(None))
        return layers

    @torch.inference_mode()
    def _prune_experts(self) -> LayerReport:
        experts, block, stream = self.mixture.experts, self.module, self.stream
        recipe, regions = self.recipe, self.regions[experts.path]
        name, device = f"{self.block}.{experts.path}", stream.device
        shards = len(deterministic_reduce.local_shards(len(stream.hidden)))

        inputs = ExpertHessians(
            experts.count, experts.hidden, device, stream.tokens, max(experts.hidden, experts.intermediate)
        )
        whole_mid = recipe.selection is Selection.SPARSEGPT_SCORE or not recipe.true_sequential
        before = MidStatistics(Hessian if whole_mid else Energy, experts.count, experts.intermediate, device)
        reads_mid = whole_mid or recipe.selection.reads_activations or recipe.grouping is Grouping.MIXED
        mid = partial(experts.mid, block)

        def show(statistics: MidStatistics, expert: int, x: torch.Tensor, shard: int) -> None:
            statistics.add(expert, mid(expert, x), shard)

        with stage("forward"):
            attended = stream.attend_experts(
                self.index,
                block,
                self.mixture,
                inputs.add,
                partial(show, before) if reads_mid else None,
                None if whole_mid else ENERGY_TOKENS,
            )
            seen = inputs.seen()
            if reads_mid:
                mids = before.results(inputs.sample, mid, shards)
            else:
                mids = [torch.ones(experts.intermediate, device=device) for _ in range(experts.count)]
        hessians = inputs.matrices(seen, shards)

        sums: dict[str, list[ProjectionSums]] = {part: [] for part in PROJECTIONS}
        rows = {"gate": slice(0, experts.intermediate), "up": slice(experts.intermediate, None)}
        orders: list[torch.Tensor] = []
        at_once = experts_at_once(experts, recipe, device)
        batches = [range(first, min(first + at_once, experts.count)) for first in range(0, experts.count, at_once)]
        for batch in batches:
            gate_ups, downs = (torch.stack(weights) for weights in zip(*map(self._weights, batch), strict=True))
            hessian, of_mid = _taken(hessians, batch), torch.stack(mids[batch.start : batch.stop])
            names = [f"{name}.{expert}" for expert in batch]
            found, their_orders = select_and_prune(gate_ups, downs, hessian, of_mid, regions, recipe, names)
            del gate_ups, downs, hessian
            for expert, order, pruned in zip(batch, their_orders, found.each(), strict=True):
                _, down = experts.parameters(block, expert)
                down.copy_(down[:, order])
                with stage("quantize"):
                    self.stored.put_expert(experts, block, expert, {"gate_up": (pruned.weight, pruned.scales)})
                self._say_damping(f"{name}.{expert}: gate and up", pruned)
                for part, of_part in rows.items():
                    sums[part].append(projection_sums(pruned, of_part))
                orders.append(order)
            del found

        if recipe.true_sequential:
            after = MidStatistics(Hessian, experts.count, experts.intermediate, device)
            with stage("forward"):
                stream.observe_experts(attended, partial(show, after))
                mids = after.results(inputs.sample, mid, shards)
        else:
            mids = [matrix[order][:, order] for matrix, order in zip(mids, orders, strict=True)]
        for batch in batches:
            names = [f"{name}.{expert}: down" for expert in batch]
            with stage("prune"):
                downs = torch.stack([experts.parameters(block, expert)[1] for expert in batch])
                found = prune_down(downs, _taken(mids, batch), orders[batch[0]], regions, recipe, names)
            for expert, what, pruned in zip(batch, names, found.each(), strict=True):
                with stage("quantize"):
                    self.stored.put_expert(experts, block, expert, {"down": (pruned.weight, pruned.scales)})
                self._say_damping(what, pruned)
                sums["down"].append(projection_sums(pruned))
        self.stored.permutations[experts.stored] = torch.stack(orders).to("cpu", torch.int32)
        chosen = " ".join(selection_hash(order, regions) for order in orders)
        return LayerReport(
            name=name,
            regions=regions,
            dense_indices=hashlib.sha256(chosen.encode()).hexdigest()[:16],
            seconds=0.0,
            gate=projection_report(sums["gate"]),
            up=projection_report(sums["up"]),
            down=projection_report(sums["down"]),
            tokens=seen,
        )

    def _weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up (2·I, H), and down (H, I), as they are now."""
        gate_up, down = self.mixture.experts.parameters(self.module, expert)
        return torch.cat(gate_up), down

    def _say_damping(self, what: str, pruned: Pruned) -> None:
        if pruned.damping is not None and pruned.damping > self.recipe.damping:
            self.say(f"{what}: the Hessian needed a damping of {pruned.damping:g} to be factorized")


def _taken(matrices: list[torch.Tensor], batch: range) -> torch.Tensor:
    """The first of a list, one for each of a batch, as one tensor; the list lets them go."""
    found = torch.stack(matrices[: len(batch)])
    del matrices[: len(batch)]
    return found
