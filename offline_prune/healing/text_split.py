"""The text to train on, and the share of it that only judges."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offline_prune.healing.settings import HealSettings
from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError


@dataclass(frozen=True)
class Text:
    """int64 (n, length) each: what is trained on, and what is not."""

    training: torch.Tensor
    heldout: torch.Tensor


def heldout_sequences(settings: HealSettings) -> int:
    """How many sequences judge: the wanted share, and a multiple of the number of ranks."""
    ranks = distributed.size()
    return max(1, -(-round(settings.heldout * settings.samples) // ranks)) * ranks


def step_sequences(settings: HealSettings) -> int:
    """How many sequences a step takes, of all ranks together."""
    ranks = distributed.size()
    return max(1, settings.step_tokens // settings.length // ranks) * ranks


def steps_in_epoch(settings: HealSettings) -> int:
    """
    Raises:
        SpenseError: the text is too little for one step beside the held-out share.
    """
    heldout, each = heldout_sequences(settings), step_sequences(settings)
    steps = (settings.samples - heldout) // each
    if not steps:
        raise SpenseError(
            f"--samples: found {settings.samples} sequences of {settings.length} tokens, of which {heldout} are held "
            f"out; expected at least {heldout + each}, which is one step; or a smaller --step-tokens"
        )
    return steps


def split(tokens: torch.Tensor, settings: HealSettings) -> Text:
    """The last sequences judge: they come from other documents than those before, but for one of each source, which is
    cut."""
    heldout = heldout_sequences(settings)
    return Text(tokens[:-heldout], tokens[-heldout:])


def order(count: int, epoch: int, seed: int) -> torch.Tensor:
    """The order of an epoch's sequences."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
