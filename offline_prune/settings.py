"""What the user asked for, checked before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from offline_prune.calibration.data import DEFAULT_SOURCE
from offline_prune.methods.dense_selection import GROUPINGS, LAYOUTS, SELECTIONS, Grouping, Layout, Selection
from offline_prune.runtime.activation_store import PLACES, Place
from vllm_spense.errors import SpenseError
from vllm_spense.format import MIN_ALIGNMENT, Regions, Scalar

Solver = Literal["sparsegpt", "wanda", "magnitude"]
Quantize = Literal["fp8", "none"]
Rounding = Literal["after", "inside", "everywhere"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

MAX_SPARSITY = 0.5
#: Regions that are multiples of this stay multiples of 32 on each of 8 tensor parallel ranks.
PREFERRED_ALIGNMENT = 256
#: How far the sparsity that an alignment allows may be from the one asked for.
SPARSITY_TOLERANCE = 0.005


@dataclass(frozen=True)
class Method:
    """A named pruning method: how weights are pruned, and what it does unless told otherwise."""

    solver: Solver
    selection: Selection
    sparsity: float
    tune_steps: int = 0
    rounding: Rounding = "inside"
    grouping: Grouping = "original"
    dense_first: bool = False
    descent_passes: int = 0


METHODS = {
    "spensegpt++": Method(
        "sparsegpt", "output-loss", 0.375, tune_steps=128, rounding="everywhere", dense_first=True, descent_passes=1
    ),
    "spensegpt+": Method("sparsegpt", "spensegpt+", 0.375),
    "spensegpt": Method("sparsegpt", "last", 0.375),
    "sparsegpt": Method("sparsegpt", "last", 0.5),
    "wanda": Method("wanda", "last", 0.5),
    "magnitude": Method("magnitude", "last", 0.5),
}


@dataclass(frozen=True)
class PruneSettings:
    """Everything that decides what `prune` writes, and where.

    Attributes:
        model: a local folder or a Hugging Face hub name.
        out: folder to write; must not exist unless `overwrite`.
        method: a key of `METHODS`.
        sparsity: MLP sparsity (1 − ρ) / 2 in [0, 0.5]; None for the method's own.
        dense_first: keep the first MLP dense, and let the others take over its sparsity; None for the method's own,
            where there are enough others.
        selection: which intermediate indices stay dense; None for the method's own.
        grouping: which sparse indices share a group of four in down: neighbours in the `original` order, or `mixed`,
            two strong and two weak ones; None for the method's own.
        layout: where dense columns stand while down is pruned.
        alignment: S and D are multiples of it; None picks the largest power of two up to 256 that fits.
        calibration: see `calibrate.calibration_tokens`.
        samples, length, seed: of the calibration text, in sequences and tokens.
        quantize: `fp8`, or `none` for the source's own type with the same zeros.
        rounding: `after` pruning, to the nearest; `inside` the column loop that prunes, where rounding errors are
            compensated too; `everywhere`: in a column loop for the other linear layers too, of tuned weights after
            tuning, and with scales by least squared error. None for the method's own.
        damping: λ / mean(diag H).
        descent_passes: of coordinate descent behind the solver, which chooses masks anew; None for the method's own.
        true_sequential: collect down's Hessian through the pruned gate and up.
        tune_steps: steps of Adam on each block's kept weights after it is pruned, in all one pass over the calibration
            text; 0 for none, None for the method's own.
        tune_rate: of those steps, relative to the weights: see `tune.tune`.
        skip_unsupported: leave blocks without a gated MLP as they are instead of refusing the model.
        trust_remote_code: run the Python code that a model brings along.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch_tokens: about how many tokens pass through a block at once; None for what suits the device.
        activations: where the calibration text's hidden states are kept; `auto` takes the first place that has room.
        overwrite: replace an existing checkpoint in `out`.
        resume: go on with an unfinished run to `out` that had the same settings, if there is one.

    Raises:
        SpenseError: at construction, for a value outside its range.
    """

    model: str
    out: Path
    method: str = "spensegpt+"
    sparsity: float | None = None
    dense_first: bool | None = None
    selection: Selection | None = None
    grouping: Grouping | None = None
    layout: Layout = "back"
    alignment: int | None = None
    calibration: str = DEFAULT_SOURCE
    samples: int = 128
    length: int = 16384
    seed: int = 0
    quantize: Quantize = "fp8"
    rounding: Rounding | None = None
    damping: float = 0.01
    descent_passes: int | None = None
    true_sequential: bool = True
    tune_steps: int | None = None
    tune_rate: float = 0.016
    skip_unsupported: bool = False
    trust_remote_code: bool = False
    device: str = "auto"
    batch_tokens: int | None = None
    activations: Literal["auto"] | Place = "auto"
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        if self.sparsity is not None and not 0 <= self.sparsity <= MAX_SPARSITY:
            raise SpenseError(
                f"--sparsity: found {self.sparsity:g}, expected 0 to {MAX_SPARSITY} (2:4 removes half at most)"
            )
        if self.selection is not None:
            _one_of("selection", self.selection, SELECTIONS)
        if self.grouping is not None:
            _one_of("grouping", self.grouping, GROUPINGS)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("quantize", self.quantize, ("fp8", "none"))
        if self.rounding is not None:
            _one_of("fp8-rounding", self.rounding, ROUNDINGS)
        _one_of("activations", self.activations, ("auto", *PLACES))
        for name in ("samples", "length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpenseError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
        if not (math.isfinite(self.damping) and 0 <= self.damping <= 1):
            raise SpenseError(f"--damping: found {self.damping:g}, expected 0 to 1")
        for name in ("descent_passes", "tune_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SpenseError(f"--{name.replace('_', '-')}: found {value}, expected at least 0")
        if not 0 < self.tune_rate <= 1:
            raise SpenseError(f"--tune-rate: found {self.tune_rate:g}, expected more than 0 and at most 1")
        if self.alignment is not None and (self.alignment < MIN_ALIGNMENT or self.alignment & (self.alignment - 1)):
            raise SpenseError(
                f"--alignment: found {self.alignment}, expected a power of two of at least {MIN_ALIGNMENT}"
            )

    @property
    def solver(self) -> Solver:
        return METHODS[self.method].solver

    @property
    def wanted_sparsity(self) -> float:
        return METHODS[self.method].sparsity if self.sparsity is None else self.sparsity

    @property
    def wanted_selection(self) -> Selection:
        return self.selection or METHODS[self.method].selection

    @property
    def wanted_dense_first(self) -> bool:
        return METHODS[self.method].dense_first if self.dense_first is None else self.dense_first

    @property
    def wanted_grouping(self) -> Grouping:
        return self.grouping or METHODS[self.method].grouping

    @property
    def wanted_descent_passes(self) -> int:
        return METHODS[self.method].descent_passes if self.descent_passes is None else self.descent_passes

    @property
    def wanted_tune_steps(self) -> int:
        return METHODS[self.method].tune_steps if self.tune_steps is None else self.tune_steps

    @property
    def wanted_rounding(self) -> Rounding:
        return self.rounding or METHODS[self.method].rounding

    @property
    def rounds_inside(self) -> bool:
        """In a column loop of what is pruned."""
        return self.quantize == "fp8" and self.wanted_rounding != "after" and self.solver == "sparsegpt"

    @property
    def prunes_unrounded(self) -> bool:
        """Before anything is rounded, rather than in the same column loop."""
        return not self.rounds_inside or self.wanted_descent_passes > 0

    @property
    def rounds_everywhere(self) -> bool:
        """In a column loop also what is not pruned."""
        return self.quantize == "fp8" and self.wanted_rounding == "everywhere"

    @property
    def rounds_tuned(self) -> bool:
        """In the column loop again after tuning, which sees no rounding."""
        return self.rounds_everywhere and self.rounds_inside and self.wanted_tune_steps > 0

    @property
    def follows_dense(self) -> bool:
        """Takes the calibration text through the dense model beside the pruned one."""
        return self.rounds_everywhere or self.wanted_tune_steps > 0

    def resolved(self) -> dict[str, object]:
        """All settings by name; those that are left to the method as the method has them."""
        wanted = {name: getattr(self, f"wanted_{name}", value) for name, value in vars(self).items()}
        return {**wanted, "solver": self.solver}

    def recorded(self) -> dict[str, Scalar]:
        """The settings that an annotation keeps."""
        recorded: dict[str, Scalar] = {
            "selection": self.wanted_selection,
            "grouping": self.wanted_grouping,
            "layout": self.layout,
            "solver": self.solver,
            "true_sequential": self.true_sequential,
            "quantize": self.quantize,
        }
        if self.solver == "sparsegpt":
            recorded["damping"] = self.damping
        if self.wanted_descent_passes:
            recorded["descent_passes"] = self.wanted_descent_passes
        if self.wanted_tune_steps:
            recorded |= {"tune_steps": self.wanted_tune_steps, "tune_rate": self.tune_rate}
        if self.quantize == "fp8":
            chosen = self.rounds_inside or self.rounds_everywhere
            recorded["fp8_rounding"] = self.wanted_rounding if chosen else "after"
        return recorded


def _one_of(name: str, found: str, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise SpenseError(f"--{name}: found {found}, expected {' | '.join(expected)}")


def fit_regions(intermediate: int, sparsity: float, alignment: int | None, layer: str) -> tuple[Regions, int]:
    """The regions closest to an MLP sparsity, and the alignment they have.

    Args:
        intermediate: I.
        sparsity: (1 − ρ) / 2.
        alignment: or None for the largest power of two from 256 down to 32 that fits.

    Raises:
        SpenseError: no region sizes within half a percent of sparsity; names those that would fit.
    """
    step = PREFERRED_ALIGNMENT
    tried = []
    while step >= MIN_ALIGNMENT:
        tried.append(step)
        step //= 2
    for step in tried if alignment is None else [alignment]:
        if intermediate % step == 0:
            dense = round((1 - 2 * sparsity) * intermediate / step) * step
            regions = Regions(intermediate - dense, dense)
            if abs(regions.mlp_sparsity - sparsity) <= SPARSITY_TOLERANCE:
                return regions, step
    step = alignment or MIN_ALIGNMENT
    if intermediate % step:
        divisor = math.gcd(intermediate, PREFERRED_ALIGNMENT)
        advice = f"; --alignment {divisor} divides it" if divisor >= MIN_ALIGNMENT else ""
        raise SpenseError(
            f"{layer}: intermediate size {intermediate} is not a multiple of the alignment {step}{advice}"
        )
    choices = [(intermediate - dense) / intermediate / 2 for dense in range(0, intermediate + 1, step)]
    nearest = sorted(sorted(choices, key=lambda s: abs(s - sparsity))[:4])
    fitting = ", ".join(f"{s:.4g}" for s in nearest)
    raise SpenseError(
        f"{layer}: sparsity {sparsity:g} does not fit intermediate size {intermediate} with alignment {step}; "
        f"--sparsity values that fit nearby: {fitting}"
    )
