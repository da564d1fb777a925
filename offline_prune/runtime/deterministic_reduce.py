"""Sums over the calibration text that come out the same however many ranks it is divided among.

The sum of floats depends on the order of additions. So the text has a fixed number of shards; each is summed on its
own, and their sums are added in a fixed binary tree, of which every rank owns a subtree.
"""

from __future__ import annotations

import torch

from offline_prune.runtime import distributed

#: At most; also the largest number of ranks.
MAX_SHARDS = 8


def shard_count(samples: int) -> int:
    """Into how many shards so many samples are cut: a power of two, none of them empty."""
    return min(MAX_SHARDS, 1 << (samples.bit_length() - 1))


def local_shards(samples: int) -> list[range]:
    """This rank's shards.

    Args:
        samples: of this rank.

    Returns:
        Each as the samples of this rank that it holds.
    """
    shards = shard_count(samples * distributed.size()) // distributed.size()
    return [range(samples * i // shards, samples * (i + 1) // shards) for i in range(shards)]


class ShardSums:
    """A sum over this rank's shards, then over all ranks.

    Args:
        shape: of what is summed, in float32.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        #: Of subtrees that are whole, of falling size, and of the shard that is being summed.
        self._sums = [torch.zeros(shape, device=device)]
        self._shard = 0

    def of(self, shard: int) -> torch.Tensor:
        """What to add this shard's inputs to; shards come in order and none is left out."""
        if shard != self._shard:
            assert shard == self._shard + 1
            self._close()
            self._sums.append(torch.zeros_like(self._sums[-1]))
            self._shard = shard
        return self._sums[-1]

    def skip_to(self, shard: int) -> None:
        """Makes shards between the last one and this one empty, as experts' are that none of its tokens goes to."""
        for each in range(self._shard + 1, shard + 1):
            self.of(each)

    def total(self) -> torch.Tensor:
        """The sum over the shards of all ranks, to the same bits on each. Nothing can be added after this."""
        self._close()
        (total,) = self._sums
        # Its memory goes when the caller lets it go.
        self._sums = []
        distributed.all_reduce(total)
        return total

    def _close(self) -> None:
        """Adds the shard to its neighbour if that is whole, their sum to theirs, and so on."""
        subtree = self._shard
        while subtree & 1:
            right = self._sums.pop()
            self._sums[-1].add_(right)
            subtree >>= 1
