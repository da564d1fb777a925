"""Which MLPs are pruned, and one block's on its way through pruning, tuning and rounding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from offline_prune.calibration.hessian import Energy, Hessian
from offline_prune.calibration.hidden_states import Stream
from offline_prune.calibration.sensitivity import some_of, weights_of_channels
from offline_prune.checkpoint.block_state_dict import BlockStateDict
from offline_prune.checkpoint.writer import Say
from offline_prune.methods.block_finetune import BlockTuning, TuningReport
from offline_prune.methods.dense_selection import selection_hash
from offline_prune.methods.prune_mlp import (
    Pruned,
    prune_down,
    round_down,
    round_gate_up,
    select_and_prune,
)
from offline_prune.methods.recipe import Grouping, Quantize, Recipe, Selection
from offline_prune.methods.sparsegpt import InverseFactor
from offline_prune.model.experts import Mixture
from offline_prune.model.gated_mlp import GatedMlp, Unsupported, linear
from offline_prune.model.loading import SourceModel
from offline_prune.report import LayerReport, ProjectionReport, projection_report, projection_sums
from offline_prune.runtime import distributed
from offline_prune.runtime.profiler import stage
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions

#: Tokens from which SpenseGPT+ takes the diagonal of down's Hessian. All of a long text would cost one more pass
#: through gate and up, and choose nearly the same indices: docs/notes/tables.md has by how much.
ENERGY_TOKENS = 2**18


@dataclass(frozen=True)
class _Solved:
    """What the column loops of one MLP went by.

    Attributes:
        gate_up, down: factors of the Hessians; None for solvers without one.
        order: int64 (I,), position in the file → original index.
    """

    gate_up: InverseFactor | None
    down: InverseFactor | None
    order: torch.Tensor


@dataclass(frozen=True)
class BlockPruning:
    """One block's MLP and all that decides what becomes of it.

    Attributes:
        index, block: number and name of the decoder block.
        mlp: where its MLP is.
        module: the block, with its weights loaded.
        stream: the pruned model's hidden states in front of the block.
        stored: takes the results.
        tokens_at_once: about how many go through the block together while it is tuned.
        say: told about Hessians that needed more damping.
        channels: weights of the channels of the block's output while it is tuned: see `tune`.
    """

    index: int
    block: str
    mlp: GatedMlp
    module: nn.Module
    stream: Stream
    stored: BlockStateDict
    regions: Regions
    recipe: Recipe
    tokens_at_once: int
    say: Say
    channels: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.block}.{self.mlp.path}"

    def process(self, dense: Stream | None) -> LayerReport:
        """Prunes, and if asked to tunes and then rounds.

        Args:
            dense: the dense model's hidden states after this block, where it is tuned.
        """
        start = time.perf_counter()
        if not (dense and self.recipe.tune_steps):
            return replace(self._prune(self.recipe)[0], seconds=time.perf_counter() - start)
        parameters = self.module.get_submodule(self.mlp.path).named_parameters(prefix=self.mlp.path)
        original = {name: parameter.detach().clone() for name, parameter in parameters}
        last = self.recipe.rounds_tuned
        layer, solved = self._prune(replace(self.recipe, quantize=Quantize.NONE) if last else self.recipe)
        layer = replace(layer, tuning=self._tune(original, dense))
        if last:
            self._round(solved)
        return replace(layer, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def _prune(self, recipe: Recipe) -> tuple[LayerReport, _Solved]:
        """Selects and prunes."""
        mlp, name, regions = self.mlp, self.name, self.regions
        gate_up_layers, down_layer = mlp.gate_up(self.module), mlp.down(self.module)
        device = self.stream.device

        hessian_in = Hessian(mlp.hidden, device)
        whole_mid = recipe.selection is Selection.SPARSEGPT_SCORE or not recipe.true_sequential
        before: Hessian | Energy = (Hessian if whole_mid else Energy)(mlp.intermediate, device)
        reads_mid = recipe.selection.reads_activations or recipe.grouping is Grouping.MIXED
        on_mid = before.add if whole_mid or reads_mid else None
        with stage("forward"):
            attended = self.stream.attend(
                self.index, self.module, mlp, hessian_in.add, on_mid, None if whole_mid else ENERGY_TOKENS
            )
        hessian = hessian_in.matrix()
        mid = before.matrix() if isinstance(before, Hessian) else before.diagonal()
        gate_up = torch.cat([layer.weight for layer in gate_up_layers])
        pruned, order = select_and_prune(gate_up, down_layer.weight, hessian, mid, regions, recipe, name)
        with stage("prune"):
            down_layer.weight.copy_(down_layer.weight[:, order])
        del gate_up, hessian_in, hessian
        with stage("quantize"):
            both = torch.cat([order, order + mlp.intermediate])
            self.stored.put_gate_up(name, mlp, gate_up_layers, pruned.weight, pruned.scales, both)
        gate_report = self._report(f"{name}: gate", pruned, slice(0, mlp.intermediate))
        up_report = self._report(f"{name}: up", pruned, slice(mlp.intermediate, None))
        # Float32 copies of the weights make room for down's Hessian.
        factor = pruned.factor
        del pruned

        if recipe.true_sequential:
            after = Hessian(mlp.intermediate, device)
            with stage("forward"):
                self.stream.observe(attended, after.add)
            mid = after.matrix()
        else:
            mid = mid[order][:, order]
        with stage("prune"):
            pruned = prune_down(down_layer.weight, mid, order, regions, recipe, f"{name}: down")
        with stage("quantize"):
            self.stored.put(f"{name}.{mlp.projections.down}", down_layer, pruned.weight, pruned.scales)
        # As late as this: it waits for the GPU.
        self.stored.permutations[name] = order.to("cpu", torch.int32)
        layer = LayerReport(
            name=name,
            regions=regions,
            dense_indices=selection_hash(order, regions),
            seconds=0.0,
            gate=gate_report,
            up=up_report,
            down=self._report(f"{name}: down", pruned),
        )
        return layer, _Solved(factor, pruned.factor, order)

    def _tune(self, original: dict[str, torch.Tensor], dense: Stream) -> TuningReport:
        """Tunes towards the dense model.

        Args:
            original: copies of the dense MLP's parameters, by name inside the block.
        """
        layers = [f"{self.mlp.path}.{projection}" for projection in self.mlp.projections.to_dict().values()]
        scales = {name: self.stored.scales(f"{self.block}.{name}", self.stream.device) for name in layers}
        with stage("tune"):
            weights, report = BlockTuning(
                self.module,
                scales,
                original,
                self.index,
                self.stream,
                dense,
                self.recipe,
                self.tokens_at_once,
                None if self.channels is None else self.channels.to(self.stream.device),
            ).process()
            with torch.inference_mode():
                for name, weight in weights.items():
                    self.stored.put(f"{self.block}.{name}", linear(self.module, name), weight, scales[name])
        return report

    @torch.inference_mode()
    def _round(self, solved: _Solved) -> None:
        """Sends the tuned weights through the column loops once more, for their rounding.

        Where compensation makes more of a zero than tuning has left of a kept weight, the two change places. Tuning
        has changed the inputs of down, but not so much that their Hessian would have to be collected anew.
        """
        assert solved.gate_up is not None
        assert solved.down is not None
        gate_up_layers, down_layer = self.mlp.gate_up(self.module), self.mlp.down(self.module)
        with stage("prune"):
            gate_up = torch.cat([layer.weight for layer in gate_up_layers])
            rounded = round_gate_up(gate_up, solved.gate_up, self.regions, self.recipe)
        with stage("quantize"):
            as_it_is = torch.arange(len(gate_up), device=gate_up.device)
            self.stored.put_gate_up(self.name, self.mlp, gate_up_layers, *rounded, as_it_is)
        with stage("prune"):
            rounded = round_down(down_layer.weight, solved.down, solved.order, self.regions, self.recipe)
        with stage("quantize"):
            self.stored.put(f"{self.name}.{self.mlp.projections.down}", down_layer, *rounded)

    def _report(self, what: str, pruned: Pruned, rows: slice = slice(None)) -> ProjectionReport:
        if pruned.damping is not None and pruned.damping > self.recipe.damping:
            self.say(f"{what}: the Hessian needed a damping of {pruned.damping:g} to be factorized")
        return projection_report([projection_sums(pruned, rows)])


def weighs_channels(model: SourceModel, settings: PruneSettings) -> bool:
    """Whether a block is tuned by what it does to the model's predictions; those with experts are not tuned."""
    return settings.recipe.weighs_channels and any(isinstance(block.mlp, GatedMlp) for block in model.blocks)


