"""What an unfinished checkpoint consists of: lines of JSON, the first of them about the run as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_spense.errors import SpenseError

FILE = "journal.jsonl"


@dataclass(frozen=True)
class Part:
    """A finished part of the checkpoint.

    Attributes:
        name: of a block, or of what else the part holds.
        file: its safetensors file, in the journal's folder.
        record: what the run wants to know about it later.
    """

    name: str
    file: str
    record: Any


@dataclass
class Journal:
    """A part is finished once its line is whole; a line that is not was being written when the run was killed.

    Attributes:
        run: whatever decides the run's result, by name.
    """

    folder: Path
    run: Mapping[str, Any]
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal in a folder; None if its first line was not finished."""
        file = folder / FILE
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        if not lines:
            return None
        first, *others = map(json.loads, lines)
        return cls(folder, first, [Part(**line) for line in others])

    @property
    def finished(self) -> dict[str, Any]:
        """The records of all finished parts, by name."""
        return {part.name: part.record for part in self.parts}

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part."""
        file = next(part.file for part in self.parts if part.name == name)
        return load_file(self.folder / file)

    def start(self) -> None:
        """Writes the journal anew, which drops a last line that was not finished."""
        file = self.folder / FILE
        lines = [self.run, *(vars(part) for part in self.parts)]
        temporary = file.with_suffix(".new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(file)

    def add(self, part: Part) -> None:
        with (self.folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(part)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.parts.append(part)

    def require(self, run: Mapping[str, Any]) -> None:
        """Raises SpenseError unless this journal is of a run like `run`; names what differs."""
        expected = json.loads(json.dumps(dict(run)))
        different = [
            f"{key}: found {self.run.get(key)}, expected {expected.get(key)}"
            for key in {**expected, **self.run}
            if self.run.get(key) != expected.get(key)
        ]
        if different:
            raise SpenseError(
                f"{self.folder}: --resume cannot go on with a run of other settings ({'; '.join(different)}); "
                "give the same ones, or start anew with --overwrite"
            )
