"""What a checkpoint in the making consists of: lines of JSON, each with a checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from offline_prune.checkpoint.merge import read_header
from vllm_spense.errors import SpenseError

FILE = "journal.jsonl"
#: The part that holds what is in no decoder block.
OUTSIDE_BLOCKS = "outside the blocks"
#: In the run's line of one that was begun to replace what is in OUT: one that resumes it may do so too.
REPLACES = "replaces"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A finished part of the checkpoint.

    Attributes:
        name: of a block, or of what else the part holds.
        file: its safetensors file, in the journal's folder.
        crc32: of the file.
        record: what a run that goes on must know of it: `prune` has a list of `LayerReport` as JSON objects, or None
            where nothing is pruned, `heal` None.
        beside: more safetensors files that belong to the part and are no weights → crc32.
    """

    name: str
    file: str
    crc32: int
    record: Any
    beside: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """All files of the part → crc32."""
        return {self.file: self.crc32, **self.beside}


@dataclass(frozen=True)
class State:
    """What a run needs to go on: training from a step, pruning with the text that the dense model wrote.

    It replaces the state before, and is no part of the checkpoint.

    Attributes:
        state_files: names of the files, in the journal's folder → crc32.
        record: what is small of it, as JSON: `heal` has a `History`, `prune` None.
    """

    state_files: dict[str, int]
    record: Any


@dataclass(frozen=True)
class Ending:
    """All parts are finished and all other files are written; what is left is to move them to OUT.

    Attributes:
        files: name in OUT → name in the journal's folder, for each file of the checkpoint.
        merged: the name in OUT of the one file that all parts become; None where each becomes a shard.
        replaced: names of files that were in OUT and that this checkpoint replaces.
    """

    files: dict[str, str]
    merged: str | None
    replaced: list[str]


@dataclass
class Journal:
    """The first line is about the run, then there is one for each finished part or state, and at last the ending.

    A line counts once it is whole; a last line that is not was being written when the run was killed.

    Attributes:
        run: whatever decides the run's result, by name.
    """

    folder: Path
    run: Mapping[str, Any]
    parts: list[Part] = field(default_factory=list)
    ending: Ending | None = None
    state: State | None = None

    @classmethod
    def read(cls, folder: Path, say: Say = lambda _: None, file: str = FILE) -> Journal | None:
        """The journal in a folder; None if its first line was not finished.

        Args:
            say: told about damage, before which everything counts.

        Raises:
            SpenseError: it cannot be read, or damage leaves nothing that a run can go on from.
        """
        path = folder / file
        try:
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        except OSError as error:
            raise SpenseError(f"{path}: cannot be read: {error.strerror}") from None
        entries = [_parsed(line) for line in lines]
        if not entries:
            return None
        intact = entries.index(None) if None in entries else len(entries)
        if not intact or (entries[-1] and "files" in entries[-1] and intact < len(entries)):
            raise SpenseError(
                f"{path}: line {intact + 1} is damaged, and no run can go on from it; --overwrite starts anew"
            )
        if intact < len(entries):
            say(f"{path}: line {intact + 1} is damaged; {intact - 1} parts before it are kept, the others made again")
        run, *others = [entry for entry in entries[:intact] if entry is not None]
        ending = Ending(**others.pop()) if others and "files" in others[-1] else None
        states = [State(**entry) for entry in others if "state_files" in entry]
        parts = [Part(**entry) for entry in others if "state_files" not in entry]
        return cls(folder, run, parts, ending, states[-1] if states else None)

    @property
    def begun(self) -> bool:
        """Whether there is anything that a run can go on from."""
        return bool(self.parts or self.state or self.ending)

    @property
    def finished(self) -> dict[str, Any]:
        """The records of all finished parts, by name."""
        return {part.name: part.record for part in self.parts}

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part."""
        file = next(part.file for part in self.parts if part.name == name)
        return load_file(self.folder / file)

    def beside(self) -> dict[str, torch.Tensor]:
        """The tensors that belong to all finished parts and are no weights."""
        files = [self.folder / file for part in self.parts for file in part.beside]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def drop_damaged(self, say: Say) -> None:
        """Forgets the first part with a file that is not as it was written, and those after it; and a damaged state."""
        for name, crc32 in self.state.state_files.items() if self.state else ():
            if damage := _changed(self.folder / name, crc32):
                say(f"{self.folder / name}: {damage}; all of it begins anew")
                # Parts are made with it, or of what training ends with.
                self.state, self.parts = None, []
                return
        for index, part in enumerate(self.parts):
            for name, crc32 in part.files.items():
                file = self.folder / name
                damage = _damage(file, crc32)
                if damage:
                    say(f"{file}: {damage}; {index} parts before it are kept, the others made again")
                    del self.parts[index:]
                    return

    def start(self) -> None:
        """Writes the journal anew, which drops lines that do not count."""
        file = self.folder / FILE
        states = [vars(self.state)] if self.state else []
        entries: list[Mapping[str, Any]] = [self.run, *states, *map(vars, self.parts)]
        temporary = file.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as out:
            out.writelines(map(_line, entries))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)

    def add(self, name: str, file: Path, record: Any, beside: Sequence[Path] = ()) -> None:
        """A part that is on the disk."""
        part = Part(name, file.name, crc32_of(file), record, {each.name: crc32_of(each) for each in beside})
        self._append(vars(part))
        self.parts.append(part)

    def keep(self, state_files: dict[str, int], record: Any) -> None:
        """A state that is on the disk, instead of the one before; files that only that one has are removed.

        Args:
            state_files: names in the journal's folder → `crc32_of` them.
        """
        old, self.state = self.state, State(state_files, record)
        self._append(vars(self.state))
        for name in old.state_files if old else ():
            if name not in state_files:
                (self.folder / name).unlink(missing_ok=True)

    def end(self, ending: Ending) -> None:
        self._append(vars(ending))
        self.ending = ending

    def require(self, run: Mapping[str, Any]) -> None:
        """Raises SpenseError unless this journal is of a run like `run`; names what differs."""
        expected = json.loads(json.dumps(dict(run)))
        different = [
            f"{key}: found {self.run.get(key)}, expected {expected.get(key)}"
            for key in {**expected, **self.run}
            if key != REPLACES and self.run.get(key) != expected.get(key)
        ]
        if different:
            raise SpenseError(
                f"{self.folder}: --resume cannot go on with a run of other settings ({'; '.join(different)}); "
                "give the same ones, or start anew with --overwrite"
            )

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / FILE).open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line(entry: Mapping[str, Any]) -> str:
    text = json.dumps(dict(entry))
    return json.dumps([zlib.crc32(text.encode()), json.loads(text)]) + "\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a line says, or None if it is damaged."""
    try:
        checksum, entry = json.loads(line)
    except (ValueError, TypeError):
        return None
    intact = isinstance(entry, dict) and checksum == zlib.crc32(json.dumps(entry).encode())
    return entry if intact else None


def _damage(file: Path, crc32: int) -> str | None:
    """What is wrong with a part's file, if anything."""
    try:
        read_header(file)
    except (OSError, ValueError) as error:
        return f"damaged: {error}"
    return _changed(file, crc32)


def _changed(file: Path, crc32: int) -> str | None:
    try:
        return None if crc32_of(file) == crc32 else "not what was written"
    except OSError as error:
        return f"damaged: {error}"


def crc32_of(path: Path) -> int:
    """Checksum of a file's bytes."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            found = zlib.crc32(chunk, found)
    return found
