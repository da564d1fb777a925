"""Selection of dense indices, their order, and the mask-only baselines."""

import pytest
import torch
import torch.nn.functional as F

from offline_prune.methods.dense_selection import (
    mixed_groups,
    order_by_priority,
    output_loss_priority,
    processing_order,
    selection_hash,
    sparsegpt_priority,
    spensegpt_plus_priority,
)
from offline_prune.methods.recipe import Layout
from offline_prune.methods.wanda import prune_by_score, wanda_scores
from vllm_spense.format import Regions


def test_priority_is_the_papers_equation_11() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 12, 5, generator=generator)
    down = torch.randn(5, 12, generator=generator)
    energy_in, energy_mid = torch.rand(5, generator=generator), torch.rand(12, generator=generator)
    expected = torch.zeros(12, dtype=torch.float64)
    for weight, energy in ((gate, energy_in), (up, energy_in), (down.T, energy_mid[:, None])):
        score = (weight.double() ** 2 * energy.double()).sum(1)
        expected += score / score.mean()
    found = spensegpt_plus_priority(gate, up, down, energy_in, energy_mid)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_sparsegpt_priority_divides_by_the_pivots() -> None:
    weight = torch.eye(3)
    pivots = torch.tensor([1.0, 2.0, 4.0])
    found = sparsegpt_priority(weight, weight, weight, pivots, pivots)
    assert torch.allclose(found / found[0], torch.tensor([1.0, 1 / 4, 1 / 16]))


def test_output_loss_is_what_the_output_loses() -> None:
    """Of each index alone: what its rows of gate and up change in the output once their weakest weights are gone."""
    torch.manual_seed(0)
    x = torch.randn(4000, 32) * torch.rand(32) * 3
    gate, up = (torch.randn(64, 32) * torch.rand(64, 1) for _ in range(2))
    down = torch.randn(16, 64) * torch.rand(64)
    energy = x.square().sum(0)

    def pruned(weight: torch.Tensor) -> torch.Tensor:
        every = torch.ones(len(weight), dtype=torch.bool), torch.ones(weight.shape[1], dtype=torch.bool)
        return prune_by_score(weight, wanda_scores(weight, energy), sparse_rows=every[0], sparse_columns=every[1])

    z = F.silu(x @ gate.T) * (x @ up.T)
    changed = F.silu(x @ pruned(gate).T) * (x @ pruned(up).T)
    true = (changed - z).square().sum(0) * down.square().sum(0)
    error = torch.cat([(x @ (pruned(w) - w).T).square().sum(0) for w in (gate, up)])
    power = torch.cat([(x @ w.T).square().sum(0) for w in (gate, up)])
    found = output_loss_priority(down, z.square().sum(0), error, power)
    papers = spensegpt_plus_priority(gate, up, down, energy, z.square().sum(0))
    worst = set(true.argsort()[-16:].tolist())
    hits = [len(worst & set(priority.argsort()[-16:].tolist())) for priority in (found, papers)]
    assert hits[0] >= 13
    assert hits[0] > hits[1]
    assert torch.corrcoef(torch.stack([true.log(), found.log()]))[0, 1] > 0.9
    nothing = torch.zeros(128)
    assert output_loss_priority(down * 0, z.square().sum(0), error, power).isfinite().all()
    assert (output_loss_priority(down * 0, z.square().sum(0), error, nothing) == 0).all()


def test_output_loss_takes_the_two_weakest_of_every_four_of_down() -> None:
    down = torch.tensor([[3.0, 1, 4, 2]]).expand(2, 4)
    error, power = torch.tensor([5.0] * 4 + [12.0] * 4), torch.tensor([100.0] * 4 + [50.0] * 4)
    found = output_loss_priority(down, torch.tensor([1.0, 2, 1, 1]), error, power)
    # Of down's 9 + 2 + 16 + 4 in each row, 2 + 4 go.
    torch.testing.assert_close(found, torch.tensor([18.0, 4, 32, 8]) * (5 / 100 + 12 / 50 + 6 / 31))


def test_a_projection_of_zeros_has_no_say() -> None:
    found = spensegpt_plus_priority(torch.zeros(4, 2), torch.ones(4, 2), torch.ones(2, 4), torch.ones(2), torch.ones(4))
    assert torch.equal(found, torch.full((4,), 2.0))


