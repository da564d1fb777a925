"""The mathematics of one MLP, where its steps hand on to each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sparsegpt import problem

from offline_prune.methods.prune_mlp import file_order, prune_all_rows, prune_gate_up, round_gate_up
from offline_prune.methods.recipe import Quantize, Recipe, Selection
from vllm_spense.format import Regions

REGIONS = Regions(32, 32)


@pytest.mark.parametrize(
    "options",
    [{"quantize": Quantize.NONE}, {"quantize": Quantize.NONE, "descent_passes": 1}, {"descent_passes": 1}],
    ids=str,
)
def test_rows_that_were_pruned_to_choose_among_them_are_pruned_no_other_way(options: dict[str, Any]) -> None:
    """Gate and up in file order: sparse rows come out as without that, dense ones as they were."""
    gate_up, hessian = problem(128, 160)
    gate_up *= torch.rand(128, 1) + 0.5
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    both = torch.cat([order, order + 64])
    every = prune_all_rows(gate_up, hessian, Recipe(**options), "mlp")
    assert torch.equal(every.rows(both).error, every.error[both])
    found = prune_gate_up(gate_up[both], hessian, REGIONS, Recipe(**options), "mlp", every.rows(both))
    expected = prune_gate_up(gate_up[both], hessian, REGIONS, Recipe(**options), "mlp")
    same = torch.isclose(found.weight, expected.weight, rtol=1e-4, atol=1e-6).all(1)
    assert same.float().mean() > 0.95
    assert torch.allclose(found.error.sum(), expected.error.sum(), rtol=1e-3)
    assert torch.allclose(found.power, expected.power, rtol=1e-4)
    sparse = (torch.arange(64) < REGIONS.sparse).repeat(2)
    if options.get("quantize"):
        assert torch.equal(found.weight[~sparse], gate_up[both][~sparse])
        assert torch.allclose(found.error[sparse], every.error[both][sparse], rtol=1e-2)


def test_rounding_with_the_factor_of_pruning_is_the_loop_that_pruned() -> None:
    gate_up, hessian = problem(128, 160)
    options = Recipe()
    pruned = prune_gate_up(gate_up, hessian, REGIONS, options, "mlp")
    assert pruned.factor is not None
    weight, scales = round_gate_up(gate_up, pruned.factor, REGIONS, options)
    assert torch.equal(weight, pruned.weight)
    assert torch.equal(scales, pruned.scales)


def test_random_orders_repeat_in_no_layer_and_with_no_other_seed() -> None:
    weight, hessian = torch.zeros(64, 64), torch.zeros(64, 64)
    layers = [f"model.layers.{i}.mlp" for i in range(64)]

    def orders(seed: int) -> list[tuple[int, ...]]:
        options = Recipe(selection=Selection.RANDOM, seed=seed)
        return [
            tuple(file_order(weight, weight, weight, hessian, hessian, REGIONS, options, layer).tolist())
            for layer in layers
        ]

    assert len({*orders(0), *orders(1)}) == 128
    assert orders(0) == orders(0)
