"""Sums over the calibration text that come out the same however many ranks it is divided among.

The sum of floats depends on the order of additions. So the text has a fixed number of parts; each is summed on its own,
and the parts' sums are added in a fixed binary tree, of which every rank owns a subtree.
"""

from __future__ import annotations

import torch

from offline_prune.runtime import distributed

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
    parts = count(samples * distributed.size()) // distributed.size()
    return [range(samples * i // parts, samples * (i + 1) // parts) for i in range(parts)]


class PartSums:
    """A sum over this rank's parts, then over all ranks.

    Args:
        shape: of what is summed, in float32.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        #: Of subtrees that are whole, of falling size, and of the part that is being summed.
        self._sums = [torch.zeros(shape, device=device)]
        self._part = 0

    def of(self, part: int) -> torch.Tensor:
        """What to add this part's inputs to; parts come in order and none is left out."""
        if part != self._part:
            assert part == self._part + 1
            self._close()
            self._sums.append(torch.zeros_like(self._sums[-1]))
            self._part = part
        return self._sums[-1]

    def total(self) -> torch.Tensor:
        """The sum over the parts of all ranks, to the same bits on each. Nothing can be added after this."""
        self._close()
        (total,) = self._sums
        # Its memory goes when the caller lets it go.
        self._sums = []
        distributed.add_up(total)
        return total

    def _close(self) -> None:
        """Adds the part to its neighbour if that is whole, their sum to theirs, and so on."""
        subtree = self._part
        while subtree & 1:
            right = self._sums.pop()
            self._sums[-1].add_(right)
            subtree >>= 1
