"""What a run of `heal` did: `report.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from offline_prune.healing.training import History


@dataclass
class HealReport:
    """A whole run.

    Attributes:
        settings: of the run.
        steps, tokens: of the training in all: how many steps, and tokens in them.
        heldout_tokens: that judged and were not trained on.
        history: the loss of every step, and the held-out one now and then.
        stages: seconds by kind of work, since the run was started or resumed last.
        planned_gib, peak_gib: memory of the device, as planned and as seen; on a CPU the latter is the process's own.
        pruning: PRUNED's report, if it has one.
    """

    settings: dict[str, Any]
    steps: int
    tokens: int
    heldout_tokens: int
    history: History = field(default_factory=History)
    stages: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    planned_gib: float = 0.0
    peak_gib: float = 0.0
    pruning: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=lambda: {"torch": torch.__version__})

    @property
    def before(self) -> float:
        """Mean KL(teacher ‖ PRUNED) of the held-out tokens, in nats."""
        return self.history.heldout[0][1]

    @property
    def after(self) -> float:
        """The same of what was written."""
        return dict(self.history.heldout)[self.history.best_step]

    def card_section(self) -> list[str]:
        """Markdown for the checkpoint's model card."""
        if not self.history.best_step:
            return [
                "## Measured",
                "",
                f"KL(original ‖ this model) of the next token on {self.heldout_tokens} tokens: {self.before:.4f} nats. "
                "`spense heal` found no better weights, so these are those that it was given.",
            ]
        return [
            "## Measured while healing",
            "",
            f"KL(original ‖ this model) of the next token on {self.heldout_tokens} tokens that were not trained on: "
            f"{self.after:.4f} nats, and {self.before:.4f} before healing.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `report.json` has it; `model` is the dense one, as in the pruner's report."""
        measured = {"heldout_kl_before": self.before, "heldout_kl_after": self.after}
        return {"model": self.settings["teacher"], **measured, **asdict(self)}