def test_largest_priorities_go_to_the_back_in_their_old_order() -> None:
    priority = torch.tensor([5.0, 1, 9, 2, 0, 8, 3, 4])
    assert order_by_priority(priority, Regions(4, 4)).tolist() == [1, 3, 4, 6, 0, 2, 5, 7]


def test_a_constant_priority_selects_the_last() -> None:
    assert order_by_priority(torch.ones(8), Regions(4, 4)).tolist() == list(range(8))


def test_mixed_groups_have_two_of_the_stronger_half_and_two_of_the_weaker() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    strength = torch.rand(40, generator=torch.Generator().manual_seed(1))
    found = mixed_groups(order, strength, Regions(32, 8))
    assert torch.equal(found[32:], order[32:])
    assert torch.equal(found[:32].sort().values, order[:32].sort().values)
    groups = strength[found[:32]].view(8, 4)
    assert torch.equal((groups > strength[order[:32]].median()).sum(1), torch.full((8,), 2))
    # Groups from strong to weak by their strongest, and each weak half by its own strongest.
    assert torch.equal(groups[:, 0], groups[:, 0].sort(descending=True).values)
    assert groups[0].max() == strength[order[:32]].max()
    # The strongest of all has the weakest of the stronger half beside it, and so on; the weaker half is paired alike.
    strong, weak = strength[order[:32]].sort(descending=True).values.chunk(2)
    assert torch.equal(groups[:, :2], torch.stack([strong[:8], strong[8:].flip(0)], 1))
    assert torch.equal(groups[:, 2:], torch.stack([weak[:8], weak[8:].flip(0)], 1))


def test_mixed_groups_lose_less() -> None:
    """Columns of very different size: the two weakest of neighbours against the two weakest of mixed groups."""
    down = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 32)
    columns = torch.ones(32, dtype=torch.bool)
    lost = []
    for order in (torch.arange(32), mixed_groups(torch.arange(32), down.square().sum(0), Regions(32, 0))):
        weight = down[:, order]
        pruned = prune_by_score(
            weight, weight.abs(), sparse_rows=torch.ones(64, dtype=torch.bool), sparse_columns=columns
        )
        lost.append((pruned - weight).square().sum())
    assert lost[1] < 0.3 * lost[0]


ORDER = torch.tensor([1, 3, 4, 6, 0, 2, 5, 7])


def test_layout_back_processes_in_file_order() -> None:
    assert processing_order(ORDER, Regions(4, 4), Layout.BACK).tolist() == list(range(8))


def test_layout_front_processes_dense_columns_first() -> None:
    assert processing_order(ORDER, Regions(4, 4), Layout.FRONT).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_layout_none_processes_a_group_where_its_last_member_stood() -> None:
    # Originally the sparse group 1, 3, 4, 6 ends at 6: the dense 0, 2, 5 come before it and 7 after.
    steps = processing_order(ORDER, Regions(4, 4), Layout.NONE)
    assert ORDER[steps].tolist() == [0, 2, 5, 1, 3, 4, 6, 7]


def test_the_hash_is_of_the_set() -> None:
    regions = Regions(4, 4)
    shuffled = torch.tensor([6, 4, 3, 1, 7, 5, 2, 0])
    assert selection_hash(ORDER, regions) == selection_hash(shuffled, regions)
    assert selection_hash(ORDER, regions) != selection_hash(torch.arange(8), regions)


def test_wanda_keeps_what_moves_the_output() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    energy = torch.tensor([100.0, 1.0, 1.0, 1.0])
    everywhere = {"sparse_rows": torch.tensor([True]), "sparse_columns": torch.ones(4, dtype=torch.bool)}
    assert prune_by_score(weight, wanda_scores(weight, energy), **everywhere).tolist() == [[1, 0, 0, 4]]
    assert prune_by_score(weight, weight.abs(), **everywhere).tolist() == [[0, 0, 3, 4]]


@pytest.mark.parametrize("columns", [8, 4, 0])
def test_masks_stay_in_their_region(columns: int) -> None:
    weight = torch.rand(6, 8) + 0.1
    rows = torch.arange(6) < 4
    result = prune_by_score(weight, weight, sparse_rows=rows, sparse_columns=torch.arange(8) < columns)
    assert torch.equal(result[4:], weight[4:])
    assert torch.equal(result[:, columns:], weight[:, columns:])
    assert ((result[:4, :columns] == 0).sum() == 4 * columns // 2).item()
