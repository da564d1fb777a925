"""What experts see, and what those that see too little borrow."""

from __future__ import annotations

import torch

from offline_prune.calibration.expert_hessians import ExpertHessians, MidStatistics
from offline_prune.calibration.hessian import Energy, Hessian

CPU, K, MID = torch.device("cpu"), 6, 10


def inputs(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, K, generator=generator) for size in sizes]


def collected(per_expert: list[torch.Tensor], shards: int, tokens: int = 100, sampled: int = 100) -> ExpertHessians:
    """Of each expert's inputs, dealt to the shards one after the other."""
    found = ExpertHessians(len(per_expert), K, CPU, tokens, sampled)
    for shard in range(shards):
        for expert, x in enumerate(per_expert):
            if len(mine := x[shard::shards]):
                found.add(expert, mine, shard)
    return found


def test_experts_with_enough_tokens_have_their_own() -> None:
    x = inputs(6, 30, 7)
    found = collected(x, 2)
    seen = found.seen()
    assert seen == [6, 30, 7]
    for matrix, mine in zip(found.matrices(seen, 2), x, strict=True):
        torch.testing.assert_close(matrix, mine.T @ mine)


def test_others_borrow_what_they_lack_in_proportion() -> None:
    """H̃_e = H_e + max(0, K − n_e) · ΣH_j / Σn_j."""
    x = inputs(0, 4, 20)
    found = collected(x, 4)
    seen = found.seen()
    pooled = torch.cat(x)
    mean = pooled.T @ pooled / 24
    matrices = found.matrices(seen, 4)
    torch.testing.assert_close(matrices[0], 6 * mean)
    torch.testing.assert_close(matrices[1], x[1].T @ x[1] + 2 * mean)
    torch.testing.assert_close(matrices[2], x[2].T @ x[2])


def test_down_borrows_what_the_expert_makes_of_others_tokens() -> None:
    """H̃_e = H_e + max(0, I − n_e) · S_e / p, for the whole and for the diagonal."""
    x = inputs(0, 4, 20)
    found = collected(x, 2, sampled=50)
    sample = torch.cat([part for shard in range(2) for part in found.sample[shard]])
    assert len(sample) == 2 + 10, "every second one of each expert in each shard"
    weights = torch.randn(3, MID, K, generator=torch.Generator().manual_seed(1))

    def mid(expert: int, rows: torch.Tensor) -> torch.Tensor:
        return rows @ weights[expert].T

    for kind in (Hessian, Energy):
        statistics = MidStatistics(kind, 3, MID, CPU)
        for expert in (1, 2):
            statistics.add(expert, mid(expert, x[expert]), 1)
        results = statistics.results(found.sample, mid, 2)
        for expert, lacks in ((0, 10), (1, 6), (2, 0)):
            own, other = mid(expert, x[expert]), mid(expert, sample)
            expected = own.T @ own + lacks * other.T @ other / len(sample)
            torch.testing.assert_close(results[expert], expected if kind is Hessian else expected.diagonal())
