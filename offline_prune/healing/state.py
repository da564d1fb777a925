"""States of an unfinished training: each rank's file in OUT's hidden folder, and the journal that counts them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from offline_prune.checkpoint.journal import Journal, State, crc32_of
from offline_prune.checkpoint.output_folder import OutputFolder
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
        """Puts the text where `save` counts it."""
        if distributed.is_first():
            self._write(self._journal.folder / _TEXT, tokens)

    def save(self, training: Training) -> None:
        """Replaces the state, once all ranks have written theirs; unless it is of this step already."""
        if self.history and self.history.step == training.history.step:
            return
        path = self._file(training.history.step)
        self._write(path, training.state_dict())
        files = {path.name: crc32_of(path)}
        if distributed.is_first():
            state = self._journal.state
            files[_TEXT] = state.state_files[_TEXT] if state else crc32_of(self._journal.folder / _TEXT)
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
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        training.load_state_dict(state, history)

    def _file(self, step: int) -> Path:
        return self._journal.folder / f"state-{step}-rank-{distributed.rank()}"

    def _write(self, path: Path, state: Any) -> None:
        with self._out.writing(path):
            torch.save(state, path)
            with path.open("rb") as written:
                os.fsync(written.fileno())
