"""The order of work: model → calibrate → select → prune → quantize → checkpoint, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from offline_prune.block_pruning import BlockPruning, intermediate_sizes, tuned_channels
from offline_prune.calibration.context_length import within_context
from offline_prune.calibration.hidden_states import Stream
from offline_prune.calibration.image_rows import captioned_images
from offline_prune.calibration.images import ImagePlan, ImageReader, deal
from offline_prune.calibration.mixture import written_at_most
from offline_prune.calibration.recording import ImageInputs
from offline_prune.calibration.sources import require_sources
from offline_prune.checkpoint.block_state_dict import BlockStateDict
from offline_prune.checkpoint.ignored import ignored
from offline_prune.checkpoint.journal import OUTSIDE_BLOCKS, Journal, Say
from offline_prune.checkpoint.model_card import model_card
from offline_prune.checkpoint.output_folder import OutputFolder, require_apart
from offline_prune.checkpoint.writer import CheckpointWriter, fp8_config, restored
from offline_prune.expert_pruning import MixturePruning
from offline_prune.memory_plan import GIB, MemoryPlan, batch_tokens, memory_plan
from offline_prune.methods.recipe import Quantize
from offline_prune.methods.regions import mean_sparsity, model_regions
from offline_prune.methods.unpruned_fp8 import InputHessians, compensated, nearest
from offline_prune.model.experts import Mixture
from offline_prune.model.gated_mlp import GatedMlp, Unsupported, linear
from offline_prune.model.loading import Block, SourceModel
from offline_prune.report import FILE, PICTURE, UNTUNED, BlockTime, LayerReport, Report
from offline_prune.runtime import deterministic_reduce, distributed
from offline_prune.runtime.circumstances import circumstances
from offline_prune.runtime.device import compute_dtype, pick_device
from offline_prune.runtime.profiler import Profiler
from offline_prune.settings import PruneSettings
from offline_prune.text_sources import CalibrationText, default_sources, shaped_as
from vllm_spense.errors import SpenseError
from vllm_spense.format import Annotation, Calibration, Regions

#: Called after each block with (blocks done, blocks in all, name of the block).
Progress = Callable[[int, int, str], None]

#: Settings that do not change what is written.
_WHERE_AND_HOW = ("model", "out", "device", "activations", "overwrite", "resume", "trust_remote_code")


def prune(
    settings: PruneSettings,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
    tokens: torch.Tensor | None = None,
) -> Report:
    """Prunes a model and writes the checkpoint, together with the other processes if torchrun started several.

    Args:
        settings: what to do.
        progress: told about every finished block.
        say: told what a person should know, a line at a time: the plan, warnings.
        tokens: int64 (samples, length) to calibrate on, the first rank's count; None draws them as the settings say,
            but none longer than the model's context. The settings' samples and length give way to theirs.

    Returns:
        The report that also lies beside the checkpoint.

    Raises:
        SpenseError: bad input of any kind. Parts that were finished before are kept for `resume`.
    """
    device = pick_device(settings.device)
    with distributed.process_group(device), ExitStack() as context:
        given = distributed.broadcast_from_first(lambda: tokens)
        if given is not None:
            settings = shaped_as(given, settings)
        _check_ranks(settings.samples)
        if not distributed.is_first():
            progress, say = (lambda *_: None), (lambda _: None)
        out = OutputFolder(settings.out, settings.overwrite, settings.resume, say)
        distributed.broadcast_from_first(lambda: _take(out, settings, given is None, context))
        model = SourceModel(settings.model, settings.trust_remote_code)
        if given is None:
            wanted = settings.samples, settings.length
            samples, length = within_context(*wanted, model.text.config, "calibration text", say)
            settings = replace(settings, samples=samples, length=length)
        if settings.calibration is None:
            shape = settings.samples, settings.length
            sources = distributed.broadcast_from_first(
                lambda: default_sources(model, given, *shape, written_at_most(shape[1]), device, say)
            )
            settings = replace(settings, calibration=sources)
        return _Run(model, settings, device, compute_dtype(device), out, progress, say).run(given)


def _take(out: OutputFolder, settings: PruneSettings, draws: bool, context: ExitStack) -> None:
    """Keeps other runs away from OUT, and what lacks its text from a model's download."""
    if draws and settings.calibration is not None:
        require_sources(settings.sources)
    if Path(settings.model).is_dir():
        require_apart(Path(settings.model), out.path, "MODEL")
    context.enter_context(out)


