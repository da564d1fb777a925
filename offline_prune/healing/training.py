"""The steps: gradients of the divergence, AdamW on the masters, and what the held-out text says of the result."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from offline_prune.healing.loss import chunk_tokens, divergence, divergence_and_gradient
from offline_prune.healing.models import Language
from offline_prune.healing.settings import HealSettings, Optimizer
from offline_prune.healing.text_split import Text, order, step_sequences
from offline_prune.healing.weights import TrainedWeight
from offline_prune.runtime import distributed
from offline_prune.runtime.profiler import stage
from vllm_spense.errors import SpenseError

#: How often the held-out text is looked at, evenly over the steps; the last of them is the end.
JUDGEMENTS = 8
#: Tokens that pass through the model at once, unless the user says how many: with fewer a GPU that has a small model to
#: train waits for the host.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
#: Of the largest rate, at the end.
_LAST_RATE = 0.1
_BETAS = (0.9, 0.95)
#: The library of 8-bit moments, and the extra of setup.py that brings it.
_TORCHAO = "torchao"

#: Told (steps done, steps in all, what the loss is).
Progress = Callable[[int, int, str], None]


@dataclass
class History:
    """What has happened so far.

    Attributes:
        step: steps that are done.
        losses: mean KL of the tokens of each step, in nats.
        gradient_norms: of each step's gradient, over all trained weights.
        heldout: (step, mean KL on the held-out text), step 0 first.
        best_step: after which the held-out text was predicted best.
        rates: (step, the largest rate that holds from there).
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    rates: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """From JSON of what `dataclasses.asdict` made of one."""
        pairs = {name: [(int(step), value) for step, value in data[name]] for name in ("heldout", "rates")}
        return cls(**{**data, **pairs})


def require_optimizer(optimizer: Optimizer) -> None:
    """Raises SpenseError where its library is missing."""
    if optimizer is Optimizer.ADAMW8BIT and importlib.util.find_spec(_TORCHAO) is None:
        raise SpenseError(
            f"--optimizer: {optimizer} needs {_TORCHAO}, which is not installed; pip install '.[heal]' "
            f"brings it, and {Optimizer.ADAMW} does without"
        )


def _optimizer(weights: list[TrainedWeight], settings: HealSettings) -> torch.optim.Optimizer:
    """No weight decay: less of a weight is not closer to the teacher."""
    groups = [{"params": [weight.master], "lr": settings.rate * weight.rms} for weight in weights]
    if settings.optimizer is Optimizer.ADAMW8BIT:
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, betas=_BETAS, weight_decay=0.0)
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)


