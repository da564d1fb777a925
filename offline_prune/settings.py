"""What the user asked for, checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from offline_prune.calibration.mixture import shares, source_names, written_at_most
from offline_prune.calibration.sources import require_spelled
from offline_prune.methods.recipe import (
    DEFAULT_METHOD,
    METHODS,
    TUNE_RATE,
    Grouping,
    Layout,
    Quantize,
    Recipe,
    Rounding,
    Selection,
    TuneLoss,
)
from offline_prune.runtime.activation_store import Place
from vllm_spense.errors import SpenseError
from vllm_spense.format import MIN_ALIGNMENT

MAX_SPARSITY = 0.5
#: Of the activations' place: the first with room.
AUTO = "auto"
#: Settings that are one of several words: name, the command's option, the words.
_CHOICES: tuple[tuple[str, str, type[StrEnum]], ...] = (
    ("selection", "selection", Selection),
    ("grouping", "grouping", Grouping),
    ("layout", "layout", Layout),
    ("quantize", "quantize", Quantize),
    ("rounding", "fp8-rounding", Rounding),
    ("tune_loss", "tune-loss", TuneLoss),
)

Choice = TypeVar("Choice", bound=StrEnum)


@dataclass(frozen=True)
class PruneSettings:
    """Everything that decides what `prune` writes, and where.

    Attributes:
        model: a local folder or a Hugging Face hub name.
        out: folder to write; must be empty, or not there, unless `overwrite`.
        method: a key of `METHODS`.
        sparsity: MLP sparsity (1 − ρ) / 2 in [0, 0.5]; None for the method's own.
        dense_first: keep the first MLP dense, and let the others take over its sparsity; None for the method's own,
            where there are enough others.
        selection: which intermediate indices stay dense; None for the method's own.
        grouping: which sparse indices share a group of four in down: neighbours in the `original` order, or `mixed`,
            two strong and two weak ones; None for the method's own.
        layout: where dense columns stand while down is pruned.
        alignment: S and D are multiples of it; None picks the largest power of two up to 256 that fits.
        calibration: one source or several that give equal shares: see `calibration.data.calibration_tokens`; or
            `generated`, which the dense model writes itself (`calibration.generated.generate`), at most
            `mixture.MOST_WRITTEN` tokens where others can give the rest. A tuple afterwards; None for what suits the
            model and the device: `text_sources.default_sources`.
        samples, length, seed: of the calibration text, in sequences and tokens. If `length` is beyond the model's
            context, `prune` takes more and shorter sequences: `context_length.fit_to_context`.
        calibration_images: see `calibration.image_rows.captioned_images`; None for text alone.
        image_share: of the calibration sequences, those that begin with images; None for half of them.
        quantize: `fp8`, or `none` for the source's own type with the same zeros.
        rounding: `after` pruning, to the nearest; `inside` the column loop that prunes, where rounding errors are
            compensated too; `everywhere`: in a column loop for the other linear layers too, of tuned weights after
            tuning, and with scales by least squared error. None for the method's own.
        damping: λ / mean(diag H).
        descent_passes: of coordinate descent after the solver, which chooses masks anew; None for the method's own.
        true_sequential: collect down's Hessian through the pruned gate and up.
        tune_steps: most steps of Adam on each block's kept weights after it is pruned, in all one pass over the
            calibration text, of which more than 128 take 1024 tokens each; 0 for none, None for the method's own.
        tune_rate: of those steps, relative to the weights: see `methods.block_finetune`; None for `recipe.TUNE_RATE`.
        tune_loss: what those steps make small: the `relative` error, or that with its channels weighed by the dense
            model's predictions, `fisher`; None for the method's own.
        skip_unsupported: leave blocks without a gated MLP as they are instead of refusing the model.
        trust_remote_code: run the Python code that a model brings along.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_tokens: about how many tokens pass through a block at once; None for what suits the device.
        activations: where the calibration text's hidden states are kept; `auto` takes the first place that has room.
        overwrite: replace the Spense checkpoint, or the unfinished run, in `out`.
        resume: go on with an unfinished run to `out` that had the same settings, if there is one; not with `overwrite`.

    Raises:
        SpenseError: at construction, for a value outside its range.
    """

    model: str
    out: Path
    method: str = DEFAULT_METHOD
    sparsity: float | None = None
    dense_first: bool | None = None
    selection: Selection | None = None
    grouping: Grouping | None = None
    layout: Layout = Layout.BACK
    alignment: int | None = None
    calibration: str | tuple[str, ...] | None = None
    samples: int = 128
    length: int = 16384
    seed: int = 0
    calibration_images: str | None = None
    image_share: float | None = None
    quantize: Quantize = Quantize.FP8
    rounding: Rounding | None = None
    damping: float = 0.01
    descent_passes: int | None = None
    true_sequential: bool = True
    tune_steps: int | None = None
    tune_rate: float | None = None
    tune_loss: TuneLoss | None = None
    skip_unsupported: bool = False
    trust_remote_code: bool = False
    device: str = "auto"
    batch_tokens: int | None = None
    activations: str = AUTO
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        require_one_way(self.overwrite, self.resume)
        one_of("method", self.method, tuple(METHODS))
        if self.sparsity is not None and not 0 <= self.sparsity <= MAX_SPARSITY:
            raise SpenseError(
                f"--sparsity: found {self.sparsity:g}, expected 0 to {MAX_SPARSITY} (2:4 removes half at most)"
            )
        for name, option, kind in _CHOICES:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, choice(option, kind, given))
        if self.activations != AUTO:
            one_of("activations", self.activations, (AUTO, *Place))
        for name in ("samples", "length", "batch_tokens"):
            require_least(name, getattr(self, name), 1)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", self.sources)
            require_spelled(self.sources)
            shares(self.sources, self.samples)
        if self.image_share is not None:
            if self.calibration_images is None:
                raise SpenseError(f"--image-share: found {self.image_share:g} without --calibration-images")
            if not 0 < self.image_share <= 1:
                raise SpenseError(f"--image-share: found {self.image_share:g}, expected more than 0 and at most 1")
        if not (math.isfinite(self.damping) and 0 <= self.damping <= 1):
            raise SpenseError(f"--damping: found {self.damping:g}, expected 0 to 1")
        for name in ("descent_passes", "tune_steps"):
            require_least(name, getattr(self, name), 0)
        if self.tune_rate is not None and not 0 < self.tune_rate <= 1:
            raise SpenseError(f"--tune-rate: found {self.tune_rate:g}, expected more than 0 and at most 1")
        for name in ("tune_rate", "tune_loss"):
            if (given := getattr(self, name)) is not None and not self.recipe.tune_steps:
                option = f"--{name.replace('_', '-')}"
                raise SpenseError(
                    f"{option}: found {given} without tuning, expected --tune-steps of at least 1 with it"
                )
        if self.alignment is not None and (self.alignment < MIN_ALIGNMENT or self.alignment & (self.alignment - 1)):
            raise SpenseError(
                f"--alignment: found {self.alignment}, expected a power of two of at least {MIN_ALIGNMENT}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Of the calibration text, once it is known."""
        assert self.calibration is not None
        return source_names(self.calibration)

    @property
    def shares(self) -> dict[str, int]:
        """Source → how many sequences it gives."""
        return shares(self.sources, self.samples, written_at_most(self.length))

    @property
    def wanted_image_share(self) -> float:
        return 0.5 if self.image_share is None else self.image_share

    @property
    def wanted_sparsity(self) -> float:
        return METHODS[self.method].sparsity if self.sparsity is None else self.sparsity

    @property
    def wanted_dense_first(self) -> bool:
        return METHODS[self.method].dense_first if self.dense_first is None else self.dense_first

    @cached_property
    def recipe(self) -> Recipe:
        """The method, with what these settings change of it."""
        method = METHODS[self.method]
        return Recipe(
            solver=method.solver,
            selection=self.selection or method.selection,
            grouping=self.grouping or method.grouping,
            layout=self.layout,
            quantize=self.quantize,
            rounding=self.rounding or method.rounding,
            damping=self.damping,
            descent_passes=method.descent_passes if self.descent_passes is None else self.descent_passes,
            true_sequential=self.true_sequential,
            tune_steps=method.tune_steps if self.tune_steps is None else self.tune_steps,
            tune_rate=TUNE_RATE if self.tune_rate is None else self.tune_rate,
            tune_loss=self.tune_loss or method.tune_loss,
            seed=self.seed,
        )

    def resolved(self) -> dict[str, object]:
        """All settings by name; those that are left to the method as the method has them."""
        wanted = {
            "sparsity": self.wanted_sparsity,
            "dense_first": self.wanted_dense_first,
            "image_share": self.wanted_image_share,
        }
        return {**asdict(self), **asdict(self.recipe), **wanted}


def require_least(name: str, value: int | None, least: int) -> None:
    """Raises SpenseError for a setting below its least value; None is left to a default."""
    if value is not None and value < least:
        raise SpenseError(f"--{name.replace('_', '-')}: found {value}, expected at least {least}")


def require_one_way(overwrite: bool, resume: bool) -> None:
    """Raises SpenseError for a run that is to go on and to start anew."""
    if overwrite and resume:
        raise SpenseError(
            "--overwrite, --resume: found both, expected one: --resume goes on with an unfinished run, also with one "
            "that replaces a checkpoint; --overwrite starts anew"
        )


def choice(option: str, kind: type[Choice], found: str) -> Choice:
    """The choice of that name, which strings may stand for.

    Raises:
        SpenseError: there is none.
    """
    one_of(option, found, tuple(kind))
    return kind(found)


def one_of(option: str, found: str, expected: tuple[str, ...]) -> None:
    """Raises SpenseError unless an option is one of some words."""
    if found not in expected:
        raise SpenseError(f"--{option}: found {found}, expected {' | '.join(expected)}")
