"""The hidden states of the calibration text, between two blocks and after a block's attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from offline_prune.calibration import recording
from offline_prune.model.block_forward import Enough, Observer, Split, find_split, watch
from offline_prune.model.experts import Mixture, Mlp
from offline_prune.model.fused_ops import Elementwise, find_elementwise
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.loading import SourceModel
from offline_prune.runtime import deterministic_reduce, distributed
from offline_prune.runtime.activation_store import Place, allocate
from offline_prune.runtime.profiler import stage
from vllm_spense.errors import SpenseError

#: Is shown inputs (tokens, K) and which of this rank's shards of the text they are of.
ShardObserver = Callable[[torch.Tensor, int], None]
#: Is shown the number of an expert, the inputs (tokens, H) routed to it, and their shard.
ExpertObserver = Callable[[int, torch.Tensor, int], None]
#: Runs the block on a batch of a shard and shows observers, by the submodules' names, the inputs of these.
_Visit = Callable[[int, slice, dict[str, Observer]], None]


@dataclass(frozen=True)
class Attended:
    """A block whose attention the hidden states have passed: `Stream.attend` returns it, `Stream.observe` takes it."""

    index: int
    block: nn.Module
    mlp: Mlp
    split: Split | None


class Stream:
    """The hidden states of this rank's calibration sequences, and how to call the blocks.

    One buffer holds them and is overwritten as they move on: while a block is worked on, its input becomes the
    residual stream after the block's attention, and that becomes its output.

    Args:
        model: its embeddings are loaded for the duration of the call.
        tokens: int64 (samples, length).
        dtype: of the hidden states.
        batch_tokens: about how many tokens go through a block at once.
        place: where the buffer is.
        folder: for the file, if there is one; the file has no name any more once this returns.
        images: of the sequences that begin with images, what the whole model is run on in place of their tokens.
    """

    def __init__(
        self,
        model: SourceModel,
        tokens: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
        batch_tokens: int,
        place: Place = Place.DEVICE,
        folder: Path | None = None,
        images: recording.ImageInputs = MappingProxyType({}),
    ) -> None:
        self.device = device
        samples, length = tokens.shape
        at_once = max(1, batch_tokens // length)
        self._images = frozenset(images)
        self._shards = [_batches(shard, at_once, self._images) for shard in deterministic_reduce.local_shards(samples)]
        self._batches = [batch for shard in self._shards for batch in shard]
        self._mlps = [block.mlp for block in model.blocks]
        self._splits: dict[Hashable, Split | None] = {}
        self._elementwise: dict[int, Elementwise] = {}
        self._split: Split | None = None
        self._attended = False
        self._at = 0

        def room(width: int) -> torch.Tensor:
            return allocate((samples, length, width), dtype, device, place, folder)

        with stage("forward"):
            self.hidden, self._arguments = recording.record(model, tokens, self._batches, device, dtype, room, images)

    def arguments(self, index: int, sequences: slice) -> dict[str, Any]:
        """What a block is called with beside the hidden states of some sequences."""
        return self._arguments.of(index, sequences)

    def unit_arguments(self, index: int, chosen: torch.Tensor) -> dict[str, Any]:
        """What a block is called with beside some of its `units`, int64 (n,)."""
        if self._split is None and self._images:
            (sequence,) = chosen.tolist()
            return self.arguments(index, slice(sequence, sequence + 1))
        return self._arguments.of_units(index, chosen, self.units)

    def attend(
        self,
        index: int,
        block: nn.Module,
        mlp: GatedMlp,
        on_input: ShardObserver | None = None,
        on_mid: ShardObserver | None = None,
        mid_tokens: int | None = None,
    ) -> Attended:
        """Takes the hidden states through a block's attention, once, and shows observers what an MLP sees.

        Args:
            on_input: is shown the inputs of the block's MLP, (tokens, H).
            on_mid: is shown the intermediate activations, (tokens, I).
            mid_tokens: of about this many tokens of all ranks only, evenly spread; None for all.
        """
        entrance, exit_ = f"{mlp.path}.{mlp.projections.gate}", f"{mlp.path}.{mlp.projections.down}"
        shown = self._shown(mid_tokens) if on_mid else set()

        def visit(shard: int, batch: slice, observers: dict[str, Observer]) -> None:
            if on_input:
                observers[entrance] = _flat(on_input, shard)
            if on_mid and batch.start in shown:
                observers[exit_] = _flat(on_mid, shard)
            last = exit_ if batch.start in shown else entrance
            watch(block, self._get(batch), self.arguments(index, batch), observers, last)

        return self._attend(index, block, mlp, visit)

    def attend_experts(
        self,
        index: int,
        block: nn.Module,
        mixture: Mixture,
        on_expert: ExpertObserver | None = None,
        on_some: ExpertObserver | None = None,
        some_tokens: int | None = None,
    ) -> Attended:
        """As `attend`, for a block with routed experts, which its own router is watched at.

        Args:
            on_some: as `on_expert`, of about `some_tokens` tokens of all ranks only; None for all.
        """
        shown = self._shown(some_tokens) if on_some else set()

        def visit(shard: int, batch: slice, observers: dict[str, Observer]) -> None:
            def show(expert: int, inputs: torch.Tensor) -> None:
                if on_expert:
                    on_expert(expert, inputs, shard)
                if on_some and batch.start in shown:
                    on_some(expert, inputs, shard)

            self._watch_experts(index, block, mixture, batch, observers, show)

        return self._attend(index, block, mixture, visit)

    def observe_experts(self, attended: Attended, on_expert: ExpertObserver) -> None:
        """Shows an observer what the experts of a block are routed, as `attend_experts` does."""
        index, block, mixture = attended.index, attended.block, attended.mlp
        assert isinstance(mixture, Mixture)
        assert attended.split is self._split, "the hidden states have moved on"
        with self._with_kernels(index, block), self.entered(block):
            for shard, batches in enumerate(self._shards):
                for batch in batches:

                    def show(expert: int, inputs: torch.Tensor, shard: int = shard) -> None:
                        on_expert(expert, inputs, shard)

                    self._watch_experts(index, block, mixture, batch, {}, show)

    def _watch_experts(
        self,
        index: int,
        block: nn.Module,
        mixture: Mixture,
        batch: slice,
        observers: dict[str, Observer],
        show: Callable[[int, torch.Tensor], None],
    ) -> None:
        def arrived() -> None:
            raise Enough

        with mixture.experts.watched(block, show, arrived):
            watch(block, self._get(batch), self.arguments(index, batch), observers, None)

    def _attend(self, index: int, block: nn.Module, mlp: Mlp, visit: _Visit) -> Attended:
        """Visits all batches. The first time, the hidden states move on to after the attention."""
        self._arrive(index)
        with self._with_kernels(index, block):
            if self._attended:
                with self.entered(block):
                    for shard, batches in enumerate(self._shards):
                        for batch in batches:
                            visit(shard, batch, {})
                return Attended(index, block, mlp, self._split)
            kind = _kind(block)
            if kind not in self._splits:
                first = self._batches[0]
                self._splits[kind] = find_split(block, mlp, self._get(first), self.arguments(index, first))
            self._split = self._splits[kind]
            for shard, batches in enumerate(self._shards):
                for batch in batches:
                    arrived: list[torch.Tensor] = []
                    visit(shard, batch, {self._split.point: arrived.append} if self._split else {})
                    if self._split:
                        self._put(batch, arrived[0])
        self._attended = True
        return Attended(index, block, mlp, self._split)

    def observe(self, attended: Attended, on_mid: ShardObserver) -> None:
        """Shows an observer the intermediate activations, (tokens, I), of a block."""
        index, block, mlp = attended.index, attended.block, attended.mlp
        assert isinstance(mlp, GatedMlp)
        assert attended.split is self._split, "the hidden states have moved on"
        exit_ = f"{mlp.path}.{mlp.projections.down}"
        with self._with_kernels(index, block), self.entered(block):
            for shard, batches in enumerate(self._shards):
                for batch in batches:
                    kwargs = self.arguments(index, batch)
                    watch(block, self._get(batch), kwargs, {exit_: _flat(on_mid, shard)}, exit_)

    def advance(
        self, index: int, block: nn.Module, name: str, observers: Mapping[str, ShardObserver] = MappingProxyType({})
    ) -> None:
        """Replaces the hidden states by the block's outputs, from after its attention if `attend` went there.

        Args:
            name: the block's, for errors.
            observers: submodule → is shown its inputs, (tokens, K).

        Raises:
            SpenseError: an output is not finite.
        """
        self._arrive(index)
        broken = torch.zeros((), dtype=torch.int32, device=self.device)
        with self._with_kernels(index, block), self.entered(block):
            for shard, batches in enumerate(self._shards):
                flat = {submodule: _flat(observer, shard) for submodule, observer in observers.items()}
                for batch in batches:
                    output = watch(block, self._get(batch), self.arguments(index, batch), flat, None)
                    assert output is not None
                    # Whatever is not finite makes the sum so, and that is read once.
                    broken += ~torch.isfinite(output.sum(dtype=torch.float32))
                    self._put(batch, output)
        self._split, self._attended = None, False
        distributed.all_reduce(broken)
        if broken.item():
            raise SpenseError(f"{name}: its output on the text is not finite")

    def _with_kernels(self, index: int, block: nn.Module) -> AbstractContextManager[None]:
        """On a GPU the block runs inside with one kernel for each elementwise piece that is found to be the same."""
        if self.device.type != "cuda":
            return nullcontext()
        if index not in self._elementwise:
            self._elementwise[index] = find_elementwise(block, self._mlps[index])
        return self._elementwise[index].replaced(block)

    @contextmanager
    def entered(self, block: nn.Module) -> Iterator[None]:
        """Inside, the block is entered where the hidden states are: after its attention if `attend` was there."""
        if self._split is None:
            yield
        else:
            with self._split.skipping(block):
                yield

    def units(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (samples, length, H) in units that the block as it is entered now can take each on its own.

        Returns:
            A view: (tokens, 1, H) after the attention, else the sequences as they are.
        """
        return hidden if self._split is None else hidden.flatten(0, 1).unsqueeze(1)

    def units_at_once(self, tokens: int) -> int:
        """How many `units` of about so many tokens in all can go through the block together.

        A whole sequence that begins with images has masks and positions of its own.
        """
        if self._split is not None:
            return max(1, tokens)
        return 1 if self._images else max(1, tokens // self.hidden.shape[1])

    def packed(self, hidden: torch.Tensor) -> torch.Tensor:
        """A block's output as `hidden` has it."""
        return recording.packed(hidden, self._arguments.streams)

    def unpacked(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `hidden` has as a block takes it."""
        return recording.unpacked(hidden, self._arguments.streams)

    def _arrive(self, index: int) -> None:
        """Adds what the model itself adds to the hidden states in front of a block."""
        if self._at != index:
            self._at = index
            for sequence in sorted(self._images):
                if (index, sequence) in self._arguments.added:
                    rows, values = self._arguments.added.pop((index, sequence))
                    place = self.hidden.device
                    self.hidden[sequence].index_add_(0, rows.to(place), values.to(place))

    def _get(self, batch: slice) -> torch.Tensor:
        return self.unpacked(self.hidden[batch].to(self.device, non_blocking=True))

    def _put(self, batch: slice, hidden: torch.Tensor) -> None:
        self.hidden[batch].copy_(self.packed(hidden), non_blocking=True)

    @property
    def tokens(self) -> int:
        """Of all ranks together."""
        samples, length = self.hidden.shape[:2]
        return distributed.size() * samples * length

    def _shown(self, tokens: int | None) -> set[int]:
        """Beginnings of so many batches, evenly spread over each shard, that all shards show about so many tokens."""
        found = []
        for batches in self._shards:
            wanted = len(batches) if tokens is None else math.ceil(len(batches) * min(1.0, tokens / self.tokens))
            found += [batches[i * len(batches) // wanted].start for i in range(wanted)]
        return set(found)


def _batches(shard: range, at_once: int, alone: frozenset[int]) -> list[slice]:
    """A shard's sequences in groups of so many, some alone."""
    batches: list[slice] = []
    for i in shard:
        if batches and alone.isdisjoint((i, batches[-1].start)) and i - batches[-1].start < at_once:
            batches[-1] = slice(batches[-1].start, i + 1)
        else:
            batches.append(slice(i, i + 1))
    return batches


def _flat(observer: ShardObserver, shard: int) -> Observer:
    return lambda inputs: observer(inputs.flatten(0, -2), shard)


def _kind(block: nn.Module) -> Hashable:
    """What blocks have in common that can be entered at the same point: their children, by name and class.

    A hybrid's blocks are of one class, and some have attention where others have a convolution or a state space.
    """
    return type(block), tuple((name, type(child)) for name, child in block.named_children())