class Training:
    """A student on its way to its teacher.

    Args:
        teacher, student: in memory.
        weights: of the student, that are trained.
        text: the same on all ranks.
        steps: in all.

    Attributes:
        history: so far.
        best: this rank's rows of each weight, as the file will hold them, after `history.best_step`.
    """

    def __init__(
        self,
        teacher: Language,
        student: Language,
        weights: list[TrainedWeight],
        text: Text,
        steps: int,
        settings: HealSettings,
    ) -> None:
        self.teacher, self.student, self.weights = teacher, student, weights
        self.text, self.steps, self.settings = text, steps, settings
        self.history = History()
        self.best: list[torch.Tensor] = []
        self._optimizer = _optimizer(weights, settings)
        self._at_once = sequences_at_once(settings, student.device)
        self._chunk = chunk_tokens(student.head.out_features, student.device)
        self._orders: dict[int, torch.Tensor] = {}

    def run(self, save: Callable[[], None], progress: Progress) -> None:
        """All steps that are left.

        Args:
            save: called where a resumed run may go on: at the start, at the end, and every so often where the loss has
                shown that the weights are good.

        Raises:
            SpenseError: the loss, or a gradient, is not finite.
        """
        saved = time.monotonic()
        judged = {round(self.steps * i / JUDGEMENTS) for i in range(1, JUDGEMENTS + 1)}
        with _repeatable(self.student.device):
            if not self.history.heldout:
                self._judge()
                save()
            while self.history.step < self.steps:
                loss, norm, due = self._gradients(time.monotonic() - saved >= 60 * self.settings.save_minutes)
                if due:
                    save()
                    saved = time.monotonic()
                with stage("update"):
                    self._update()
                self.history.losses.append(loss)
                self.history.gradient_norms.append(norm)
                self.history.step += 1
                if self.history.step in judged:
                    self._judge()
                if self.history.step == self.steps:
                    save()
                heldout = self.history.heldout[-1][1]
                progress(self.history.step, self.steps, f"KL {loss:.4f}, held out {heldout:.4f}")

    def _gradients(self, due: bool) -> tuple[float, float, bool]:
        """Those of one step's text; the loss, their norm, and whether the first rank finds a state due."""
        mine = self._sequences(self.history.step)
        total = torch.zeros(3, dtype=torch.float64, device=self.student.device)
        for tokens in mine.split(self._at_once):
            with stage("teacher"), torch.no_grad():
                expected = self.teacher.hidden(tokens)
            with stage("student"):
                found = self.student.hidden(tokens)
                both = (self.student.logits, self.teacher.logits)
                loss, gradient = divergence_and_gradient(found, expected, *both, self._chunk)
                found.backward(gradient / mine.numel())
            total[0] += loss
        with stage("update"):
            for weight in self.weights:
                # A rank may have no rows of a small one.
                if weight.master.numel():
                    total[1] += torch.linalg.vector_norm(weight.masked_gradient()).double().square()
            total[2] = float(due and distributed.is_first())
            distributed.all_reduce(total)
            loss, power, due = total.tolist()
            loss /= mine.numel() * distributed.size()
        norm = math.sqrt(power)
        self._refuse_not_finite(loss, norm)
        return loss, norm, bool(due)

    def _update(self) -> None:
        share = _rate_share(self.history.step, self.steps, self.settings.warm_up)
        for group, weight in zip(self._optimizer.param_groups, self.weights, strict=True):
            rate = self.settings.rate * weight.rms * share
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        for weight in self.weights:
            weight.constrain()
            weight.serve()

    def _refuse_not_finite(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
            raise SpenseError(
                f"step {self.history.step + 1} of {self.steps}: {what}; the last good state is kept: "
                f"--resume with a --rate below {self.settings.rate:g} goes on from it"
            )

    def _sequences(self, step: int) -> torch.Tensor:
        """This rank's part of a step's text, on the device."""
        each = step_sequences(self.settings)
        epoch, place = divmod(step, len(self.text.training) // each)
        if epoch not in self._orders:
            self._orders = {epoch: order(len(self.text.training), epoch, self.settings.seed)}
        chosen = self._orders[epoch][place * each : (place + 1) * each]
        return distributed.local_shard(self.text.training[chosen]).to(self.student.device)

    @torch.no_grad()
    def _judge(self) -> None:
        """Looks at the held-out text, and remembers the weights if they are the best so far."""
        mine = distributed.local_shard(self.text.heldout).to(self.student.device)
        total = torch.zeros(1, dtype=torch.float64, device=self.student.device)
        with stage("judge"):
            for tokens in mine.split(self._at_once):
                both = (self.student.logits, self.teacher.logits)
                total += divergence(self.student.hidden(tokens), self.teacher.hidden(tokens), *both, self._chunk)
            distributed.all_reduce(total)
        found = total.item() / self.text.heldout.numel()
        history = self.history
        if not math.isfinite(found):
            raise SpenseError(
                f"after step {history.step} of {self.steps}: the loss on the held-out text is {found}; "
                + ("the teacher or PRUNED is broken" if not history.step else "--resume with a lower --rate goes on")
            )
        if not history.heldout or found < min(loss for _, loss in history.heldout):
            history.best_step = history.step
            self.best = [weight.stored() for weight in self.weights]
        history.heldout.append((history.step, found))

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on from here, but for `history`, the text and PRUNED: at the start nothing, at the
        end what is to be written."""
        if not self.history.step:
            return {}
        if self.history.step == self.steps:
            return {"best": self.best}
        return {
            "masters": [weight.master.detach() for weight in self.weights],
            "optimizer": self._optimizer.state_dict(),
            "best": self.best,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], history: History) -> None:
        self.best = state["best"] if state else [weight.stored() for weight in self.weights]
        self.history = history
        if "masters" in state:
            for weight, master in zip(self.weights, state["masters"], strict=True):
                weight.master.copy_(master)
                weight.serve()
            self._optimizer.load_state_dict(state["optimizer"])


def sequences_at_once(settings: HealSettings, device: torch.device) -> int:
    """How many sequences pass through the model together, of those that a rank takes in a step."""
    wanted = (settings.batch_tokens or BATCH_TOKENS[device.type]) // settings.length
    return min(max(1, wanted), step_sequences(settings) // distributed.size())


def _rate_share(step: int, steps: int, warm_up: float) -> float:
    """Of the largest rate: rises in a line, falls as a cosine."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min((step + 1) / (warm_up * steps + 1), 1.0) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Inside, a GPU runs kernels that give the same bits each time, where it has a choice; a CPU's all do."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # mypy does not see what the module makes of its attribute.
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing here reads what it has not written, and one launch of four would only fill.
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
