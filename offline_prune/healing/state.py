"""States of an unfinished training: each rank's file in OUT's hidden folder, and the journal that counts them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from offline_prune.checkpoint.journal import Journal, State
from offline_prune.checkpoint.output_folder import OutputFolder
from offline_prune.checkpoint.state_file import write_state
from offline_prune.healing.training import History, Training
from offline_prune.runtime import distributed

_TEXT = "state-text"


class SavedStates:
    """The last state that is on the disk.

    Args:
        out: whose lock the first rank holds.
        journal: the writer's on the first rank, which is written; a copy of it on the others.
    """

    def __init__(self, out: OutputFolder, journal: Journal) -> None:
        self._out, self._journal = out, journal

    @property
    def history(self) -> History | None:
        """Of the state; None where there is none."""
        return History.from_dict(self._journal.state.record) if self._journal.state else None

    def text(self) -> torch.Tensor:
        """The text that the run trains on."""
        return torch.load(self._journal.folder / _TEXT, weights_only=True)

    def save_text(self, tokens: torch.Tensor) -> None:
        """The state of a run that has a text and nothing else, which a teacher may have written for long."""
        record = asdict(History())
        if distributed.is_first():
            path = self._journal.folder / _TEXT
            with self._out.writing(path):
                self._journal.keep({_TEXT: write_state(path, tokens)}, record)
        else:
            self._journal.state = State({}, record)

    def save(self, training: Training) -> None:
        """Replaces the state, once all ranks have written theirs; unless it is of this step already, and judged."""
        before, state = self.history, self._journal.state
        assert before
        assert state
        if before.heldout and before.step == training.history.step:
            return
        files = {}
        if mine := training.state_dict():
            path = self._file(training.history.step)
            with self._out.writing(path):
                files[path.name] = write_state(path, mine)
        if distributed.is_first():
            files[_TEXT] = state.state_files[_TEXT]
        if distributed.size() > 1:
            found: list[dict[str, int]] = [{}] * distributed.size()
            dist.all_gather_object(found, files)
            files = {name: crc32 for each in found for name, crc32 in each.items()}
        record = asdict(training.history)
        if distributed.is_first():
            with self._out.writing(self._journal.folder):
                self._journal.keep(files, record)
        else:
            self._journal.state = State(files, record)

    def load(self, training: Training, history: History) -> None:
        """Takes training to where the state is."""
        path = self._file(history.step)
        there = self._journal.state and path.name in self._journal.state.state_files
        training.load_state_dict(torch.load(path, map_location="cpu", weights_only=True) if there else {}, history)

    def _file(self, step: int) -> Path:
        return self._journal.folder / f"state-{step}-rank-{distributed.rank()}"
