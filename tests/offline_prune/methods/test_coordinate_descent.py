"""Coordinate descent against exact least squares on every mask, in float64."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from test_sparsegpt import CASES, loss, problem

from offline_prune.methods.coordinate_descent import descend
from offline_prune.methods.sparsegpt import inverse_factor, sparsegpt
from vllm_spense.layout import excess_groups

DAMPING = 0.01


def damped(hessian: torch.Tensor) -> torch.Tensor:
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def pruned_and_improved(
    weight: torch.Tensor, hessian: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, passes: int, **options: int
) -> tuple[torch.Tensor, torch.Tensor]:
    regions = {"sparse_rows": rows, "sparse_columns": columns}
    pruned = sparsegpt(weight, inverse_factor(hessian, DAMPING, "layer"), **regions)
    return pruned, descend(weight, pruned, hessian, DAMPING, **regions, passes=passes, **options)


def best_of_all_masks(weight: torch.Tensor, others: torch.Tensor, hessian: torch.Tensor, here: slice) -> torch.Tensor:
    """The group of one row with the least loss while all other weights stand, by six least squares solutions."""
    w, h = weight.double(), hessian.double()
    best, least = others.double(), float("inf")
    for kept in combinations(range(here.start, here.stop), 2):
        candidate = others.double().clone()
        candidate[here] = 0
        rest = candidate - w
        columns = list(kept)
        # d/dŵ_kept of ½·Δ·H·Δᵀ = 0.
        candidate[columns] = torch.linalg.solve(h[columns][:, columns], w[columns] @ h[columns][:, columns] - (
            rest @ h[:, columns] - rest[columns] @ h[columns][:, columns]
        ))  # fmt: skip
        found = float((candidate - w) @ h @ (candidate - w))
        if found < least:
            best, least = candidate, found
    return best


def test_a_single_group_gets_the_best_of_its_six_masks() -> None:
    weight, hessian = problem(32, 4)
    everything = torch.ones(32, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    _, found = pruned_and_improved(weight, hessian, *everything, passes=1)
    for row, result in zip(weight, found, strict=True):
        expected = best_of_all_masks(row, torch.zeros(4), damped(hessian), slice(0, 4))
        assert torch.allclose(result.double(), expected, rtol=1e-3, atol=1e-6)


def test_the_last_group_is_the_best_there_is_while_the_others_stand() -> None:
    weight, hessian = problem(16, 160)
    everything = torch.ones(16, dtype=torch.bool), torch.ones(160, dtype=torch.bool)
    _, found = pruned_and_improved(weight, hessian, *everything, passes=2, block_size=48)
    for row, result in zip(weight, found, strict=True):
        expected = best_of_all_masks(row, result, damped(hessian), slice(156, 160))
        assert torch.allclose(result.double(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_with_every_pass_and_regions_stay(case: str) -> None:
    rows, columns = CASES[case]
    weight, hessian = problem(64, 160)
    results = [pruned_and_improved(weight, hessian, rows, columns, passes, block_size=48) for passes in (0, 1, 2, 8)]
    assert torch.equal(*results[0])
    losses = [loss(weight, result, damped(hessian)) for _, result in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.97 * losses[0]
    for pruned, result in results:
        assert not excess_groups(result[rows][:, columns]).any()
        assert torch.equal(result[~rows], pruned[~rows])
        assert torch.equal(result[~rows], weight[~rows])
    assert (results[2][1][rows][:, ~columns] != 0).all()


@pytest.mark.parametrize("options", [{"block_size": 8}, {"block_size": 256}, {"row_chunks": 8}])
def test_how_the_work_is_cut_does_not_matter(options: dict[str, int]) -> None:
    rows, columns = CASES["rows"]
    weight, hessian = problem(64, 160)
    _, expected = pruned_and_improved(weight, hessian, rows, columns, 2)
    _, found = pruned_and_improved(weight, hessian, rows, columns, 2, **options)
    assert ((found == 0) == (expected == 0)).float().mean() >= 0.999
    assert loss(weight, found, hessian) == pytest.approx(loss(weight, expected, hessian), rel=1e-3)


def test_dense_columns_are_the_least_squares_solution_once_they_stand_still() -> None:
    weight, hessian = problem(16, 24)
    columns = torch.arange(24) < 12
    rows = torch.ones(16, dtype=torch.bool)
    _, found = pruned_and_improved(weight, hessian, rows, columns, 1)
    slope = (found - weight).double() @ damped(hessian).double()
    assert slope[:, 12:].abs().max() < 1e-4 * slope.abs().max()


def test_what_is_2_4_already_stays() -> None:
    weight, hessian = problem(8, 16)
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(4)
    everything = {"sparse_rows": torch.ones(8, dtype=torch.bool), "sparse_columns": torch.ones(16, dtype=torch.bool)}
    found = descend(weight * mask, weight * mask, hessian, DAMPING, **everything, passes=2)
    assert torch.allclose(found, weight * mask, atol=1e-7)
