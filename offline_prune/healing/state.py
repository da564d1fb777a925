"""States of an unfinished training: each rank's file in OUT's hidden folder, and the journal that counts them."""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
import torch.distributed as dist

from offline_prune.checkpoint.journal import Journal, State
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
        self._text_crc32 = 0

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
            self._text_crc32 = self._write(self._journal.folder / _TEXT, tokens)

    def save(self, training: Training) -> None:
        """Replaces the state, once all ranks have written theirs; unless it is of this step already."""
        if self.history and self.history.step == training.history.step:
            return
        files = {}
        if mine := training.state_dict():
            path = self._file(training.history.step)
            files[path.name] = self._write(path, mine)
        if distributed.is_first():
            state = self._journal.state
            files[_TEXT] = state.state_files[_TEXT] if state else self._text_crc32
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

    def _write(self, path: Path, state: Any) -> int:
        """The file's checksum, which is taken on the way: a state is too large to be read again for it."""
        with self._out.writing(path), path.open("wb") as file:
            summed = _Summed(file)
            torch.save(state, cast(IO[bytes], summed))
            file.flush()
            os.fsync(file.fileno())
        return summed.crc32


class _Summed:
    """A file that is written from its beginning to its end, and the checksum of what has been written.

    Attributes:
        crc32: as `journal.crc32_of` finds it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc32 = file, 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
