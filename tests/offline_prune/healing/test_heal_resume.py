"""Healing that is cut off ends where an uninterrupted one does; several ranks train as one does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from forked import run_program, run_ranks
from heal_runs import Pair, cut_off, healed, settings
from runs import contents

from offline_prune.checkpoint import state_file
from offline_prune.checkpoint.journal import Journal
from offline_prune.checkpoint.output_folder import PARTIAL
from offline_prune.healing import pipeline, training
from offline_prune.healing.pipeline import heal
from offline_prune.healing.report import HealReport
from vllm_spense.errors import SpenseError

#: `spense heal` that is killed after so many steps.
KILLED = """
import os, signal, sys

import torch

from offline_prune.cli import main
from offline_prune.healing import pipeline

pipeline.compute_dtype = lambda device: torch.float32
heal = pipeline.heal


def killed(settings, progress, say):
    def count(done, total, loss):
        if done == 9:
            os.kill(os.getpid(), signal.SIGKILL)
    return heal(settings, count, say)


pipeline.heal = killed
main(["heal", *sys.argv[1:]])
"""


IN_FLOAT32 = """
import sys

import torch

from offline_prune.cli import main
from offline_prune.healing import pipeline

pipeline.compute_dtype = lambda device: torch.float32
main(["heal", *sys.argv[1:]])
"""


def arguments(pair: Pair, out: Path, **changes: object) -> list[str]:
    """As `heal_runs.settings` has them, but for `changes`."""
    options = {
        "teacher": pair.teacher,
        "calibration": pair.text,
        "samples": 64,
        "length": 64,
        "step-tokens": 256,
        "heldout": 0.1,
        "epochs": 1,
        "rate": 0.01,
        "device": "cpu",
        "save-minutes": 0,
        **changes,
    }
    return [
        str(pair.pruned),
        str(out),
        *(str(each) for name, value in options.items() for each in (f"--{name}", value)),
    ]


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    pair: Pair, tmp_path: Path, whole: tuple[Path, HealReport]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    ended = run_program(program, *arguments(pair, tmp_path / "out"), environment=os.environ)
    assert ended.returncode == -signal.SIGKILL, ended.stdout
    assert not (tmp_path / "out/config.json").exists()
    out, expected = whole
    said: list[str] = []
    resumed = heal(settings(pair, tmp_path / "out", resume=True), say=said.append)
    # The state before it took the ninth step, whose loss had shown that the weights were good.
    assert "goes on after step 8 of 14" in said
    assert contents(tmp_path / "out") == contents(out)
    assert resumed.history == expected.history


def test_a_run_that_is_cut_off_before_its_first_step_is_resumed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = healed(pair, tmp_path / "whole", epochs=2, samples=32)
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_gradients", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            healed(pair, tmp_path / "out", epochs=2, samples=32)
    assert len(whole.history.losses) == 14, "two epochs of seven steps"
    assert [file.name for file in (tmp_path / "out" / PARTIAL).glob("state-*")] == ["state-text"], "PRUNED has the rest"
    resumed = healed(pair, tmp_path / "out", epochs=2, samples=32, resume=True)
    assert resumed.history == whole.history


def test_what_a_teacher_wrote_is_kept_before_anything_is_judged(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"calibration": "generated", "samples": 16, "length": 16, "step_tokens": 64}
    whole = healed(pair, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_judge", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            healed(pair, tmp_path / "out", **options)
    monkeypatch.setattr(pipeline, "joined", lambda *_: pytest.fail("the teacher wrote again"))
    resumed = healed(pair, tmp_path / "out", resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert resumed.history == whole.history


def test_an_interruption_while_a_state_is_written_leaves_the_one_before(
    pair: Pair, tmp_path: Path, whole: tuple[Path, HealReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = state_file._Summed.write

    def interrupted(self: state_file._Summed, data: bytes) -> int:
        written.append(len(data))
        # Of the sixth step's state.
        if len(list((tmp_path / "out" / PARTIAL).glob("state-6-*"))) == 1 and len(written) % 9 == 0:
            raise KeyboardInterrupt
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(state_file._Summed, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            healed(pair, tmp_path / "out", save_minutes=0)
    said: list[str] = []
    heal(settings(pair, tmp_path / "out", resume=True, checkpointing=True), say=said.append)
    assert "goes on after step 5 of 14" in said
    assert contents(tmp_path / "out") == contents(whole[0])


def test_after_its_last_step_a_run_needs_only_what_it_writes(
    pair: Pair, tmp_path: Path, whole: tuple[Path, HealReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, expected = whole
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_weights", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            healed(pair, tmp_path / "out")
    (state,) = (tmp_path / "out" / PARTIAL).glob("state-*-rank-0")
    assert list(torch.load(state, weights_only=True)) == ["best"]
    monkeypatch.setattr(training.Training, "_update", _interrupt)
    resumed = healed(pair, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(out)
    assert resumed.history == expected.history


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_unfinished_training_is_not_thrown_away_unasked(pair: Pair, tmp_path: Path) -> None:
    cut_off(pair, tmp_path / "out", 5)
    with pytest.raises(SpenseError, match=r"an unfinished run.*--resume goes on, --overwrite starts anew"):
        healed(pair, tmp_path / "out")
    with pytest.raises(SpenseError, match=r"other settings \(seed: found 0, expected 1\)"):
        healed(pair, tmp_path / "out", resume=True, seed=1)
    assert len(list((tmp_path / "out" / PARTIAL).glob("state-*"))) == 2, "the text and one state"
    healed(pair, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / PARTIAL).exists()


@pytest.mark.parametrize("name", ["state-text", "state-4-rank-0"])
@pytest.mark.parametrize("damage", ["flipped", "cut short", "missing"])
def test_a_damaged_state_is_noticed(
    name: str, damage: str, pair: Pair, tmp_path: Path, whole: tuple[Path, HealReport]
) -> None:
    cut_off(pair, tmp_path / "out", 5)
    state = tmp_path / "out" / PARTIAL / name
    data = bytearray(state.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    state.write_bytes(data[:-1] if damage == "cut short" else data)
    if damage == "missing":
        state.unlink()
    said: list[str] = []
    resumed = heal(settings(pair, tmp_path / "out", resume=True), say=said.append)
    expected = "No such file" if damage == "missing" else "not what was written"
    assert any(f"{name}: " in line and expected in line and "; all of it begins anew" in line for line in said)
    assert resumed.history == whole[1].history


def test_a_loss_that_is_not_finite_keeps_the_last_state(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = training.Training._update

    def broken(self: training.Training) -> None:
        update(self)
        if self.history.step == 5:
            self.weights[0].master.data.fill_(float("nan"))
            self.weights[0].serve()

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_update", broken)
        with pytest.raises(SpenseError) as error:
            healed(pair, tmp_path / "out", save_minutes=0)
    said = "step 7 of 14: the loss is nan; the last good state is kept: --resume with a --rate below 0.01 goes on"
    assert said in str(error.value)
    # What the sixth step made of the weights was never saved.
    journal = Journal.read(tmp_path / "out" / PARTIAL)
    assert journal
    assert journal.state
    assert journal.state.record["step"] == 5
    said_later: list[str] = []
    report = heal(settings(pair, tmp_path / "out", resume=True, rate=0.005), say=said_later.append)
    assert "--rate 0.005 from here, 0.01 before" in said_later
    assert report.history.rates == [(0, 0.01), (5, 0.005)]
    assert report.after < report.before


def test_a_finished_run_that_is_resumed_says_so(pair: Pair, whole: tuple[Path, HealReport]) -> None:
    out, first = whole
    said: list[str] = []
    again = heal(settings(pair, out, resume=True), say=said.append)
    assert said[-1] == "all of it was finished by an earlier run"
    assert again.after == first.after


def test_two_ranks_train_as_one(pair: Pair, tmp_path: Path) -> None:
    """AdamW hardly minds a gradient that is twice as large, so its norm is compared: twice a gradient, or one rank's
    alone, whose noise is larger, is off by tens of per cent; other orders of sums by millionths."""
    program = tmp_path / "main.py"
    program.write_text(IN_FLOAT32)
    said = run_ranks(program, *arguments(pair, tmp_path / "two"), "--train", "all")
    assert said.count("memory of cpu in all") == 1, "only the first rank talks"
    one = healed(pair, tmp_path / "one", train="all")
    two = json.loads((tmp_path / "two/report.json").read_text())
    losses, norms = two["history"]["losses"], two["history"]["gradient_norms"]
    assert len(losses) == len(one.history.losses)
    assert losses[:3] == pytest.approx(one.history.losses[:3], rel=1e-3)
    assert norms[:3] == pytest.approx(one.history.gradient_norms[:3], rel=1e-2)
    assert two["heldout_kl_before"] == pytest.approx(one.before, rel=1e-4)
    assert two["heldout_kl_after"] == pytest.approx(one.after, rel=0.03)


def test_two_ranks_write_half_of_the_text_each(pair: Pair, tmp_path: Path) -> None:
    """With the teacher whole on both, and spread over them afterwards."""
    program = tmp_path / "main.py"
    program.write_text(IN_FLOAT32)
    said = run_ranks(program, *arguments(pair, tmp_path / "out", calibration="generated", length=24))
    assert said.count("32 of 32 texts written") == 1, "only the first rank talks"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["heldout_kl_after"] < report["heldout_kl_before"]
