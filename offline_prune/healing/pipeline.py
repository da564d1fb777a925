"""The order of work: open both models → text → train → checkpoint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from offline_prune.calibration.context_length import within_context
from offline_prune.calibration.data import check_vocabulary
from offline_prune.calibration.generated import joined
from offline_prune.calibration.mixture import GENERATED, drawn, mixed, shares
from offline_prune.calibration.sources import require_sources
from offline_prune.checkpoint.journal import Journal, Say
from offline_prune.checkpoint.output_folder import OutputFolder, require_apart
from offline_prune.checkpoint.verify import Checkpoint, open_checkpoint
from offline_prune.checkpoint.writer import CheckpointWriter
from offline_prune.healing.models import Language, require_alike
from offline_prune.healing.plan import HealPlan, heal_plan
from offline_prune.healing.report import HealReport
from offline_prune.healing.settings import HealSettings
from offline_prune.healing.state import SavedStates
from offline_prune.healing.text_split import heldout_sequences, split, step_sequences, steps_in_epoch
from offline_prune.healing.training import History, Progress, Training, require_optimizer
from offline_prune.healing.weights import trained_names, trained_weights
from offline_prune.healing.writing import pruning_report, write_rest, write_weights
from offline_prune.memory_plan import GIB
from offline_prune.model.loading import SourceModel
from offline_prune.runtime import distributed
from offline_prune.runtime.circumstances import circumstances
from offline_prune.runtime.device import compute_dtype, pick_device
from offline_prune.runtime.profiler import Profiler
from offline_prune.text_sources import default_sources
from vllm_spense.errors import SpenseError

#: Nats from the teacher that even a small model at 50%, pruned by magnitude, does not lose.
_SUSPICIOUS = 5.0
#: Settings that a resumed run may have others of.
_MAY_DIFFER = (
    *("pruned", "out", "teacher", "rate", "device", "checkpointing"),
    *("save_minutes", "overwrite", "resume", "trust_remote_code"),
)


def heal(settings: HealSettings, progress: Progress = lambda *_: None, say: Say = lambda _: None) -> HealReport:
    """Trains the kept weights of a Spense checkpoint towards the dense model's logits, and writes the result, together
    with the other processes if torchrun started several.

    The loss is the mean over positions of KL(teacher ‖ student) of the next token. Zeros of the sparse regions stay
    zero, FP8 weights are rounded in every step as the file will hold them, and what is written is the state that a
    held-out share of the text found best.

    Args:
        settings: what to do.
        progress: told about every step.
        say: told what a person should know, a line at a time: the plan, warnings.

    Returns:
        The report that also lies beside the checkpoint.

    Raises:
        SpenseError: bad input of any kind, too little memory, a loss that is not finite. The last state is kept for
            `resume`.
    """
    require_optimizer(settings.optimizer)
    device = pick_device(settings.device)
    with distributed.process_group(device), ExitStack() as context:
        distributed.require_power_of_two()
        if not distributed.is_first():
            progress, say = (lambda *_: None), (lambda _: None)
        checkpoint = open_checkpoint(settings.pruned)
        if checkpoint.annotation.experts:
            raise SpenseError(
                f"{settings.pruned}: found routed experts ({next(iter(checkpoint.annotation.experts))}), which `spense "
                "heal` does not train; expected one MLP in each block"
            )
        out = OutputFolder(settings.out, settings.overwrite, settings.resume, say)
        distributed.broadcast_from_first(lambda: _take(out, settings, context))
        return _Run(checkpoint, settings, device, out, progress, say).run(context)


def _take(out: OutputFolder, settings: HealSettings, context: ExitStack) -> None:
    """Keeps other runs away from OUT, and what lacks its text from the teacher's download."""
    # A run that goes on has its text beside its state.
    if settings.calibration is not None and not settings.resume:
        require_sources(settings.sources)
    require_apart(settings.pruned, out.path, "PRUNED")
    if Path(settings.teacher).is_dir():
        require_apart(Path(settings.teacher), out.path, "--teacher")
    context.enter_context(out)


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: HealSettings,
        device: torch.device,
        out: OutputFolder,
        progress: Progress,
        say: Say,
    ) -> None:
        self.checkpoint, self.device, self.out = checkpoint, device, out
        self.dtype = compute_dtype(device)
        self.progress, self.say = progress, say
        trust = settings.trust_remote_code
        self.student = SourceModel(str(settings.pruned), trust, as_stored=True)
        self.teacher = SourceModel(settings.teacher, trust)
        require_alike(self.teacher, self.student)
        wanted = settings.samples, settings.length
        samples, length = within_context(*wanted, self.student.text.config, "text", say)
        settings = replace(settings, samples=samples, length=length)
        if settings.calibration is None:
            sources = distributed.broadcast_from_first(
                lambda: default_sources(self.teacher, None, samples, length, most_written=None, device=device, say=say)
            )
            settings = replace(settings, calibration=sources)
        self.settings = settings
        self.steps = steps_in_epoch(self.settings) * settings.epochs
        self.names = trained_names(self.student, checkpoint, settings.train)
        self.profiler = Profiler(device)
        #: Only the first rank has one.
        self.writer: CheckpointWriter | None = None
        self.report = HealReport(
            settings={**asdict(self.settings), "out": str(settings.out), "pruned": str(settings.pruned)},
            steps=self.steps,
            tokens=self.steps * step_sequences(self.settings) * self.settings.length,
            heldout_tokens=heldout_sequences(self.settings) * self.settings.length,
            pruning=pruning_report(checkpoint),
        )

    def run(self, context: ExitStack) -> HealReport:
        start = time.perf_counter()
        with self.profiler.running():
            plan = distributed.broadcast_from_first(self._plan)
            for line in plan.lines():
                self.say(line)
            journal = distributed.broadcast_from_first(lambda: self._open(context))
            states = SavedStates(self.out, journal)
            if journal.ending:
                self.report.history = states.history or History()
                self.say("all of it was finished by an earlier run")
                return self.report
            training = self._training(states, plan, context)
            training.run(lambda: self._save(states, training), self.progress)
            self.report.history = training.history
            with self.profiler.stage("write"):
                finished = set(journal.finished)
                write_weights(self.writer, finished, self.checkpoint, self.student, training.weights, training.best)
            self._close_report(plan, start)
            if self.writer:
                write_rest(self.writer, self.checkpoint, self.teacher.folder, self.settings, self.report, self.say)
        if self.report.history.best_step == 0:
            self.say(
                f"no state predicted the held-out text better than PRUNED (KL {self.report.before:.4f}): its weights "
                "are written unchanged; try more text, text like what is served, or a lower --rate"
            )
        return self.report

    def _save(self, states: SavedStates, training: Training) -> None:
        history = training.history
        if history.step == 0 and history.heldout[0][1] > _SUSPICIOUS:
            self.say(
                f"KL {history.heldout[0][1]:.2f} before the first step: is {self.settings.teacher} the model that "
                f"{self.settings.pruned} was made from?"
            )
        states.save(training)

    def _plan(self) -> HealPlan:
        return heal_plan(self.student, self.checkpoint, self.names, self.settings, self.device, self.dtype)

    def _open(self, context: ExitStack) -> Journal:
        """Starts the checkpoint; what is finished of it already."""
        self.writer = context.enter_context(CheckpointWriter(self.out, self._identity(), self.say))
        return self.writer.journal

    def _identity(self) -> dict[str, object]:
        """Whatever decides the result, by name: what a run that is resumed must have in common with this one."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in _MAY_DIFFER}
        return {
            **settings,
            "PRUNED": self.checkpoint.tensors.fingerprint(),
            "teacher": self.teacher.tensors.fingerprint(),
            **circumstances(self.device, self.dtype),
        }

    def _training(self, states: SavedStates, plan: HealPlan, context: ExitStack) -> Training:
        """Both models in memory, the text, and training at its start or where a run was cut off."""
        settings, history = self.settings, states.history
        tokens, parts = states.text() if history else None, dict[str, torch.Tensor]()
        written = 0 if history else shares(settings.sources, settings.samples).get(GENERATED, 0)
        if tokens is None:
            with self.profiler.stage("text"):
                parts = distributed.broadcast_from_first(self._drawn)
        with self.profiler.stage("load"):
            teacher = Language(self.teacher, self.device, self.dtype, context, whole=bool(written))
            teacher.check_logits()  # Before it writes, which takes longer.
        if written:
            shape = written, settings.length
            with self.profiler.stage("text"):
                parts[GENERATED] = joined(
                    self.teacher, self.device, *shape, settings.seed, plan.written_at_once, self.say
                )
            teacher.spread()
        if tokens is None:
            tokens = mixed(parts, settings.sources, settings.seed)
        check_vocabulary(tokens, teacher.head.out_features)
        with self.profiler.stage("load"):
            student = Language(
                self.student, self.device, self.dtype, context, trained=self.names, checkpointing=plan.checkpointing
            )
            student.check_logits()
            weights = trained_weights(student, self.checkpoint, self.names, self.device)
        training = Training(teacher, student, weights, split(tokens, settings), self.steps, settings)
        if history:
            states.load(training, history)
            self.say(f"goes on after step {history.step} of {self.steps}")
        else:
            states.save_text(tokens)
        self._note_rate(training.history)
        return training

    def _drawn(self) -> dict[str, torch.Tensor]:
        settings = self.settings
        wanted = shares(settings.sources, settings.samples)
        return drawn(wanted, self.student.tokenizer, settings.length, settings.seed, self.say)

    def _note_rate(self, history: History) -> None:
        rate = self.settings.rate
        if history.rates and history.rates[-1][1] != rate:
            self.say(f"--rate {rate:g} from here, {history.rates[-1][1]:g} before")
        if not history.rates or history.rates[-1][1] != rate:
            history.rates.append((history.step, rate))

    def _close_report(self, plan: HealPlan, start: float) -> None:
        report = self.report
        report.stages = dict(self.profiler.seconds)
        report.seconds = time.perf_counter() - start
        report.planned_gib = plan.on_device / GIB
        on_cpu = self.device.type == "cpu"
        report.peak_gib = (self.profiler.peak_host if on_cpu else self.profiler.peak_device) / GIB
