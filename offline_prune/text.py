"""The text that `prune` calibrates on: given, drawn from its sources, or written by the dense model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from offline_prune.calibration.data import check_vocabulary
from offline_prune.calibration.generated import generate
from offline_prune.calibration.mixture import GENERATED, drawn, mixed, shares
from offline_prune.checkpoint.journal import Journal, crc32_of
from offline_prune.checkpoint.output_folder import OutputFolder
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import whole_model
from offline_prune.runtime import distributed
from offline_prune.settings import PruneSettings

#: In OUT's hidden folder: what the dense model wrote.
_FILE = "state-text"


class CalibrationText:
    """The sequences of all ranks.

    Args:
        given: int64 (samples, length) on the first rank, which counts; None to follow the settings.
        say: told what a person should know, a line at a time.

    Attributes:
        written: sequences that the dense model is to write.
        shape: samples and length, once `draw` was called.
    """

    def __init__(
        self, model: SourceModel, settings: PruneSettings, given: torch.Tensor | None, say: Callable[[str], None]
    ) -> None:
        self._model, self._settings, self._say = model, settings, say
        self._given = distributed.broadcast_from_first(lambda: given)
        self._parts: dict[str, torch.Tensor] = {}
        share = shares(settings.sources, settings.samples).get(GENERATED, 0)
        self.written = share if self._given is None else 0
        self.shape: tuple[int, int] = settings.samples, settings.length
        if self._given is not None:
            samples, length = self._given.shape
            self.shape = samples, length

    def draw(self) -> None:
        """Draws what needs no model.

        Raises:
            SpenseError: see `calibration.data.calibration_tokens`.
        """
        self._parts = distributed.broadcast_from_first(self._drawn)

    def fingerprint(self) -> str:
        """Of what was given or drawn; what the dense model writes follows from settings that a run is known by."""
        found = hashlib.sha256()
        for tokens in self._parts.values():
            found.update(tokens.cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def whole(
        self, device: torch.device, dtype: torch.dtype, at_once: int, out: OutputFolder, journal: Journal
    ) -> torch.Tensor:
        """All of it, int64 (samples, length). What the dense model writes is kept for a run that resumes.

        Args:
            at_once: how many sequences are written together.
            out: whose lock the first rank holds.
            journal: the writer's on the first rank; a copy of it on the others.
        """
        if self._given is not None:
            return self._given
        if self.written:
            found = self._written_before(journal)
            self._parts[GENERATED] = self._write(device, dtype, at_once, out, journal) if found is None else found
        return mixed(self._parts, self._settings.sources, self._settings.seed)

    def _drawn(self) -> dict[str, torch.Tensor]:
        settings, model = self._settings, self._model
        if self._given is not None:
            parts = {"": self._given}
        else:
            shape = settings.samples, settings.length
            parts = drawn(settings.sources, model.tokenizer, *shape, settings.seed, self._say)
        embeddings = cast(nn.Embedding, model.text.get_input_embeddings()).num_embeddings
        for tokens in parts.values():
            check_vocabulary(tokens, embeddings)
        return parts

    def _written_before(self, journal: Journal) -> torch.Tensor | None:
        """What the run that is resumed wrote, if it came that far."""

        def read() -> torch.Tensor | None:
            return torch.load(journal.folder / _FILE, weights_only=True) if journal.state else None

        return distributed.broadcast_from_first(read)

    def _write(
        self, device: torch.device, dtype: torch.dtype, at_once: int, out: OutputFolder, journal: Journal
    ) -> torch.Tensor:
        settings = self._settings
        with whole_model(self._model, device, dtype):
            shape = self.written, settings.length
            tokens = generate(self._model, device, *shape, settings.seed, at_once, self._say)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # Pruning allocates other sizes.
        if distributed.is_first():
            path = journal.folder / _FILE
            with out.writing(path):
                torch.save(tokens, path)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                journal.keep({_FILE: crc32_of(path)}, None)
        return tokens
