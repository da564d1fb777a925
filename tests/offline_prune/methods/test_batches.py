"""A batch of weights with a Hessian each, as experts are pruned: the mathematics of each weight by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from column_problems import batches as column_batches
from descent_problems import batches as descent_batches
from test_sparsegpt import loss, problem

from offline_prune.methods import coordinate_descent, sparsegpt
from offline_prune.methods.prune_mlp import Pruned, prune_down, select_and_prune
from offline_prune.methods.recipe import Grouping, Layout, Quantize, Recipe, Rounding, Selection, Solver
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions

LAYERS = ["experts.0", "experts.1", "experts.2"]


def problems(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, hessians = zip(*(problem(rows, columns, seed) for seed in range(3)), strict=True)
    return torch.stack(weights), torch.stack(hessians)


# More than is factorized by the library, and halves that are not equal.
@pytest.mark.parametrize("size", [96, 300])
def test_factors_are_as_good_as_one_by_one(size: int) -> None:
    _, hessians = problems(4, size)
    found = sparsegpt.inverse_factors(hessians, 0.01, LAYERS)
    assert found.dampings == (0.01,) * 3
    for hessian, factor, layer in zip(hessians, found.each(), LAYERS, strict=True):
        alone = sparsegpt.inverse_factor(hessian, 0.01, layer).upper.double()
        damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(size)
        exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert torch.equal(factor.upper, factor.upper.triu())
        assert (factor.upper - exact).norm() <= 2 * (alone - exact).norm() + 1e-6 * exact.norm()


def test_one_that_needs_more_damping_gets_it_alone() -> None:
    _, hessians = problems(4, 160)
    hessians[1] -= 0.2 * hessians[1].diagonal().mean() * torch.eye(160)
    found = sparsegpt.inverse_factors(hessians, 0.01, LAYERS)
    alone = sparsegpt.inverse_factor(hessians[1], 0.01, "layer")
    assert found.dampings == (0.01, alone.damping, 0.01)
    assert found.damping == alone.damping > 0.01
    assert torch.equal(found.upper[1], alone.upper)
    assert torch.isfinite(found.upper).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_unusable_one_is_named(value: float) -> None:
    _, hessians = problems(4, 160)
    hessians[2] *= value
    with pytest.raises(SpenseError, match=r"experts\.2.*not usable"):
        sparsegpt.inverse_factors(hessians, 0.01, LAYERS)


def test_the_plain_walks_take_batches() -> None:
    column_batches(sparsegpt.solve_block, torch.device("cpu"))
    descent_batches(coordinate_descent.solve_block, torch.device("cpu"))


RECIPES: dict[str, dict[str, Any]] = {
    "spensegpt++": {
        "selection": Selection.OUTPUT_LOSS,
        "rounding": Rounding.EVERYWHERE,
        "descent_passes": 1,
    },
    "spensegpt+": {},
    "unrounded": {"quantize": Quantize.NONE, "selection": Selection.SPARSEGPT_SCORE, "grouping": Grouping.MIXED},
    "front": {"layout": Layout.FRONT, "rounding": Rounding.AFTER},
    "wanda": {"solver": Solver.WANDA, "selection": Selection.LAST},
    "magnitude": {"solver": Solver.MAGNITUDE, "selection": Selection.LAST},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_mlps_come_out_as_one_by_one(recipe: str) -> None:
    options, regions = Recipe(**RECIPES[recipe]), Regions(96, 32)
    gate_up, hessian = problems(256, 160)
    gate_up = gate_up * (torch.rand(256, 1, generator=torch.Generator().manual_seed(0)) + 0.5)
    down, mid = problems(160, 128)
    before = down.clone(), gate_up.clone()
    pruned, orders = select_and_prune(gate_up, down, hessian, mid, regions, options, LAYERS)
    moved = torch.stack([each[:, order] for each, order in zip(down, orders, strict=True)])
    ordered = torch.stack([each[order][:, order] for each, order in zip(mid, orders, strict=True)])
    downs = prune_down(moved, ordered, orders[0], regions, options, LAYERS)
    assert torch.equal(down, before[0])
    assert torch.equal(gate_up, before[1])
    for i, (found, found_down) in enumerate(zip(pruned.each(), downs.each(), strict=True)):
        expected, order = select_and_prune(gate_up[i], down[i], hessian[i], mid[i], regions, options, LAYERS[i])
        assert torch.equal(orders[i], order)
        both = torch.cat([order, order + 128])
        _same(found, expected, gate_up[i][both], hessian[i])
        _same(found_down, prune_down(moved[i], ordered[i], order, regions, options, LAYERS[i]), moved[i], ordered[i])


def _same(found: Pruned, expected: Pruned, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    assert found.damping == expected.damping
    assert ((found.weight == 0) == (expected.weight == 0)).float().mean() >= 0.999
    lost = loss(weight, expected.weight, hessian)
    assert loss(weight, found.weight, hessian) == pytest.approx(lost, rel=1e-3)
    assert float(found.error.sum()) == pytest.approx(lost, rel=1e-2)
    assert torch.allclose(found.power, expected.power, rtol=1e-4)
    assert (found.scales is None) == (expected.scales is None)
    if found.scales is not None and expected.scales is not None:
        assert torch.isclose(found.scales, expected.scales).float().mean() > 0.95


def test_rows_of_a_batch_are_split_alike_among_ranks() -> None:
    """Each rank's rows come out to the same bits as in the whole: the products are the same."""
    weight, hessian = problems(64, 160)
    factor = sparsegpt.inverse_factors(hessian, 0.01, LAYERS)
    columns = torch.ones(160, dtype=torch.bool)
    whole = sparsegpt.sparsegpt(
        weight, factor, sparse_rows=torch.ones(64, dtype=torch.bool), sparse_columns=columns, row_chunks=8
    )
    for part in (slice(0, 32), slice(32, 64)):
        found = sparsegpt.sparsegpt(
            weight[:, part], factor, sparse_rows=torch.ones(32, dtype=torch.bool), sparse_columns=columns, row_chunks=4
        )
        assert torch.equal(found, whole[:, part])
