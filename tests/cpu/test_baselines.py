"""The learned baselines of the benchmarks: their mathematics, and that what they give is 2:4."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.baselines import proxsparse
from offline_prune.evaluate import load_dense
from vllm_spense.layout import keep_mask_2of4


def objective(w: torch.Tensor, target: torch.Tensor, strength: float) -> torch.Tensor:
    """½·‖w − target‖² + strength · R(w) of each row, R written out."""
    a, b, c, d = w.abs().unbind(-1)
    return (w - target).square().sum(-1) / 2 + strength * (a * b * c + a * b * d + a * c * d + b * c * d)


def test_the_regularizer_is_zero_where_a_weight_is_2_of_4_and_nowhere_else() -> None:
    assert proxsparse.regularizer(torch.tensor([[1.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 5.0]])) == 0
    assert proxsparse.regularizer(torch.tensor([[1.0, -2.0, 3.0, 0.0]])) == 6
    assert proxsparse.regularizer(torch.tensor([[1.0, -2.0, 3.0, 4.0]])) == 6 + 8 + 12 + 24


@pytest.mark.parametrize("strength", [0.02, 0.2, 1.0])
def test_the_proximal_step_against_every_point_of_a_grid(strength: float) -> None:
    target = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    found = proxsparse.proximal(target, strength)
    assert ((found == 0) | (found.sign() == target.sign())).all()
    steps = torch.linspace(0, 1, 21)
    grid = torch.tensor(list(product(steps.tolist(), repeat=4)))
    for row, step in zip(target, found, strict=True):
        best = objective(grid * row, row, strength).min()
        assert objective(step, row, strength) <= best + 1e-3


def test_a_strong_proximal_step_is_2_of_4_and_a_weak_one_changes_nothing() -> None:
    target = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    strong, none = (proxsparse.proximal(target, strength) for strength in (100.0, 0.0))
    assert torch.equal(strong, target * keep_mask_2of4(target.abs()))
    assert torch.equal(none, target)


def test_learned_masks_leave_the_weights_what_they_were(llama: Path) -> None:
    dense = load_dense(llama)[0]
    tokens = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
    layers = peers.mlp_layers(llama)
    assert len(layers) == 3 * dense.config.num_hidden_layers
    found = peers.learned(llama, tokens)
    differ = 0
    for name, weight in dense.named_parameters():
        new = found.get_parameter(name)
        if name.removesuffix(".weight") in layers:
            assert ((new != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
            assert torch.equal(new[new != 0], weight[new != 0])
            differ += int(((new != 0) != keep_mask_2of4(weight.abs())).sum())
        else:
            assert torch.equal(new, weight)
    assert differ
