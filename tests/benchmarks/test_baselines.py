"""The learned baselines of the benchmarks: their mathematics, and that what they give is 2:4."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.baselines import hyperprune, patch, proxsparse
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.methods.wanda import wanda_scores
from vllm_spense.errors import SpenseError
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


@pytest.mark.parametrize("method", peers.LEARNED)
def test_learned_masks_leave_the_weights_what_they_were(
    method: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PATCH_TILE", 16)
    monkeypatch.setattr(peers, "PATCH_STEPS", 4)
    dense = load_dense(llama)[0]
    tokens = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
    layers = peers.mlp_layers(llama)
    assert len(layers) == 3 * dense.config.num_hidden_layers
    found = peers.learned(llama, method, tokens, torch.device("cpu"))
    differ = zeros = total = 0
    for name, weight in dense.named_parameters():
        new = found.get_parameter(name)
        if name.removesuffix(".weight") in layers:
            zeros, total = zeros + int((new == 0).sum()), total + new.numel()
            groups = (new != 0).unflatten(-1, (-1, 4)).sum(-1)
            # In a tile all are 2:4, or none.
            tiles = groups.unflatten(1, (-1, 4)).unflatten(0, (-1, 16)).transpose(1, 2).flatten(2)
            assert (tiles == tiles[..., :1]).all()
            assert set(groups.unique().tolist()) <= ({2, 4} if method in peers.PATCH else {2})
            assert torch.equal(new[new != 0], weight[new != 0])
            differ += int(((new != 0) != keep_mask_2of4(weight.abs())).sum())
        else:
            assert torch.equal(new, weight)
    assert differ
    assert zeros / total == peers.result_of(method, llama)["sparsity"]


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (64, 32) and the Hessian of inputs that go together in pairs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(500, 32, generator=generator)
    inputs[:, 1::2] = inputs[:, ::2] + 0.3 * inputs[:, 1::2]
    return torch.randn(64, 32, generator=generator), inputs.T @ inputs


def test_the_hypernetwork_starts_as_wanda_and_learns_what_correlated_inputs_need() -> None:
    torch.manual_seed(0)
    errors = []
    for steps in (0, 200):
        network = hyperprune.HyperNetwork(2, 1)
        described = [(str(i), i, 0, *problem(i)) for i in range(2)]
        masks = hyperprune.learned_masks(described, network, steps, 0.01)
        errors.append(0.0)
        for name, _, _, weight, hessian in described:
            assert (masks[name].unflatten(-1, (-1, 4)).sum(-1) == 2).all()
            if not steps:
                assert torch.equal(masks[name], keep_mask_2of4(wanda_scores(weight, hessian.diagonal())))
            delta = weight * ~masks[name]
            errors[-1] += (((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum()).item()
    assert errors[1] < 0.95 * errors[0]


def test_hessians_are_those_of_the_dense_model(llama: Path) -> None:
    model = load_dense(llama)[0]
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    layers = peers.mlp_layers(llama)
    found = peers.input_hessians(model, layers, tokens)
    assert torch.equal(found[layers[0]], found[layers[1]])
    gate, up, down = (model.get_submodule(name) for name in layers[:3])
    seen: list[torch.Tensor] = []
    hook = down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=tokens)
    hook.remove()
    assert gate.in_features == up.in_features == len(found[layers[0]])
    expected = seen[0].T @ seen[0]
    assert torch.allclose(found[layers[2]], expected, rtol=0.05, atol=0.02 * expected.diagonal().mean().item())


def test_patch_keeps_dense_the_tiles_that_the_loss_needs(llama: Path) -> None:
    """A model that knows a text by heart: the loss falls while tiles are chosen, and is less than with any others."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (4, 48), generator=generator)
    taught = load_dense(llama)[0]
    trained = [taught.get_submodule(name).weight.requires_grad_(True) for name in peers.mlp_layers(llama)]
    optimizer = torch.optim.Adam([*trained, taught.get_input_embeddings().weight.requires_grad_(True)], lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        taught(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    layers = peers.mlp_layers(llama)
    energies = {name: found.diagonal() for name, found in peers.input_hessians(taught, layers, tokens).items()}
    model = copy.deepcopy(taught)
    masks, losses = patch.learned_masks(model, energies, tokens, share=0.25, tile=16, steps=80, rate=0.1)
    assert sum(losses[-16:]) < 0.8 * sum(losses[:16])
    dense = torch.cat([tiles_of(mask).all(-1).flatten() for mask in masks.values()])
    assert dense.sum() == round(0.25 * len(dense))

    def loss(masks: dict[str, torch.Tensor]) -> float:
        pruned = copy.deepcopy(taught)
        with torch.no_grad():
            for name, mask in masks.items():
                pruned.get_submodule(name).weight *= mask
            return pruned(input_ids=tokens, labels=tokens).loss.item()

    others = []
    for _ in range(4):
        order = torch.randperm(len(dense), generator=generator)
        drawn = iter(dense[order].split([tiles_of(mask).shape[:2].numel() for mask in masks.values()]))
        other = {}
        for name, mask in masks.items():
            keep = keep_mask_2of4(wanda_scores(taught.get_submodule(name).weight, energies[name]))
            chosen = next(drawn).view(tiles_of(mask).shape[:2])
            other[name] = keep | chosen.repeat_interleave(16, 0).repeat_interleave(16, 1)
        others.append(loss(other))
    assert loss(masks) < 0.9 * min(others)


def tiles_of(mask: torch.Tensor) -> torch.Tensor:
    """(N / 16, K / 16, 256)."""
    return mask.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2).flatten(2)


def test_patch_refuses_weights_that_tiles_do_not_fit(llama: Path) -> None:
    name = peers.mlp_layers(llama)[0]
    with pytest.raises(SpenseError, match=rf"{name}: found a weight of shape \(128, 64\), expected multiples of 48"):
        patch.learned_masks(load_dense(llama)[0], {name: torch.ones(64)}, torch.zeros(1, 8).long(), 0.5, 48, 1, 0.1)