def tuned_channels(
    model: SourceModel,
    settings: PruneSettings,
    tokens: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    say: Say,
) -> Sequence[torch.Tensor | None]:
    """Of each block the weights of its output's channels while it is tuned; None where all count alike.

    They are in host memory: what a rank is sent keeps the device that it was on, which is the first rank's.

    Args:
        tokens: the calibration text, the same on all ranks, int64 (samples, length).
        say: told where a model has no predictions to weigh them by.
    """
    nothing = [None] * len(model.blocks)
    if not weighs_channels(model, settings):
        return nothing
    if model.head_name is None:
        say("tuning weighs all channels alike, because the model has no output head")
        return nothing
    found = weights_of_channels(model, some_of(tokens), device, dtype, settings.seed)
    return distributed.broadcast_from_first(lambda: found)


def intermediate_sizes(model: SourceModel, settings: PruneSettings) -> dict[str, int]:
    """MLP that will be pruned → its intermediate size; all routed experts of a block are one entry.

    Raises:
        SpenseError: a block without a gated MLP that may not be skipped, none with one, or MLPs whose projections have
            different names.
    """
    if all(isinstance(block.mlp, Unsupported) for block in model.blocks):
        reasons = [(block.name, block.mlp) for block in model.blocks if isinstance(block.mlp, Unsupported)]
        name, reason = next((each for each in reasons if each[1].shared), reasons[0])
        owned = " of its own" if reason.shared else ""
        raise SpenseError(
            f"{settings.model}: no block has a gated MLP (gate, up, down){owned}, so there is nothing to prune; "
            f"{name}: found {reason.found}"
        )
    sizes = {}
    for block in model.blocks:
        if not isinstance(block.mlp, Unsupported):
            if isinstance(block.mlp, Mixture):
                sizes[f"{block.name}.{block.mlp.path}"] = block.mlp.experts.intermediate
            sizes |= {f"{block.name}.{mlp.path}": mlp.intermediate for mlp in block.mlps}
        elif not settings.skip_unsupported:
            raise SpenseError(
                f"{block.name}: found {block.mlp.found}; expected one gated MLP (gate, up, down). "
                "--skip-unsupported leaves such blocks as they are"
            )
    of_mlps = {mlp.projections for block in model.blocks for mlp in block.mlps}
    of_experts = {experts.projections for experts in model.experts.values()}
    for kind, projections in (("MLPs", of_mlps), ("experts", of_experts)):
        if len(projections) > 1:
            raise SpenseError(f"{settings.model}: its {kind} name their projections differently: {projections}")
    return sizes
