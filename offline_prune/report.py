"""What a pruning run did, layer by layer: `report.json` and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from offline_prune.checkpoint.model_card import table
from offline_prune.methods.block_finetune import TuningReport
from offline_prune.methods.prune_mlp import Pruned
from vllm_spense.format import Regions

FILE = "report.json"
PICTURE = "report.png"
#: What runs and cards say of models with experts.
UNTUNED = "Blocks with experts are pruned and not tuned."
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ProjectionReport:
    """One projection of one layer.

    Attributes:
        loss: ‖(W − Ŵ)·X‖² / ‖W·X‖² on the calibration text.
        zeros: share of zeros in Ŵ.
        damping: λ / mean(diag H) that was needed; None without a factorization.
    """

    loss: float
    zeros: float
    damping: float | None


@dataclass(frozen=True)
class ProjectionSums:
    """What a report keeps of a pruned weight, or of some of its rows: see `Pruned` and `ProjectionReport`."""

    error: float
    power: float
    zeros: float
    damping: float | None


def projection_sums(pruned: Pruned, rows: slice = slice(None)) -> ProjectionSums:
    """Sums up `rows` of a pruned weight."""
    zeros = (pruned.weight[rows] == 0).float().mean()
    error, power = (each[rows].double().sum() for each in (pruned.error, pruned.power))
    return ProjectionSums(float(error), float(power), float(zeros), pruned.damping)


def projection_report(sums: Sequence[ProjectionSums]) -> ProjectionReport:
    """Of one weight, or of one projection of all experts of a block, which are equally large."""
    loss = sum(each.error for each in sums) / max(sum(each.power for each in sums), 1e-300)
    dampings = [each.damping for each in sums if each.damping is not None]
    return ProjectionReport(loss, sum(each.zeros for each in sums) / len(sums), max(dampings, default=None))


@dataclass(frozen=True)
class ProjectionSummary:
    """One projection of all layers: gate, up or down; `zeros` is the mean over the layers."""

    name: str
    zeros: float
    median_loss: float
    largest_loss: float


@dataclass(frozen=True)
class LayerReport:
    """One pruned MLP, or all routed experts of a block; `dense_indices` is the hash of what stayed dense.

    Attributes:
        gate, up, down: as they were pruned, before any tuning and what is rounded after it.
        tuning: None where nothing was tuned, as in blocks with experts.
        tokens: how many tokens of the calibration text each expert saw; None for an MLP that sees all.
    """

    name: str
    regions: Regions
    dense_indices: str
    seconds: float
    gate: ProjectionReport
    up: ProjectionReport
    down: ProjectionReport
    tuning: TuningReport | None = None
    tokens: list[int] | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerReport:
        """From what `dataclasses.asdict` made of one."""
        projections = {name: ProjectionReport(**data[name]) for name in PROJECTIONS}
        tuning = TuningReport(**data["tuning"]) if data["tuning"] else None
        return cls(**{**data, **projections, "regions": Regions(**data["regions"]), "tuning": tuning})


@dataclass(frozen=True)
class BlockTime:
    """Seconds that one decoder block took in this run, in all and by kind of work."""

    name: str
    seconds: float
    stages: dict[str, float]


@dataclass
class Report:
    """A whole run.

    Attributes:
        stages: seconds by kind of work, summed over the blocks.
        blocks: what each decoder block took; all but the last include the way to the next one's input.
        planned_host_gib, planned_device_gib: what the plan said before the work started.
        peak_host_gib: of the process's own memory, beyond mapped files and what was there at first. On a CPU that is
            what was planned; with a GPU it is what libraries and compiled kernels took.
        peak_pinned_gib: of host memory pinned for a GPU, which is what was planned there; 0 on a CPU.
        peak_device_gib: of a GPU; 0 on a CPU.
    """

    model: str
    settings: dict[str, Any]
    mlp_sparsity: float
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    blocks: list[BlockTime] = field(default_factory=list)
    planned_host_gib: float = 0.0
    planned_device_gib: float = 0.0
    peak_host_gib: float = 0.0
    peak_pinned_gib: float = 0.0
    peak_device_gib: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: {"torch": torch.__version__})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def projections(self) -> list[ProjectionSummary]:
        found = []
        for name in PROJECTIONS:
            parts: list[ProjectionReport] = [getattr(layer, name) for layer in self.layers]
            losses = sorted(part.loss for part in parts)
            zeros = sum(part.zeros for part in parts) / len(parts)
            found.append(ProjectionSummary(name, zeros, losses[len(losses) // 2], losses[-1]))
        return found

    def card_section(self) -> list[str]:
        """Markdown for the checkpoint's model card."""
        rows = [
            (part.name, f"{part.zeros:.2%}", f"{part.median_loss:.4f}", f"{part.largest_loss:.4f}")
            for part in self.projections()
        ]
        return [
            "## Measured while pruning",
            "",
            "‖(W − Ŵ)X‖² / ‖WX‖² on the calibration text, before any tuning:",
            "",
            *table(["projection", "zeros", "relative error, median", "largest"], rows),
            *self._of_experts(),
        ]

    def _of_experts(self) -> list[str]:
        seen = [tokens for layer in self.layers for tokens in layer.tokens or ()]
        if not seen:
            return []
        return [
            "",
            f"Each expert saw {min(seen)} to {max(seen)} tokens of the calibration text, half of them at least "
            f"{sorted(seen)[len(seen) // 2]}; one with fewer than it has inputs borrowed the rest from its layer. "
            + UNTUNED,
        ]

    def draw(self, path: Path) -> None:
        """Writes the picture: loss of each projection against depth."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name in PROJECTIONS:
            axes.plot([getattr(layer, name).loss for layer in self.layers], marker=".", label=name)
        axes.set_yscale("log")
        axes.set_xlabel("pruned MLP, from first to last")
        axes.set_ylabel("‖(W − Ŵ)X‖² / ‖WX‖²")
        axes.set_title(f"{self.settings['method']}, MLP sparsity {self.mlp_sparsity:.1%}, {self.seconds:.0f} s")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
