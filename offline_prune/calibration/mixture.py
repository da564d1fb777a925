"""Calibration text of several sources: an equal share of each, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from offline_prune.calibration.data import BUILTIN, BUILTIN_CODE, calibration_tokens
from vllm_spense.errors import SpenseError

#: The source that is the dense model itself: `generated.generate`.
GENERATED = "generated"
#: What `prune` and `heal` take unless told otherwise, where the dense model can write: see
#: `text_sources.default_sources`.
DEFAULT_MIXTURE = (BUILTIN, BUILTIN_CODE, GENERATED)
#: Tokens that the dense model writes for `prune` at most where another source can give the rest. Beyond that the model
#: would write for longer than it is pruned.
MOST_WRITTEN = 2**18


def written_at_most(length: int) -> int:
    """`MOST_WRITTEN` in sequences of so many tokens, for `shares`; at least one."""
    return max(1, MOST_WRITTEN // length)


def source_names(given: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several as a tuple.

    Raises:
        SpenseError: there is none, or one twice.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names:
        raise SpenseError("--calibration: found nothing, expected at least one source")
    for name in names:
        if names.count(name) > 1:
            raise SpenseError(f"--calibration: found {name} {names.count(name)} times, expected every source once")
    return names


def shares(sources: Sequence[str], samples: int, most_written: int | None = None) -> dict[str, int]:
    """How many sequences each source gives; where they do not divide evenly, the first ones give one more.

    Args:
        most_written: sequences of `GENERATED`; if its share is larger, other sources give the rest. None for no limit.

    Raises:
        SpenseError: some would give none.
    """
    if samples < len(sources):
        raise SpenseError(f"--samples: found {samples}, expected at least {len(sources)}, one of each --calibration")
    found = {name: samples // len(sources) + (i < samples % len(sources)) for i, name in enumerate(sources)}
    others = [name for name in sources if name != GENERATED]
    if others and most_written is not None and found.get(GENERATED, 0) > most_written:
        found |= {**shares(others, samples - most_written), GENERATED: most_written}
    return found


def drawn(
    wanted: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """The shares of all sources but `GENERATED`: name → int64 (share, length).

    Args:
        wanted: `shares`.

    Raises:
        SpenseError: as `data.calibration_tokens`.
    """
    return {
        name: calibration_tokens(name, tokenizer, share, length, seed, say)
        for name, share in wanted.items()
        if name != GENERATED
    }


def mixed(parts: Mapping[str, torch.Tensor], sources: Sequence[str], seed: int) -> torch.Tensor:
    """All shares in one text, int64 (samples, length).

    The seed draws which source each place is for. A source's sequences keep their order, so that the last ones of the
    text come from other documents than those before, whatever their source.
    """
    shape = [len(parts[name]) for name in sources]
    source_of = torch.arange(len(sources)).repeat_interleave(torch.tensor(shape))
    source_of = source_of[torch.randperm(len(source_of), generator=torch.Generator().manual_seed(seed))]
    text = torch.cat([parts[name] for name in sources])
    return text[source_of.argsort(stable=True).argsort()]
