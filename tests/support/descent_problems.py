"""Blocks of groups of four to decide again, and what it takes for two walks to agree."""

from __future__ import annotations

import torch

from offline_prune.methods.coordinate_descent import Solver, group_tables, solve_block


def compare(solve: Solver, rows: int, width: int, device: torch.device) -> None:
    """Holds a solver against the plain one, in columns of something wider, as in the loop."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + 0.3 * torch.eye(width)
    inputs = torch.randn(4 * width, width, generator=generator) @ mix
    hessian = (inputs.T @ inputs).to(device)
    groups = group_tables(hessian, torch.zeros((), device=device), torch.ones(width, dtype=torch.bool, device=device))
    weight = (0.02 * torch.randn(rows, width + 16, generator=generator)).to(device)
    here = slice(5, 5 + width)
    slope = 0.2 * (weight[:, here] @ hessian)

    found, expected = weight.clone(), weight.clone()
    found_change = solve(found[:, here], slope.clone(), hessian, *groups)
    expected_change = solve_block(expected[:, here], slope.clone(), hessian, *groups)

    assert torch.equal(found[:, : here.start], weight[:, : here.start])
    assert torch.equal(found[:, here.stop :], weight[:, here.stop :])
    assert ((found == 0) == (expected == 0)).float().mean() >= 0.999
    # Two pairs may cost the same; what is chosen then takes the rest of its row along.
    same = torch.isclose(found, expected, rtol=1e-3, atol=1e-5).all(1)
    same &= torch.isclose(found_change, expected_change, rtol=1e-3, atol=1e-5).all(1)
    assert same.float().mean() >= 0.95


def batches(solve: Solver, device: torch.device) -> None:
    """Holds a batch against its problems one by one."""
    generator = torch.Generator().manual_seed(1)
    width = 24
    inputs = torch.randn(3, 4 * width, width + 4, generator=generator).to(device)
    hessian = inputs.mT @ inputs
    groups = group_tables(hessian, torch.zeros(3, device=device), torch.arange(width + 4, device=device) < width)
    weight = torch.randn(3, 21, width + 8, generator=generator).to(device)
    slope = 5 * torch.randn(3, 21, width, generator=generator).to(device)
    found, corner = weight.clone(), hessian[:, :width, :width]
    change = solve(found[..., 2 : 2 + width], slope.clone(), corner, *groups)
    for i, expected in enumerate(weight.clone()):
        own = [table[i] for table in groups]
        alone = solve(expected[:, 2 : 2 + width], slope[i].clone(), corner[i], *own)
        assert torch.equal(found[i], expected)
        assert torch.equal(change[i], alone)


def every_problem(solve: Solver, rows: int, device: torch.device) -> None:
    for width in (128, 12, 40):
        compare(solve, rows, width, device)
    batches(solve, device)
