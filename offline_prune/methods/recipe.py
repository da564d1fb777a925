"""The choices that a pruning method is made of, and the named methods: what each does unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vllm_spense.format import Scalar


class Solver(StrEnum):
    """How the weights of a 2:4 region are chosen: with compensation, or by a score alone."""

    SPARSEGPT = "sparsegpt"
    WANDA = "wanda"
    MAGNITUDE = "magnitude"


class Selection(StrEnum):
    """Which intermediate indices stay dense: see `dense_selection`."""

    LAST = "last"
    SPENSEGPT_PLUS = "spensegpt+"
    SPARSEGPT_SCORE = "sparsegpt-score"
    OUTPUT_LOSS = "output-loss"
    RANDOM = "random"

    @property
    def reads_activations(self) -> bool:
        return self not in (Selection.LAST, Selection.RANDOM)


class Grouping(StrEnum):
    """Which sparse indices share a group of four in down: neighbours, or two strong and two weak ones."""

    ORIGINAL = "original"
    MIXED = "mixed"


class Layout(StrEnum):
    """Where dense columns stand while down is pruned (the paper's Table 5)."""

    BACK = "back"
    FRONT = "front"
    NONE = "none"


class Quantize(StrEnum):
    """What weights are stored as: FP8 E4M3, or the source's own type with the same zeros."""

    FP8 = "fp8"
    NONE = "none"


class Rounding(StrEnum):
    """When weights are rounded to FP8.

    `after` pruning, to the nearest; `inside` the column loop that prunes, where rounding errors are compensated too;
    `everywhere`: in a column loop for the other linear layers too, of tuned weights after tuning, and with scales by
    least squared error.
    """

    AFTER = "after"
    INSIDE = "inside"
    EVERYWHERE = "everywhere"


class TuneLoss(StrEnum):
    """How the channels of a block's error are weighed while it is tuned: alike, or by how much they change the dense
    model's predictions: `calibration.sensitivity.channel_weights`."""

    RELATIVE = "relative"
    FISHER = "fisher"


@dataclass(frozen=True)
class Method:
    """A named pruning method: what it does unless told otherwise."""

    solver: Solver
    selection: Selection
    sparsity: float
    tune_steps: int = 0
    tune_loss: TuneLoss = TuneLoss.RELATIVE
    rounding: Rounding = Rounding.INSIDE
    grouping: Grouping = Grouping.ORIGINAL
    dense_first: bool = False
    descent_passes: int = 0


#: Of Adam in tuning, relative to the weights.
TUNE_RATE = 0.016
#: The best one-shot pruning there is here, in at most three times the time of `spensegpt+`.
DEFAULT_METHOD = "spensegpt++"
METHODS = {
    "spensegpt++": Method(
        Solver.SPARSEGPT,
        Selection.OUTPUT_LOSS,
        0.375,
        tune_steps=512,
        tune_loss=TuneLoss.FISHER,
        rounding=Rounding.EVERYWHERE,
        dense_first=True,
        descent_passes=1,
    ),
    "spensegpt+": Method(Solver.SPARSEGPT, Selection.SPENSEGPT_PLUS, 0.375),
    "spensegpt": Method(Solver.SPARSEGPT, Selection.LAST, 0.375),
    "sparsegpt": Method(Solver.SPARSEGPT, Selection.LAST, 0.5),
    "wanda": Method(Solver.WANDA, Selection.LAST, 0.5),
    "magnitude": Method(Solver.MAGNITUDE, Selection.LAST, 0.5),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides what becomes of an MLP's weights, with nothing left open.

    Attributes:
        damping: λ / mean(diag H).
        descent_passes: of coordinate descent after the solver.
        true_sequential: down's Hessian comes through the pruned gate and up.
        tune_steps: of Adam on each block's kept weights, at most; 0 for none.
        tune_rate: of those steps, relative to the weights.
        tune_loss: what they make small.
        seed: of random choices.
    """

    solver: Solver = Solver.SPARSEGPT
    selection: Selection = Selection.SPENSEGPT_PLUS
    grouping: Grouping = Grouping.ORIGINAL
    layout: Layout = Layout.BACK
    quantize: Quantize = Quantize.FP8
    rounding: Rounding = Rounding.INSIDE
    damping: float = 0.01
    descent_passes: int = 0
    true_sequential: bool = True
    tune_steps: int = 0
    tune_rate: float = TUNE_RATE
    tune_loss: TuneLoss = TuneLoss.RELATIVE
    seed: int = 0

    @property
    def rounds_inside(self) -> bool:
        """In a column loop of what is pruned."""
        fp8, compensates = self.quantize is Quantize.FP8, self.solver is Solver.SPARSEGPT
        return fp8 and compensates and self.rounding is not Rounding.AFTER

    @property
    def prunes_unrounded(self) -> bool:
        """Before anything is rounded, rather than in the same column loop."""
        return not self.rounds_inside or self.descent_passes > 0

    @property
    def rounds_everywhere(self) -> bool:
        """In a column loop also what is not pruned."""
        return self.quantize is Quantize.FP8 and self.rounding is Rounding.EVERYWHERE

    @property
    def rounds_tuned(self) -> bool:
        """In the column loop again after tuning, which sees no rounding."""
        return self.rounds_everywhere and self.rounds_inside and self.tune_steps > 0

    @property
    def weighs_channels(self) -> bool:
        """Tunes a loss whose channels count by what they do to the dense model's predictions."""
        return self.tune_steps > 0 and self.tune_loss is TuneLoss.FISHER

    @property
    def follows_dense(self) -> bool:
        """Takes the calibration text through the dense model beside the pruned one."""
        return self.rounds_everywhere or self.tune_steps > 0

    def recorded(self) -> dict[str, Scalar]:
        """What an annotation keeps of it."""
        recorded: dict[str, Scalar] = {
            "selection": str(self.selection),
            "grouping": str(self.grouping),
            "layout": str(self.layout),
            "solver": str(self.solver),
            "true_sequential": self.true_sequential,
            "quantize": str(self.quantize),
        }
        if self.solver is Solver.SPARSEGPT:
            recorded["damping"] = self.damping
        if self.descent_passes:
            recorded["descent_passes"] = self.descent_passes
        if self.tune_steps:
            recorded |= {"tune_steps": self.tune_steps, "tune_rate": self.tune_rate, "tune_loss": str(self.tune_loss)}
        if self.quantize is Quantize.FP8:
            compensated = self.rounds_inside or self.rounds_everywhere
            recorded["fp8_rounding"] = str(self.rounding if compensated else Rounding.AFTER)
        return recorded