def _check_ranks(samples: int) -> None:
    """Raises SpenseError where the calibration text does not divide evenly among the ranks."""
    size = distributed.size()
    distributed.require_power_of_two(deterministic_reduce.MAX_SHARDS)
    if samples % size:
        raise SpenseError(f"--samples: found {samples}, expected a multiple of the number of processes, {size}")


class _Run:
    def __init__(
        self,
        model: SourceModel,
        settings: PruneSettings,
        device: torch.device,
        dtype: torch.dtype,
        out: OutputFolder,
        progress: Progress,
        say: Say,
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = device
        self.dtype = dtype
        self.out = out
        self.progress = progress
        self.say = say
        self.profiler = Profiler(device)
        #: Both where some of the calibration sequences begin with images.
        self.reader = ImageReader.of(model) if settings.calibration_images is not None else None
        self.images: ImagePlan | None = None
        #: Of the dense model, where blocks are tuned towards it or rounded by its inputs.
        self.dense: Stream | None = None
        #: Weights of the channels of each block's output, where tuning has some.
        self.channels: Sequence[torch.Tensor | None] = [None] * len(model.blocks)
        #: Only the first rank has one.
        self.writer: CheckpointWriter | None = None
        self.regions, self.alignment = model_regions(
            intermediate_sizes(model, settings),
            settings.wanted_sparsity,
            settings.alignment,
            settings.wanted_dense_first,
            required=bool(settings.dense_first),
            experts=[f"{name}.{each.path}" for name, each in model.experts.items()],
        )
        self.quantized = set(self._quantized_linears())
        self.report = Report(
            model=settings.model,
            settings={**asdict(settings), "out": str(settings.out), "alignment": self.alignment},
            mlp_sparsity=mean_sparsity(self._every_region()),
            skipped={block.name: block.mlp.found for block in model.blocks if isinstance(block.mlp, Unsupported)},
        )

    def run(self, given: torch.Tensor | None) -> Report:
        start = time.perf_counter()
        with self.profiler.running(), ExitStack() as context:
            text = CalibrationText(self.model, self.settings, given, self.say)
            plan = distributed.broadcast_from_first(
                lambda: memory_plan(self.model, self.settings, self.device, self.dtype, text.written)
            )
            for line in plan.lines():
                self.say(line)
            if self.model.experts and self.settings.recipe.tune_steps:
                self.say(UNTUNED)
            with self.profiler.stage("calibration text"):
                text.draw()
                self.images = distributed.broadcast_from_first(self._images)
            journal = distributed.broadcast_from_first(lambda: self._open(self._identity(text), context))
            self._blocks(text, plan, journal)
            if self.writer:
                self._close(self.writer, plan, start)
        return self.report

    def _open(self, run: dict[str, object], context: ExitStack) -> Journal:
        """Starts the checkpoint; what is finished of it already."""
        writer = CheckpointWriter(self.out, run, self.say)
        self.writer = context.enter_context(writer)
        return writer.journal

    def _close(self, writer: CheckpointWriter, plan: MemoryPlan, start: float) -> None:
        """Adds what is in no block."""
        if writer.complete:
            self.say("all of it was finished by an earlier run")
            return
        self._copy_outside_blocks(writer)
        with self.profiler.stage("write"):
            writer.copy_companions(self.model.folder)
            writer.write_permutations()
            quantization = fp8_config(self._ignored()) if self.settings.quantize is Quantize.FP8 else None
            annotation, source, report = self._annotation(), self.model.folder, self.report
            others = report.card_section(), report.skipped, self.say, self.model.tensors.read_by_transformers
            card = model_card(self.settings.model, source, annotation, quantization is not None, *others)
            writer.write_card(card, source)
            writer.write_config(self.model.config_json, annotation, quantization)
        self._close_report(plan, start)
        writer.write_json(FILE, self.report.to_dict())
        with writer.file(PICTURE) as path:
            self.report.draw(path)

    def _every_region(self) -> list[Regions]:
        """Of every MLP, each expert one."""
        counts = {f"{name}.{each.path}": each.count for name, each in self.model.experts.items()}
        return [regions for name, regions in self.regions.items() for _ in range(counts.get(name, 1))]

    def _images(self) -> ImagePlan | None:
        source, samples, length = self.settings.calibration_images, self.settings.samples, self.settings.length
        if self.reader is None or source is None:
            return None
        found = captioned_images(source, self.settings.seed)
        return deal(found, self.reader.tokens, samples, length, self.settings.wanted_image_share, source, self.say)

    def _stream(self, tokens: torch.Tensor, plan: MemoryPlan, folder: Path) -> Stream:
        """Of this rank's sequences."""
        mine = distributed.local_shard(tokens)
        images: ImageInputs = {}
        if self.images and self.reader:
            images = self.images.inputs(self.reader, mine, distributed.rank() * len(mine))
        at_once = batch_tokens(self.settings, self.device)
        return Stream(self.model, mine, self.device, self.dtype, at_once, plan.place, folder, images)

    def _identity(self, text: CalibrationText) -> dict[str, object]:
        """Whatever decides the result, by name: what a run that is resumed must have in common with this one."""
        settings = {key: value for key, value in self.settings.resolved().items() if key not in _WHERE_AND_HOW}
        return {
            **settings,
            "batch_tokens": batch_tokens(self.settings, self.device),
            "model": self.model.tensors.fingerprint(),
            "calibration tokens": text.fingerprint(),
            **({"calibration image files": self.images.fingerprint()} if self.images else {}),
            **circumstances(self.device, self.dtype),
        }

    def _blocks(self, text: CalibrationText, plan: MemoryPlan, journal: Journal) -> None:
        """Prunes block after block; those that are finished are only passed through."""
        names = [block.name for block in self.model.blocks]
        finished = journal.finished
        if all(self._part(name) in finished for name in names):
            self.report.layers += [layer for name in names for layer in self._finished(name, journal)]
            return
        with self.profiler.stage("calibration text"):
            tokens = text.whole(self.device, self.dtype, plan.written_at_once, self.out, journal)
        with self.profiler.stage("sensitivity"):
            self.channels = tuned_channels(self.model, self.settings, tokens, self.device, self.dtype, self.say)
        with self.profiler.stage("forward"):
            stream = self._stream(tokens, plan, journal.folder)
            self.dense = self._stream(tokens, plan, journal.folder) if self.settings.recipe.follows_dense else None
        for index, block in enumerate(self.model.blocks):
            before, start = dict(self.profiler.seconds), time.perf_counter()
            if self._part(block.name) in finished:
                self._pass_through(index, block, stream, journal)
            else:
                self._block(index, block, stream)
            self.model.unload(block.name)
            stages = {name: seconds - before.get(name, 0.0) for name, seconds in self.profiler.seconds.items()}
            self.report.blocks.append(BlockTime(block.name, time.perf_counter() - start, stages))
            self.progress(index + 1, len(names), block.name)

    def _close_report(self, plan: MemoryPlan, start: float) -> None:
        report = self.report
        report.stages = dict(self.profiler.seconds)
        report.seconds = time.perf_counter() - start
        report.planned_host_gib, report.planned_device_gib = plan.host / GIB, plan.on_device / GIB
        report.peak_host_gib, report.peak_pinned_gib = self.profiler.peak_host / GIB, self.profiler.peak_pinned / GIB
        report.peak_device_gib = self.profiler.peak_device / GIB

    def _quantized_linears(self) -> Iterator[str]:
        left = tuple(f"{block.name}." for block in self.model.blocks if isinstance(block.mlp, Unsupported))
        # A router, and what weighs the output of a shared MLP, decide too much for the few weights that they have.
        left += tuple(f"{name}.{experts.holder}." for name, experts in self.model.experts.items() if experts.holder)
        mlps = tuple(f"{block.name}.{mlp.path}." for block in self.model.blocks for mlp in block.mlps)
        if self.settings.quantize is Quantize.FP8:
            for name in self.model.linears():
                # Whatever transformers makes of other tensors stays as the files have it.
                if f"{name}.weight" in self.model.tensors and (name.startswith(mlps) or not name.startswith(left)):
                    yield name

    def _part(self, block: str) -> str:
        """The checkpoint's part of a block: what its tensors' names in the files begin with."""
        return self.model.tensors.stored(block)

    def _as_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under the names that the files have for them."""
        return {self.model.tensors.stored(name): tensor for name, tensor in tensors.items()}

    def _finished(self, block: str, journal: Journal) -> list[LayerReport]:
        """What an earlier run reported of a block."""
        return [LayerReport.from_dict(layer) for layer in journal.finished[self._part(block)] or ()]

    def _ignored(self) -> list[str]:
        experts = {layer for each in self.model.experts.values() for layer in each.layers()}
        return ignored(self.model, self.quantized, experts)

    def _annotation(self) -> Annotation:
        sizes = list(self.regions.values())
        default = max(set(sizes), key=sizes.count)
        settings, model = self.settings, self.model
        mlps = {f"{block.name}.{mlp.path}": mlp.projections for block in model.blocks for mlp in block.mlps}
        experts = {f"{name}.{each.path}": each for name, each in model.experts.items()}
        of_experts = next((each.projections for each in experts.values()), None)
        of_mlps = next(iter(mlps.values()), of_experts)
        assert of_mlps is not None
        stored = {
            name: experts[name].stored if name in experts else model.tensors.stored(name) for name in self.regions
        }
        recorded = settings.recipe.recorded()
        if settings.calibration_images is not None:
            recorded |= {"calibration_images": settings.calibration_images, "image_share": settings.wanted_image_share}
        return Annotation(
            method=settings.method,
            settings=MappingProxyType(recorded),
            calibration=Calibration(" + ".join(settings.sources), settings.samples, settings.length, settings.seed),
            alignment=self.alignment,
            projections=of_mlps,
            modules=tuple(stored[name] for name in self.regions if name in mlps),
            default=default,
            overrides={stored[name]: regions for name, regions in self.regions.items() if regions != default},
            experts=MappingProxyType({each.stored: each.count for each in experts.values()}),
            expert_projections=of_experts,
        )

    def _copy_outside_blocks(self, writer: CheckpointWriter) -> None:
        """Embeddings, norms and the head go over as they are; linear layers out there, if any, to FP8."""
        if OUTSIDE_BLOCKS in writer.journal.finished:
            return
        inside = tuple(f"{block.name}." for block in self.model.blocks)
        stored = BlockStateDict(self.model.tensors)
        with self.profiler.stage("write"):
            for name in self.model.tensors:
                layer = name.rpartition(".")[0]
                if self.model.tensors.place(name).startswith(inside):
                    continue
                tensor = self.model.tensors.read(name)
                if layer in self.quantized and name.endswith(".weight"):
                    stored.keep(layer, *nearest(tensor.float()))
                else:
                    stored.tensors[name] = tensor
            writer.add(OUTSIDE_BLOCKS, self._as_stored(stored.tensors))

    def _pass_through(self, index: int, block: Block, stream: Stream, journal: Journal) -> None:
        """Takes the hidden states through a block that an earlier run finished, exactly as that run did."""
        if self.dense:
            with self.profiler.stage("load"):
                module = self.model.load(block.name, self.device, self.dtype)
            with self.profiler.stage("forward"):
                self.dense.advance(index, module, block.name)
        with self.profiler.stage("load"):
            stored = self.model.tensors.named(journal.tensors(self._part(block.name)))
            module = self.model.load(block.name, self.device, self.dtype, restored(stored, self.device))
        with self.profiler.stage("forward"):
            self.report.layers += self._finished(block.name, journal)
            if isinstance(block.mlp, GatedMlp):
                stream.attend(index, module, block.mlp)
            elif isinstance(block.mlp, Mixture):
                stream.attend_experts(index, module, block.mlp)
            stream.advance(index, module, block.name)

    def _block(self, index: int, block: Block, stream: Stream) -> None:
        with self.profiler.stage("load"):
            module = self.model.load(block.name, self.device, self.dtype)
        more = index + 1 < len(self.model.blocks)
        if more and self.device.type == "cuda":
            self.model.prefetch(self.model.blocks[index + 1].name, self.device)
        unpruned, hessians = self._unpruned(block), InputHessians(self.device)
        if self.dense:
            observers = hessians.observers(unpruned) if self.settings.recipe.rounds_everywhere else {}
            with self.profiler.stage("forward"):
                self.dense.advance(index, module, block.name, observers)
        stored = BlockStateDict(self.model.tensors)
        with self.profiler.stage("quantize"), torch.inference_mode():
            self._quantize_unpruned(block.name, unpruned, hessians, module, stored)
        layers: list[LayerReport] = []
        at_once = batch_tokens(self.settings, self.device)
        common = self.settings.recipe, at_once, self.say
        if isinstance(block.mlp, GatedMlp):
            regions = self.regions[f"{block.name}.{block.mlp.path}"]
            mine = *common, self.channels[index]
            work = BlockPruning(index, block.name, block.mlp, module, stream, stored, regions, *mine)
            layers = [work.process(self.dense)]
        elif isinstance(block.mlp, Mixture):
            of_each = {path: self.regions[f"{block.name}.{path}"] for path in block.mlp.paths}
            layers = MixturePruning(index, block.name, block.mlp, module, stream, stored, of_each, *common).process()
        self.report.layers += layers
        if more:
            with self.profiler.stage("forward"):
                stream.advance(index, module, block.name)
        if self.writer:
            with self.profiler.stage("write"):
                tensors = self._as_stored(stored.complete(f"{block.name}."))
                permutations = self._as_stored(stored.permutations)
                self.writer.add(
                    self._part(block.name), tensors, [asdict(layer) for layer in layers] or None, permutations
                )

    def _unpruned(self, block: Block) -> list[str]:
        """The linear layers of a block that are only rounded, by their names inside it."""
        inside = [name.removeprefix(f"{block.name}.") for name in self.quantized if name.startswith(f"{block.name}.")]
        pruned = () if isinstance(block.mlp, Unsupported) else tuple(f"{path}." for path in block.mlp.paths)
        return [name for name in inside if not name.startswith(pruned)]

    def _quantize_unpruned(
        self, block_name: str, layers: list[str], hessians: InputHessians, module: nn.Module, stored: BlockStateDict
    ) -> None:
        """Rounds the block's other linear layers first, so that the MLP's Hessians see what inference will see."""
        linears = {name: linear(module, name) for name in layers}
        for group, hessian in hessians.groups():
            weight = torch.cat([linears[name].weight for name in group]).float()
            found = compensated(weight, hessian, self.settings.damping, f"{block_name}.{', '.join(group)}")
            heights = [linears[name].out_features for name in group]
            for name, *rounded in zip(group, *(each.split(heights) for each in found), strict=True):
                stored.put(f"{block_name}.{name}", linears.pop(name), *rounded)
        for name, layer in linears.items():
            stored.put(f"{block_name}.{name}", layer, *nearest(layer.weight.float()))
