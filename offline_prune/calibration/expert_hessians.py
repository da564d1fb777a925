"""What the routed experts of a block see, and what those that see too little of it borrow from the others.

Expert e has H_e = Σ x·xᵀ over the n_e calibration tokens that are routed to it. With fewer tokens than inputs, K, H_e
has no full rank, and what such an expert would do to other tokens is left to chance. It borrows what it lacks from the
layer's pooled Hessian, in proportion:

    H̃_e = H_e + max(0, K − n_e) · (Σ_j H_j) / (Σ_j n_j)

So an expert with K tokens or more borrows nothing, and one without any is pruned for the mean token of the layer.
Intermediate indices are an expert's own, so down's Hessians cannot be pooled. There the tokens are: with S_e = Σ z·zᵀ
of what expert e itself makes of p tokens sampled from all that are routed in the layer, and I inputs,

    H̃_e = H_e + max(0, I − n_e) · S_e / p
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from offline_prune.calibration.hessian import Energy, Hessian
from offline_prune.runtime import distributed

#: What an expert makes of inputs (tokens, H): its intermediate activations (tokens, I).
Mid = Callable[[int, torch.Tensor], torch.Tensor]


class ExpertHessians:
    """H_e of each expert's inputs, how many there were, and a sample of all experts' inputs.

    Args:
        count: E.
        size: K, numbers in an input.
        tokens: that pass the layer, on all ranks.
        sampled: about how many inputs are sampled, at least.

    Attributes:
        sample: of each of this rank's shards, (p, K).
    """

    def __init__(self, count: int, size: int, device: torch.device, tokens: int, sampled: int) -> None:
        self._hessians: list[Hessian] = [Hessian(size, device, few=True) for _ in range(count)]
        self._seen = [0] * count
        self._device = device
        self._stride = max(1, tokens // sampled)
        self._size = size
        self.sample: dict[int, list[torch.Tensor]] = {}

    def add(self, expert: int, inputs: torch.Tensor, shard: int) -> None:
        """Adds (tokens, K) of a shard of the text that are routed to an expert."""
        self._hessians[expert].skip_to(shard)
        self._hessians[expert].add_untimed(inputs, shard)
        self._seen[expert] += len(inputs)
        self.sample.setdefault(shard, []).append(inputs[:: self._stride].clone())

    def seen(self) -> list[int]:
        """n_e of each expert, over all ranks. Nothing can be added after this."""
        return _over_ranks(self._seen, self._device)

    def matrices(self, seen: list[int], shards: int) -> list[torch.Tensor]:
        """H̃_e of each expert, float32 (K, K). Cannot be asked for twice.

        Args:
            seen: what `seen` returned.
            shards: how many this rank has.
        """
        found = []
        while self._hessians:
            hessian = self._hessians.pop(0)
            hessian.skip_to(shards - 1)
            found.append(hessian.matrix())
        if min(seen) < self._size:
            mean = torch.zeros_like(found[0])
            for each in found:
                mean.add_(each, alpha=1 / sum(seen))
            for each, n in zip(found, seen, strict=True):
                each.add_(mean, alpha=max(0, self._size - n))
        return found


class MidStatistics:
    """H_e of what each expert's down sees, or its diagonal.

    Args:
        kind: `Hessian` or `Energy`.
        size: I.
    """

    def __init__(self, kind: type[Hessian] | type[Energy], count: int, size: int, device: torch.device) -> None:
        self._kind, self._size, self._device = kind, size, device
        self._own = [kind(size, device, few=True) for _ in range(count)]
        self._shown = [0] * count

    def add(self, expert: int, mid: torch.Tensor, shard: int) -> None:
        """Adds (tokens, I) of an expert."""
        self._own[expert].skip_to(shard)
        self._own[expert].add_untimed(mid, shard)
        self._shown[expert] += len(mid)

    def results(self, sample: dict[int, list[torch.Tensor]], mid: Mid, shards: int) -> list[torch.Tensor]:
        """H̃_e of each expert, float32 (I, I), or its diagonal (I,). Cannot be asked for twice.

        Args:
            sample: see `ExpertHessians`.
            mid: what an expert makes of its inputs now.
            shards: how many this rank has.
        """
        seen = _over_ranks(self._shown, self._device)
        (sampled,) = _over_ranks([sum(len(part) for parts in sample.values() for part in parts)], self._device)
        found = []
        for expert, n in enumerate(seen):
            own = self._own.pop(0)
            own.skip_to(shards - 1)
            total = own.result()
            if n < self._size:
                borrowed = self._kind(self._size, self._device, few=True)
                for shard in range(shards):
                    borrowed.skip_to(shard)
                    for part in sample.get(shard, []):
                        borrowed.add_untimed(mid(expert, part), shard)
                total.add_(borrowed.result(), alpha=(self._size - n) / sampled)
            found.append(total)
        return found


def _over_ranks(counts: list[int], device: torch.device) -> list[int]:
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    distributed.all_reduce(total)
    return total.tolist()
