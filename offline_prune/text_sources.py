"""The text that `prune` calibrates on: given, drawn from its sources, or written by the dense model.

And what `prune` and `heal` take where nobody says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from offline_prune.calibration.data import check_vocabulary
from offline_prune.calibration.generated import FEWEST_AT_ONCE, PIECE, Writer, joined, pieces
from offline_prune.calibration.mixture import DEFAULT_MIXTURE, GENERATED, drawn, mixed, shares
from offline_prune.checkpoint.journal import Journal
from offline_prune.checkpoint.output_folder import OutputFolder
from offline_prune.checkpoint.state_file import write_state
from offline_prune.memory_plan import GIB, whole_memory
from offline_prune.methods.recipe import Solver
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import whole_model
from offline_prune.runtime import distributed
from offline_prune.runtime.device import compute_dtype
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

#: Tokens times weights that a CPU computes while it writes by default, which takes two cores about two minutes.
_MOST_ON_CPU = 2**41
#: What tokens are called that a caller brought and has not named.
GIVEN = "given tokens"
#: In OUT's hidden folder: what the dense model wrote.
_FILE = "state-text"


def default_sources(
    model: SourceModel,
    given: torch.Tensor | None,
    samples: int,
    length: int,
    most_written: int | None,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """What to calibrate or train on where nobody says: `DEFAULT_MIXTURE`, or its built-in part where the dense model
    cannot write.

    It can where it has a head and `FEWEST_AT_ONCE` texts of `PIECE` tokens fit the device whole, whatever else is on it
    now: so a run that resumes decides the same. On a CPU it must also be done soon, by `_MOST_ON_CPU`.

    Args:
        given: tokens that a caller brought, if any: they are called `GIVEN`.
        samples, length: how many sequences of how many tokens; where there are fewer than sources, the first sources
            give one each.
        most_written: sequences that the dense model writes at most, as of `shares`.
        say: told why it cannot.
    """
    if given is not None:
        return (GIVEN,)
    built_in = tuple(name for name in DEFAULT_MIXTURE if name != GENERATED)
    if samples < len(DEFAULT_MIXTURE):
        return built_in[:samples]
    try:
        writer = Writer.of(model, compute_dtype(device))
    except SpenseError:
        why = "has no way to generate text"
    else:
        needed, room = writer.bytes(FEWEST_AT_ONCE, PIECE), whole_memory(device)
        tokens = shares(DEFAULT_MIXTURE, samples, most_written)[GENERATED] * length
        if needed > room:
            why = f"needs {needed / GIB:.2f} GiB to write, and {device} has {room / GIB:.2f} GiB in all"
        elif device.type == "cpu" and tokens * writer.weights > _MOST_ON_CPU:
            why = f"would take long to write {tokens} tokens on a CPU"
        else:
            return DEFAULT_MIXTURE
    say(
        f"--calibration: {' and '.join(built_in)} alone, because the dense model {why}; what it wrote elsewhere, "
        "as another --calibration, helps on text unlike docstrings and code"
    )
    return built_in


def _widest_hessian(model: SourceModel) -> int:
    """The most inputs that a projection of a pruned MLP has, or one of an expert: columns of its Hessian."""
    sizes = [(mlp.hidden, mlp.intermediate) for block in model.blocks for mlp in block.mlps]
    sizes += [(experts.hidden, experts.intermediate) for experts in model.experts.values()]
    return max(map(max, sizes), default=0)


def shaped_as(given: torch.Tensor, settings: PruneSettings) -> PruneSettings:
    """Settings with the samples and the length of tokens that a caller brought.

    Raises:
        SpenseError: they are not integers, or not of the shape (samples, length).
    """
    if given.ndim != 2 or not given.numel() or given.dtype not in (torch.int32, torch.int64):
        raise SpenseError(f"tokens: found {given.dtype} {tuple(given.shape)}, expected int64 (samples, length)")
    samples, length = given.shape
    return replace(settings, samples=samples, length=length)


class CalibrationText:
    """The sequences of all ranks.

    Args:
        given: int64 (samples, length), as the settings have them; None to follow the settings' sources.
        say: told what a person should know, a line at a time.

    Attributes:
        written: texts that the dense model is to write, of `PIECE` tokens or as many as a sequence has.
    """

    def __init__(
        self, model: SourceModel, settings: PruneSettings, given: torch.Tensor | None, say: Callable[[str], None]
    ) -> None:
        self._model, self._settings, self._say = model, settings, say
        self._given = given
        self._parts: dict[str, torch.Tensor] = {}
        share = settings.shares.get(GENERATED, 0)
        self.written = pieces(share, settings.length)[0] if given is None else 0

    def draw(self) -> None:
        """Draws what needs no model, and says where all of the text will be too little.

        Raises:
            SpenseError: see `calibration.data.calibration_tokens`.
        """
        self._parts = distributed.broadcast_from_first(self._drawn)
        samples, length, columns = self._settings.samples, self._settings.length, _widest_hessian(self._model)
        if self._settings.recipe.solver is Solver.SPARSEGPT and samples * length < columns:
            found = f"{samples * length} tokens ({samples} × {length})"
            self._say(
                f"calibration text: found {found}, expected at least {columns}, the columns of the widest Hessian, "
                "which is singular with fewer; raise --samples or --length"
            )

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
            parts = drawn(settings.shares, model.tokenizer, settings.length, settings.seed, self._say)
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
        share = settings.shares[GENERATED]
        with whole_model(self._model, device, dtype):
            tokens = joined(self._model, device, share, settings.length, settings.seed, at_once, self._say)
        if distributed.is_first():
            path = journal.folder / _FILE
            with out.writing(path):
                journal.keep({_FILE: write_state(path, tokens)}, None)
        return tokens
