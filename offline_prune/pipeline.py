"""The order of work: model → calibrate → select → prune → quantize → checkpoint, block by block."""

from __future__ import annotations

import re
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import MappingProxyType
from typing import cast

import torch
from torch import nn

from offline_prune.activations import Energy, Hessian, Stream
from offline_prune.calibrate import calibration_tokens
from offline_prune.checkpoint import CheckpointWriter, refuse_filled, stored_form
from offline_prune.glu import Glu, Unsupported
from offline_prune.mlp import Pruned, dense_order, prune_down, prune_gate_up
from offline_prune.model import Block, SourceModel
from offline_prune.plan import memory_plan, require_disk_space
from offline_prune.quantize import channel_scales, round_to_fp8
from offline_prune.report import FILE, PICTURE, LayerReport, Report, projection_report
from offline_prune.select import selection_hash
from offline_prune.settings import PruneSettings, fit_regions
from vllm_spense.errors import SpenseError
from vllm_spense.format import Annotation, Calibration, Regions

#: Called after each block with (blocks done, blocks in all, name of the block).
Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


def prune(settings: PruneSettings, progress: Progress = lambda *_: None, say: Say = lambda _: None) -> Report:
    """Prunes a model and writes the checkpoint.

    Args:
        settings: what to do.
        progress: told about every finished block.
        say: told what a person should know, a line at a time: the plan, warnings.

    Returns:
        The report that also lies beside the checkpoint.

    Raises:
        SpenseError: bad input of any kind; nothing is left behind in `settings.out`.
    """
    refuse_filled(settings.out, settings.overwrite)
    device = pick_device(settings.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return _Run(SourceModel(settings.model), settings, device, dtype, progress, say).run()


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU if there is one.

    Raises:
        SpenseError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind == "cuda" and (not index or index.isdigit()):
        if int(index or 0) < torch.cuda.device_count():
            return torch.device("cuda", int(index or 0))
        raise SpenseError(f"--device: found {name}, but torch sees {torch.cuda.device_count()} GPUs")
    raise SpenseError(f"--device: found {name}, expected auto, cpu, cuda or cuda:N")


class _Run:
    def __init__(
        self,
        model: SourceModel,
        settings: PruneSettings,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
        say: Say,
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = device
        self.dtype = dtype
        self.progress = progress
        self.say = say
        self.stages: defaultdict[str, float] = defaultdict(float)
        self.regions, self.alignment = self._fit()
        self.quantized = set(self._quantized_linears())
        self.report = Report(
            model=settings.model,
            settings={**asdict(settings), "out": str(settings.out), "alignment": self.alignment},
            mlp_sparsity=next(iter(self.regions.values())).mlp_sparsity,
            skipped={block.name: block.mlp.found for block in model.blocks if isinstance(block.mlp, Unsupported)},
        )

    def run(self) -> Report:
        start = time.perf_counter()
        plan = memory_plan(self.model, self.settings, self.dtype)
        for line in plan.lines(self.device):
            self.say(line)
        require_disk_space(self.settings.out, plan)
        with self._stage("calibration text"):
            tokens = calibration_tokens(
                self.settings.calibration,
                self.model.tokenizer,
                self.settings.samples,
                self.settings.length,
                self.settings.seed,
            )
        with CheckpointWriter(self.settings.out, self.settings.overwrite) as writer:
            with self._stage("forward"):
                stream = Stream(self.model, tokens, self.device, self.dtype, self.settings.batch_tokens)
            self._copy_outside_blocks(writer)
            for index, block in enumerate(self.model.blocks):
                self._block(index, block, stream, writer)
                self.progress(index + 1, len(self.model.blocks), block.name)
            with self._stage("write"):
                writer.copy_companions(self.model.folder)
                ignore = self._ignored() if self.settings.quantize == "fp8" else None
                writer.write_config(self.model.config_json, self._annotation(), ignore)
            self.report.stages = dict(self.stages)
            self.report.seconds = time.perf_counter() - start
            self.report.peak_host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            writer.write_json(FILE, self.report.to_dict())
            self.report.draw(writer.path(PICTURE))
        return self.report

    def _fit(self) -> tuple[dict[str, Regions], int]:
        """The regions of every MLP that will be pruned, by module name, and their common alignment."""
        regions: dict[str, Regions] = {}
        alignments = []
        for block in self.model.blocks:
            if isinstance(block.mlp, Glu):
                name = f"{block.name}.{block.mlp.path}"
                regions[name], alignment = fit_regions(
                    block.mlp.intermediate, self.settings.wanted_sparsity, self.settings.alignment, name
                )
                alignments.append(alignment)
            elif not self.settings.skip_unsupported:
                raise SpenseError(
                    f"{block.name}: found {block.mlp.found}; expected one gated MLP (gate, up, down). "
                    "--skip-unsupported leaves such blocks as they are"
                )
        if not regions:
            raise SpenseError(f"{self.settings.model}: no block has a gated MLP, so there is nothing to prune")
        projections = {block.mlp.projections for block in self.model.blocks if isinstance(block.mlp, Glu)}
        if len(projections) > 1:
            raise SpenseError(f"{self.settings.model}: its MLPs name their projections differently: {projections}")
        return regions, min(alignments)

    def _quantized_linears(self) -> Iterator[str]:
        skipped = tuple(f"{block.name}." for block in self.model.blocks if isinstance(block.mlp, Unsupported))
        if self.settings.quantize == "fp8":
            yield from (name for name in self.model.linears() if not (skipped and name.startswith(skipped)))

    def _ignored(self) -> list[str]:
        """What stays unquantized, as compressed-tensors names it: the head, and whole blocks that were skipped."""
        return [self.model.head_name, *(f"re:{re.escape(block)}\\..*" for block in self.report.skipped)]

    def _annotation(self) -> Annotation:
        sizes = list(self.regions.values())
        default = max(set(sizes), key=sizes.count)
        block = next(block for block in self.model.blocks if isinstance(block.mlp, Glu))
        assert isinstance(block.mlp, Glu)
        settings = self.settings
        return Annotation(
            method=settings.method,
            settings=MappingProxyType(settings.recorded()),
            calibration=Calibration(settings.calibration, settings.samples, settings.length, settings.seed),
            alignment=self.alignment,
            projections=block.mlp.projections,
            modules=tuple(self.regions),
            default=default,
            overrides={name: regions for name, regions in self.regions.items() if regions != default},
        )

    def _copy_outside_blocks(self, writer: CheckpointWriter) -> None:
        """Embeddings, norms and the head go over as they are; linear layers out there, if any, to FP8."""
        inside = tuple(f"{block.name}." for block in self.model.blocks)
        with self._stage("write"):
            for name in self.model.tensors:
                layer = name.rpartition(".")[0]
                if name.startswith(inside):
                    continue
                tensor = self.model.tensors.read(name)
                if layer in self.quantized and name.endswith(".weight"):
                    weight, scales = self._rounded(tensor.float())
                    writer.add_layer(layer, stored_form(weight, scales, tensor.dtype))
                else:
                    writer.add(name, tensor)

    def _rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = channel_scales(weight)
        return round_to_fp8(weight, scales), scales

    def _block(self, index: int, block: Block, stream: Stream, writer: CheckpointWriter) -> None:
        with self._stage("load"):
            module = self.model.load(block.name, self.device, self.dtype)
        stored: dict[str, torch.Tensor] = {}
        with self._stage("quantize"), torch.inference_mode():
            self._quantize_unpruned(block, module, stored)
        mlp = block.mlp if isinstance(block.mlp, Glu) else None
        if mlp is not None:
            self.report.layers.append(self._prune_mlp(index, block.name, mlp, module, stream, stored))
        if index + 1 < len(self.model.blocks):
            with self._stage("forward"):
                stream.advance(index, module, block.name, mlp)
        with self._stage("write"):
            prefix = f"{block.name}."
            for name in self.model.tensors:
                if name.startswith(prefix) and name not in stored:
                    stored[name] = self.model.tensors.read(name)
            for name in sorted(stored):
                writer.add(name, stored[name])
        self.model.unload(block.name)

    def _quantize_unpruned(self, block: Block, module: nn.Module, stored: dict[str, torch.Tensor]) -> None:
        """Rounds the block's other linear layers first, so that all Hessians see what inference will see."""
        pruned = f"{block.name}.{block.mlp.path}." if isinstance(block.mlp, Glu) else None
        for name in self.quantized:
            if name.startswith(f"{block.name}.") and not (pruned and name.startswith(pruned)):
                layer = cast(nn.Linear, module.get_submodule(name.removeprefix(f"{block.name}.")))
                weight, scales = self._rounded(layer.weight.float())
                layer.weight.copy_(weight)
                self._store(stored, name, weight, scales)

    def _store(
        self, stored: dict[str, torch.Tensor], layer: str, weight: torch.Tensor, scales: torch.Tensor | None
    ) -> None:
        source = self.model.tensors.dtype(f"{layer}.weight")
        stored.update({f"{layer}.{key}": value for key, value in stored_form(weight, scales, source).items()})

    @torch.inference_mode()
    def _prune_mlp(
        self,
        index: int,
        block_name: str,
        mlp: Glu,
        module: nn.Module,
        stream: Stream,
        stored: dict[str, torch.Tensor],
    ) -> LayerReport:
        start = time.perf_counter()
        settings = self.settings
        name = f"{block_name}.{mlp.path}"
        regions = self.regions[name]
        gate_up_layers, down_layer = mlp.gate_up(module), mlp.down(module)

        hessian_in = Hessian(mlp.hidden, self.device)
        whole_mid = settings.wanted_selection == "sparsegpt-score" or not settings.true_sequential
        before: Hessian | Energy = (Hessian if whole_mid else Energy)(mlp.intermediate, self.device)
        with self._stage("forward"):
            stream.observe(index, module, mlp, hessian_in.add, before.add)
        with self._stage("select"):
            hessian = hessian_in.matrix()
            gate_up = torch.cat([layer.weight for layer in gate_up_layers])
            gate, up = gate_up.chunk(2)
            mid = before.matrix() if isinstance(before, Hessian) else before.diagonal
            energy = mid if settings.wanted_selection == "sparsegpt-score" or mid.ndim == 1 else mid.diagonal()
            order = dense_order(gate, up, down_layer.weight, hessian, energy, regions, settings, name)

        with self._stage("prune"):
            both = torch.cat([order, order + mlp.intermediate])
            pruned = prune_gate_up(gate_up[both], hessian, regions, settings, f"{name}: gate and up")
            self._assign(gate_up_layers, pruned.weight, both)
            down_layer.weight.copy_(down_layer.weight[:, order])

        if settings.true_sequential:
            after = Hessian(mlp.intermediate, self.device)
            with self._stage("forward"):
                stream.observe(index, module, mlp, None, after.add)
            hessian_mid = after.matrix()
        else:
            hessian_mid = mid[order][:, order]
        with self._stage("prune"):
            pruned_down = prune_down(down_layer.weight, hessian_mid, order, regions, settings, f"{name}: down")
            down_layer.weight.copy_(pruned_down.weight)

        with self._stage("quantize"):
            self._store_gate_up(stored, name, mlp, pruned, gate_up_layers)
            self._store(stored, f"{name}.{mlp.projections.down}", pruned_down.weight, pruned_down.scales)
        for damping, what in ((pruned.damping, "gate and up"), (pruned_down.damping, "down")):
            if damping is not None and damping > settings.damping:
                self.say(f"{name}: {what}: the Hessian needed a damping of {damping:g} to be factorized")
        return LayerReport(
            name=name,
            regions=regions,
            dense_indices=selection_hash(order, regions),
            seconds=time.perf_counter() - start,
            gate=projection_report(pruned, slice(0, mlp.intermediate)),
            up=projection_report(pruned, slice(mlp.intermediate, None)),
            down=projection_report(pruned_down),
        )

    def _assign(self, layers: tuple[nn.Linear, ...], weight: torch.Tensor, order: torch.Tensor) -> None:
        """Puts a stacked weight, and the biases in its new row order, back into its layers."""
        heights = [layer.out_features for layer in layers]
        biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        for layer, part in zip(layers, weight.split(heights), strict=True):
            layer.weight.copy_(part)
        if biases:
            moved = torch.cat(biases)[order]
            for bias, part in zip(biases, moved.split(heights), strict=True):
                bias.copy_(part)

    def _store_gate_up(
        self, stored: dict[str, torch.Tensor], name: str, mlp: Glu, pruned: Pruned, layers: tuple[nn.Linear, ...]
    ) -> None:
        names = dict.fromkeys((mlp.projections.gate, mlp.projections.up))
        start = 0
        for projection, layer in zip(names, layers, strict=True):
            rows = slice(start, start + layer.out_features)
            scales = None if pruned.scales is None else pruned.scales[rows]
            self._store(stored, f"{name}.{projection}", pruned.weight[rows], scales)
            if layer.bias is not None:
                bias = f"{name}.{projection}.bias"
                stored[bias] = layer.bias.to(self.model.tensors.dtype(bias)).cpu().clone()
            start = rows.stop

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stages[name] += time.perf_counter() - start
