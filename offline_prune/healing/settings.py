"""What the user asked of `heal`, checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from offline_prune.calibration.mixture import shares, source_names
from offline_prune.calibration.sources import require_spelled
from offline_prune.settings import choice, require_least, require_one_way
from vllm_spense.errors import SpenseError


class Train(StrEnum):
    """Which weights are trained.

    mlp: those of the pruned MLPs. all: every linear layer of the decoder blocks with its bias, and all norms.
    """

    MLP = "mlp"
    ALL = "all"


class Optimizer(StrEnum):
    """AdamW with moments in float32, or in 8 bits (torchao)."""

    ADAMW = "adamw"
    ADAMW8BIT = "adamw8bit"


@dataclass(frozen=True)
class HealSettings:
    """Everything that decides what `heal` writes, and where.

    Attributes:
        pruned: a Spense checkpoint.
        out: folder to write; must be empty, or not there, unless `overwrite`.
        teacher: the dense model that `pruned` was made from: a local folder or a Hugging Face hub name.
        train: which weights are trained.
        calibration: text to train on, as in `PruneSettings`; `generated` is what the teacher writes, all of its share.
        samples, length, seed: of that text, in sequences and tokens, as in `PruneSettings`. `seed` also orders epochs.
        heldout: share of the sequences that are not trained on, but judge the weights.
        epochs: how often the text is gone through.
        rate: AdamW's largest learning rate, relative to the root mean square of each weight's kept values.
        warm_up: share of the steps in which it rises; it then falls as a cosine to a tenth.
        step_tokens: about how many tokens, of all processes together, make a step.
        batch_tokens: about how many of them pass through the model at once; None for what suits the device.
        optimizer: where the moments are kept.
        checkpointing: compute activations inside a block again for its gradients, instead of keeping them; None where
            they do not fit. Decides no bit of the result.
        save_minutes: between two states that are saved for `resume`.
        trust_remote_code: run the Python code that a model brings along.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: replace the Spense checkpoint, or the unfinished run, in `out`.
        resume: go on with an unfinished run to `out` that had the same settings, if there is one.

    Raises:
        SpenseError: at construction, for a value outside its range.
    """

    pruned: Path
    out: Path
    teacher: str
    train: Train = Train.MLP
    calibration: str | tuple[str, ...] | None = None
    samples: int = 2400
    length: int = 2048
    seed: int = 0
    heldout: float = 0.02
    epochs: int = 2
    rate: float = 0.001
    warm_up: float = 0.05
    step_tokens: int = 8192
    batch_tokens: int | None = None
    optimizer: Optimizer = Optimizer.ADAMW
    checkpointing: bool | None = None
    save_minutes: float = 10.0
    trust_remote_code: bool = False
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        require_one_way(self.overwrite, self.resume)
        for name, kind in (("train", Train), ("optimizer", Optimizer)):
            object.__setattr__(self, name, choice(name, kind, getattr(self, name)))
        for name, least in (("samples", 2), ("length", 2), ("epochs", 1), ("step_tokens", 1), ("batch_tokens", 1)):
            require_least(name, getattr(self, name), least)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", self.sources)
            require_spelled(self.sources)
            shares(self.sources, self.samples)
        if not 0 < self.heldout <= 0.5:
            raise SpenseError(f"--heldout: found {self.heldout:g}, expected more than 0 and at most 0.5")
        if not 0 < self.rate <= 1:
            raise SpenseError(f"--rate: found {self.rate:g}, expected more than 0 and at most 1")
        if not 0 <= self.warm_up < 1:
            raise SpenseError(f"--warm-up: found {self.warm_up:g}, expected at least 0 and less than 1")
        if not (math.isfinite(self.save_minutes) and self.save_minutes >= 0):
            raise SpenseError(f"--save-minutes: found {self.save_minutes:g}, expected at least 0")

    @property
    def sources(self) -> tuple[str, ...]:
        """Of the text, once `calibration` is known."""
        assert self.calibration is not None
        return source_names(self.calibration)
