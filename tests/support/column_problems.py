"""Blocks of columns to walk, and what it takes for two walks to agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from offline_prune.methods.fp8 import channel_scales
from offline_prune.methods.sparsegpt import DENSE, Solver, inverse_factor, solve_block

GROUP = [0, 1, 2, 3]
SPARSE_BLOCK = 32 * GROUP


@dataclass(frozen=True)
class Problem:
    rows: int
    roles: list[int]
    rounding: bool
    device: torch.device


def every_problem(rows: int, device: torch.device) -> Iterator[Problem]:
    mixed = [DENSE, *GROUP, *GROUP, DENSE, DENSE, *GROUP] * 4
    for roles, rounding in product((SPARSE_BLOCK, [DENSE] * 40, 3 * GROUP, mixed), (False, True)):
        yield Problem(rows, roles, rounding, device)


def compare(solve: Solver, problem: Problem) -> None:
    """Holds a solver against the plain one: zeros in 99.9% of all places, and what each row ends up with."""
    width = len(problem.roles)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width + 8, width + 8, generator=generator) / width**0.5 + 0.3 * torch.eye(width + 8)
    inputs = torch.randn(4 * width, width + 8, generator=generator) @ mix
    # Columns and a corner of something wider, as in the loop.
    corner = inverse_factor(inputs.T @ inputs, 0.01, "layer").upper.to(problem.device)[4:-4, 4:-4]
    weight = (0.02 * torch.randn(problem.rows, width + 16, generator=generator)).to(problem.device)
    here = slice(5, 5 + width)
    prunable = (torch.arange(problem.rows) % 3 > 0).to(problem.device)
    scales = channel_scales(weight, 1.5).squeeze(1) if problem.rounding else None

    found, expected = weight.clone(), weight.clone()
    found_errors = solve(found[:, here], corner, problem.roles, prunable, scales)
    expected_errors = solve_block(expected[:, here], corner, problem.roles, prunable, scales)

    assert torch.equal(found[:, : here.start], weight[:, : here.start])
    assert torch.equal(found[:, here.stop :], weight[:, here.stop :])
    assert ((found == 0) == (expected == 0)).float().mean() >= 0.999, problem
    # A weight between two FP8 values may fall to either side, and takes the rest of its row along.
    same = torch.isclose(found, expected, rtol=1e-4, atol=1e-6).all(1)
    same &= torch.isclose(found_errors, expected_errors, rtol=1e-3, atol=1e-5).all(1)
    assert same.float().mean() >= 0.95, problem
    if not problem.rounding:
        assert (found_errors - expected_errors).norm() <= 1e-3 * expected_errors.norm(), problem


def batches(solve: Solver, device: torch.device) -> None:
    """Holds a batch against its problems one by one: each has weights, a corner and scales of its own."""
    generator = torch.Generator().manual_seed(1)
    roles = [*GROUP, DENSE, *GROUP, *GROUP]
    width = len(roles)
    weight = torch.randn(3, 21, width + 8, generator=generator).to(device)
    corner = (torch.eye(width + 4) + 0.1 * torch.randn(3, width + 4, width + 4, generator=generator).triu(1)).to(device)
    prunable = (torch.arange(21) % 3 > 0).to(device)
    for scales in (None, channel_scales(weight, 1.5).squeeze(-1)):
        found = weight.clone()
        errors = solve(found[..., 2 : 2 + width], corner[:, :width, :width], roles, prunable, scales)
        for i, expected in enumerate(weight.clone()):
            own = None if scales is None else scales[i]
            alone = solve(expected[:, 2 : 2 + width], corner[i, :width, :width], roles, prunable, own)
            assert torch.equal(found[i], expected)
            assert torch.equal(errors[i], alone)


def ties(solve: Solver, device: torch.device) -> None:
    """Of equal weights the later two go, in rows that may be pruned."""
    weight = torch.ones(3, 4, device=device)
    solve(weight, torch.eye(4, device=device), GROUP, torch.tensor([True, False, True], device=device), None)
    assert weight.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
