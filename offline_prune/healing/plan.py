"""What a run of `heal` will need, worked out from shapes before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import nn

from offline_prune.calibration.generated import Writer, keys_and_values, pieces
from offline_prune.calibration.mixture import GENERATED, shares
from offline_prune.checkpoint.verify import Checkpoint
from offline_prune.healing.loss import COPIES, chunk_tokens
from offline_prune.healing.settings import HealSettings, Optimizer
from offline_prune.healing.training import sequences_at_once
from offline_prune.memory_plan import (
    GIB,
    USABLE,
    free_bytes,
    require_disk_space,
    require_room_to_write,
    usable_host,
)
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import output_head
from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError

#: Bytes of a weight's two moments; in 8 bits with their scales.
_MOMENTS = {Optimizer.ADAMW: 8.0, Optimizer.ADAMW8BIT: 2.1}


@dataclass(frozen=True)
class HealPlan:
    """Bytes that one rank needs on its device, by what they are for.

    Attributes:
        models: weights of teacher and student, and what of a block is there whole while it computes.
        gradients: of the weights that are trained, float32, and of the largest in the model's type.
        optimizer: float32 masters, their moments, which of them are zero.
        activations: what gradients need, of the tokens that pass through together.
        checkpointing: most of them are computed again.
        logits: one chunk's, of both models.
        generation: the whole teacher and its KV cache, before training begins; 0 where it writes no text.
        written_at_once: texts that the teacher then writes together.
        best: the best weights so far, in host memory.
        disk: the checkpoint and two states of training, of all ranks together.
    """

    models: int
    gradients: int
    optimizer: int
    activations: int
    checkpointing: bool
    logits: int
    generation: int
    written_at_once: int
    best: int
    disk: int
    device: torch.device
    ranks: int

    @property
    def on_device(self) -> int:
        training = self.models + self.gradients + self.optimizer + self.activations + self.logits
        return max(training, self.generation) + (self.best if self.device.type == "cpu" else 0)

    def lines(self) -> list[str]:
        """For people, one item a line."""

        def gib(size: int) -> str:
            return f"{size / GIB:.2f} GiB"

        return [
            *([f"{self.ranks} processes; memory of each:"] if self.ranks > 1 else []),
            f"weights of teacher and student: {gib(self.models)}",
            f"gradients: {gib(self.gradients)}; masters and moments: {gib(self.optimizer)}",
            f"activations{', computed again' if self.checkpointing else ''}: {gib(self.activations)}",
            f"logits of one chunk: {gib(self.logits)}",
            *([f"the teacher while it writes text: {gib(self.generation)}"] if self.generation else []),
            f"memory of {self.device} in all: {gib(self.on_device)}",
            f"disk in all: {gib(self.disk)}",
        ]


def heal_plan(
    student: SourceModel,
    checkpoint: Checkpoint,
    trained: dict[str, str],
    settings: HealSettings,
    device: torch.device,
    dtype: torch.dtype,
) -> HealPlan:
    """Works out what this rank needs.

    Args:
        student: opened without weights.
        trained: `weights.trained_names`.

    Raises:
        SpenseError: that is more than there is; says which settings, how many GPUs, or which text would do.
    """
    room = usable_host() if device.type == "cpu" else int(free_bytes(device) * USABLE)
    writer = Writer.of(student, dtype) if GENERATED in settings.sources else None
    sizes = _Sizes(student, checkpoint, trained, device, dtype, room, writer)
    ranks = distributed.size()
    plan = sizes.plan(settings, ranks)
    require_room_to_write(plan.generation, room, device)
    if room < plan.on_device:
        fitting = _fitting(lambda other, count: sizes.plan(other, count).on_device <= room, settings, ranks, device)
        nothing = "neither --batch-tokens, --checkpointing, 8-bit moments nor 8 GPUs would do, nor all of them"
        advice = f"{' | '.join(fitting)} would fit" if fitting else nothing
        raise SpenseError(
            f"{device}: {room / GIB:.2f} GiB of memory usable, training needs {plan.on_device / GIB:.2f} GiB; {advice}"
        )
    require_disk_space(settings.out, plan.disk)
    return plan


def _fitting(
    fits: Callable[[HealSettings, int], bool], settings: HealSettings, ranks: int, device: torch.device
) -> list[str]:
    """What would do, as a person would say it: as few changes as possible, and as few GPUs as do with each of them.

    Args:
        fits: whether there is room for these settings on so many ranks.
    """
    changes: dict[str, dict[str, Any]] = {
        f"--batch-tokens {settings.length}": {"batch_tokens": settings.length},
        "--checkpointing": {"checkpointing": True},
        f"--optimizer {Optimizer.ADAMW8BIT}": {"optimizer": Optimizer.ADAMW8BIT},
    }
    if settings.checkpointing is not False:  # They are computed again already.
        del changes["--checkpointing"]
    more = [count for count in (2, 4, 8) if count > ranks] if device.type == "cuda" else []
    found: list[tuple[str, ...]] = []
    for size in range(len(changes) + 1):
        for names in combinations(changes, size):
            other = replace(settings, **{key: value for name in names for key, value in changes[name].items()})
            count = next((count for count in (ranks, *more) if fits(other, count)), None)
            said = names if count == ranks else (f"{count} GPUs", *names)
            if count and not any({*less} <= {*said} for less in found):
                found.append(said)
    return [" ".join(names) for names in found]


class _Sizes:
    """Of a student, in weights; one GPU's teacher has the same. Room is in bytes; the writer is the teacher, if any."""

    def __init__(
        self,
        student: SourceModel,
        checkpoint: Checkpoint,
        trained: dict[str, str],
        device: torch.device,
        dtype: torch.dtype,
        room: int,
        writer: Writer | None,
    ) -> None:
        self.device, self.itemsize, self.room, self.writer = device, dtype.itemsize, room, writer
        self.text: Any = student.text.config.get_text_config()
        head, embedding = output_head(student), student.text.get_input_embeddings()
        self.vocabulary, self.hidden = head.weight.shape
        self.whole = _count({*head.parameters(), *embedding.parameters()})
        self.split = _count(set(student.text.parameters()) | set(head.parameters())) - self.whole
        modules = [student.module(block.name) for block in student.blocks]
        self.blocks, self.block = len(modules), max(_count(set(module.parameters())) for module in modules)
        parameters = {name: student.skeleton.get_parameter(name).numel() for name in trained}
        self.trained, self.largest = sum(parameters.values()), max(parameters.values())
        self.stored = sum(checkpoint.tensors.nbytes(stored) for stored in trained.values())
        self.checkpoint = sum(header.nbytes for header in checkpoint.tensors.headers.values())
        widest = max(
            (block.mlp.intermediate for block in student.blocks if isinstance(block.mlp, GatedMlp)), default=self.hidden
        )
        heads = getattr(self.text, "num_attention_heads", 1)
        width = getattr(self.text, "head_dim", None) or self.hidden // heads
        kv = keys_and_values(self.text)
        # Of a token in one block: the residual stream, norms with their float32 copies, queries, keys and values
        # before and after rotation, and four tensors of the MLP.
        self.token = (12 * self.hidden + 4 * heads * width + 2 * kv + 4 * widest) * self.itemsize
        self.gradients = 3 * widest * self.itemsize
        # Attention that is no fused kernel keeps its scores, once in float32.
        eager = getattr(self.text, "_attn_implementation", None) == "eager"
        self.scores = heads * (4 + 2 * self.itemsize) if eager else 0

    def plan(self, settings: HealSettings, ranks: int) -> HealPlan:
        if settings.checkpointing is not None:
            return self._plan(settings, ranks, settings.checkpointing)
        plan = self._plan(settings, ranks, False)
        return plan if plan.on_device <= self.room else self._plan(settings, ranks, True)

    def _plan(self, settings: HealSettings, ranks: int, checkpointing: bool) -> HealPlan:
        tokens = sequences_at_once(settings, self.device) * settings.length
        one = tokens * (self.token + self.scores * settings.length)
        kept = self.blocks * tokens * self.hidden * self.itemsize + one if checkpointing else self.blocks * one
        # While a block computes its weights are there whole, and the next one's; then gradients before they are split.
        gathered = 2 * self.block * self.itemsize if ranks > 1 else 0
        unsplit = self.block * (self.itemsize + 4) if ranks > 1 else self.largest * self.itemsize
        share = -(-self.trained // ranks)
        written = shares(settings.sources, settings.samples).get(GENERATED, 0)
        texts, length = pieces(written, settings.length)
        writer = self.writer if written else None
        at_once = writer.at_once(texts, length, self.device, self.room) if writer else 0
        return HealPlan(
            models=2 * ((self.whole + -(-self.split // ranks)) * self.itemsize + gathered),
            gradients=4 * share + unsplit,
            optimizer=int((4 + 1 + _MOMENTS[settings.optimizer]) * share),
            activations=kept + tokens * (self.gradients + 4 * self.hidden * self.itemsize),
            checkpointing=checkpointing,
            logits=4 * COPIES * self.vocabulary * min(tokens, chunk_tokens(self.vocabulary, self.device)),
            generation=writer.bytes(at_once, length) if writer else 0,
            written_at_once=at_once,
            best=-(-self.stored // ranks),
            disk=self.checkpoint + int(2 * self.trained * (4 + _MOMENTS[settings.optimizer])) + 2 * self.stored,
            device=self.device,
            ranks=ranks,
        )


def _count(parameters: set[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
