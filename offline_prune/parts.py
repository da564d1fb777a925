"""Sums over the calibration text that come out the same however many ranks it is divided among.

The sum of floats depends on the order of additions. So the text has a fixed number of parts; each is summed on its own,
and the parts' sums are added in a fixed binary tree, of which every rank owns a subtree.
"""

from __future__ import annotations

import torch

from offline_prune import ranks

#: At most; also the largest number of ranks.
MOST = 8


def count(samples: int) -> int:
    """Into how many parts so many samples are cut: a power of two, none of them empty."""
    return min(MOST, 1 << (samples.bit_length() - 1))


def cut(samples: int) -> list[range]:
    """This rank's parts.

    Args:
        samples: of this rank.

    Returns:
        Each as the samples of this rank that it holds.
    """
    parts = count(samples * ranks.size()) // ranks.size()
    return [range(samples * i // parts, samples * (i + 1) // parts) for i in range(parts)]


class PartSums:
    """A sum over this rank's parts, then over all ranks.

    Args:
        shape: of what is summed, in float32.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._open = torch.zeros(shape, device=device)
        self._part = 0
        #: Sums of whole subtrees, of falling size.
        self._closed: list[torch.Tensor] = []

    def of(self, part: int) -> torch.Tensor:
        """What to add this part's inputs to; parts come in order and none is left out."""
        if part != self._part:
            assert part == self._part + 1
            self._close()
            self._open, self._part = torch.zeros_like(self._open), part
        return self._open

    def total(self) -> torch.Tensor:
        """The sum over the parts of all ranks, to the same bits on each. Nothing can be added after this."""
        self._close()
        (total,) = self._closed
        ranks.add_up(total)
        return total

    def _close(self) -> None:
        total, subtree = self._open, self._part
        while subtree & 1:
            total = self._closed.pop().add_(total)
            subtree >>= 1
        self._closed.append(total)
