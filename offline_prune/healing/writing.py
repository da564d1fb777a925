"""The healed checkpoint: PRUNED with other values in the weights that were trained, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offline_prune.checkpoint.journal import OUTSIDE_BLOCKS, Say
from offline_prune.checkpoint.model_card import model_card
from offline_prune.checkpoint.verify import Checkpoint
from offline_prune.checkpoint.writer import CheckpointWriter
from offline_prune.healing.report import HealReport
from offline_prune.healing.settings import HealSettings
from offline_prune.healing.weights import TrainedWeight
from offline_prune.model.loading import SourceModel
from offline_prune.report import FILE
from vllm_spense.checkpoint_files import read_object
from vllm_spense.format import PERMUTATION, Annotation, Scalar


def write_weights(
    writer: CheckpointWriter | None,
    finished: set[str],
    checkpoint: Checkpoint,
    student: SourceModel,
    weights: list[TrainedWeight],
    best: list[torch.Tensor],
) -> None:
    """Writes block after block; ranks other than the first only give their rows.

    Args:
        writer: the first rank's.
        finished: parts that an earlier run wrote.
        best: what `weights` end as.
    """
    trained = {weight.name: (weight, rows) for weight, rows in zip(weights, best, strict=True)}
    for part, names in _parts(checkpoint, student).items():
        if part in finished:
            continue
        tensors = {name: weight.gathered(rows) for name in names if name in trained for weight, rows in [trained[name]]}
        if writer:
            others = {name: checkpoint.tensors.read(name) for name in names if name not in tensors}
            writer.add(part, dict(sorted({**others, **tensors}.items())))


def write_rest(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    original: Path,
    settings: HealSettings,
    report: HealReport,
    say: Say,
) -> None:
    """Companions, permutations, configuration with the annotation, report, model card.

    Args:
        original: folder of the teacher, whose own card travels along.
    """
    writer.copy_companions(checkpoint.folder)
    if (checkpoint.folder / PERMUTATION).exists():
        writer.copy(checkpoint.folder / PERMUTATION, PERMUTATION)
    healed = _annotation(checkpoint.annotation, settings, report)
    skipped = left_dense(report.pruning)
    section = report.card_section()
    writer.write_card(model_card(settings.teacher, original, healed, checkpoint.fp8, section, skipped, say), original)
    quantization = checkpoint.config["quantization_config"] if checkpoint.fp8 else None
    writer.write_config(checkpoint.config, healed, quantization)
    writer.write_json(FILE, report.to_dict())


def left_dense(report: dict[str, Any] | None) -> dict[str, str]:
    """Blocks that were not pruned → why, from PRUNED's report, which may be of a healed checkpoint itself."""
    while report and "skipped" not in report:
        report = report.get("pruning")
    return report["skipped"] if report else {}


def pruning_report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """PRUNED's own report, if it has one."""
    file = checkpoint.folder / FILE
    return read_object(file) if file.exists() else None


def _annotation(annotation: Annotation, settings: HealSettings, report: HealReport) -> Annotation:
    """The pruner's, which also says how the weights were trained after it, if they are others now."""
    if not report.history.best_step:
        return annotation
    healed: dict[str, Scalar] = {
        "healed": str(settings.train),
        "healed_text": " + ".join(settings.sources),
        # What is written may be an earlier state than the last.
        "healed_tokens": report.tokens // report.steps * report.history.best_step,
        "healed_rate": settings.rate,
    }
    return replace(annotation, settings={**annotation.settings, **healed})


def _parts(checkpoint: Checkpoint, student: SourceModel) -> dict[str, list[str]]:
    """Name of a part → the tensors in it: a decoder block's, and all others."""
    prefixes = [student.tensors.stored(block.name) for block in student.blocks]
    parts: dict[str, list[str]] = {part: [] for part in (*prefixes, OUTSIDE_BLOCKS)}
    for name in checkpoint.tensors:
        part = next((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), OUTSIDE_BLOCKS)
        parts[part].append(name)
    return {part: names for part, names in parts.items() if names}
