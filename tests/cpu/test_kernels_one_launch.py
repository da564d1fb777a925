"""The one-launch path without a GPU: its layout, its PTX in an emulator, its kernel in Triton's interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.one_launch_pack import kernel_order, pack, reason_against
from vllm_spense.kernels.problem import Problem
from vllm_spense.kernels.synthetic import random_fp8, random_weight
from vllm_spense.layout import excess_groups

pytest.importorskip("triton")
CPU = torch.device("cpu")
PROBLEMS = [
    Problem(256, 512, Regions(128, 128), "output"),
    Problem(192, 768, Regions(128, 64), "output"),
    Problem(128, 1024, Regions(768, 256), "input"),
    Problem(64, 512, Regions(512, 0), "input"),
    Problem(64, 512, Regions(0, 512), "input"),
]


def unpack(packed: dict[str, torch.Tensor], problem: Problem) -> torch.Tensor:
    """W (N, K) uint8 from the layout as one_launch_pack describes it, a byte at a time."""
    weight = np.zeros((problem.n, problem.k), np.uint8)
    sparse, dense = (tensor.numpy() for tensor in packed.values())
    for (block, tile), row, half, group in product(np.ndindex(*sparse.shape[:2]), range(64), range(2), range(32)):
        planes = sparse[block, tile, :, row, group].tolist()
        mask = planes[4] >> (0 if half else 4) & 15
        places = [place for place in range(4) if mask & 8 >> place]
        column = tile * 256 + half * 128 + group * 4
        for place, value in zip(places, planes[2 * half : 2 * half + 2], strict=True):
            weight[block * 64 + row, column + place] = value
    shared = problem.split == "input"
    for (block, tile), column in product(np.ndindex(*dense.shape[:2]), range(128)):
        first_row = block * 64 + (0 if shared else problem.regions.sparse)
        k = tile * 128 + column % 32 * 4 + column // 32 + (problem.regions.sparse if shared else 0)
        weight[first_row : first_row + 64, k] = dense[block, tile, :, column]
    return torch.from_numpy(weight)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_layout_holds_every_weight(problem: Problem) -> None:
    weight = random_weight(problem, CPU)
    before = weight.clone()
    packed = pack(weight, problem)
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8)), "pack changed its input"
    assert torch.equal(unpack(packed, problem), weight.view(torch.uint8))
    assert sum(tensor.numel() for tensor in packed.values()) == problem.weight_bytes


def test_every_pattern_of_a_group_survives() -> None:
    """Also groups with fewer than two non-zeros, which keep zeros to make up the number."""
    patterns = [kept for number in range(3) for kept in combinations(range(4), number)]
    weight = torch.zeros(64, 256 // 4, 4)
    for group, kept in enumerate(patterns):
        weight[:, group, list(kept)] = torch.arange(1.0, len(kept) + 1)
    eight_bit = weight.flatten(1).to(torch.float8_e4m3fn)
    problem = Problem(64, 256, Regions(64, 0), "output")
    assert torch.equal(unpack(pack(eight_bit, problem), problem), eight_bit.view(torch.uint8))


def test_minus_zero_takes_no_place() -> None:
    weight = torch.tensor([-0.0, 0.0, 3.0, -2.0]).repeat(64, 64).to(torch.float8_e4m3fn)
    problem = Problem(64, 256, Regions(64, 0), "output")
    unpacked = unpack(pack(weight, problem), problem).view(torch.float8_e4m3fn)
    assert torch.equal(unpacked.float(), weight.float())


def test_kernel_order_sorts_by_place_in_the_group() -> None:
    x = torch.arange(256)[None]
    ordered = kernel_order(x)
    assert ordered[0, :34].tolist() == [*range(0, 128, 4), 1, 5]
    assert ordered[0, 128:130].tolist() == [128, 132]
    assert torch.equal(ordered.sort().values, x)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (PROBLEMS[0], None),
        (Problem(96, 512, Regions(32, 64), "output"), "32 sparse rows are not a multiple of 64"),
        (Problem(96, 512, Regions(64, 32), "output"), "32 dense rows are not a multiple of 64"),
        (Problem(64, 384, Regions(64, 0), "output"), "384 sparse columns are not a multiple of 256"),
        (Problem(64, 576, Regions(512, 64), "input"), "64 dense columns are not a multiple of 128"),
        (Problem(64, 384, Regions(128, 256), "input"), "128 sparse columns are not a multiple of 256"),
        (Problem(64, 384, Regions(0, 384), "input"), None),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named(problem: Problem, reason: str | None) -> None:
    assert reason_against(problem) == reason


def test_random_weights_are_what_they_claim() -> None:
    weight = random_weight(PROBLEMS[2], CPU)
    assert not excess_groups(weight[:, :768]).any()
    assert (weight[:, :768].float() != 0).float().mean() == 0.5
    assert weight[:, 768:].float().all()
    assert not (weight.view(torch.uint8) == 0x80).any(), "−0.0"


def emulate(ptx: str, registers: dict[str, int]) -> None:
    """Runs the PTX text of the expansion on 32-bit integers, by the definitions of the PTX manual."""
    for op, arguments in re.findall(r"^([a-z0-9]+)\.b32 (.+);$", ptx, re.MULTILINE):
        target, *names = arguments.split(", ")
        values = [registers[name] if name in registers else int(name, 0) for name in names]
        if op == "and":
            result = values[0] & values[1]
        elif op == "shl":
            result = values[0] << values[1] & 0xFFFFFFFF
        elif op == "lop3":
            *inputs, table = values
            result = 0
            for bit in range(32):
                a, b, c = (value >> bit & 1 for value in inputs)
                result |= (table >> (a << 2 | b << 1 | c) & 1) << bit
        elif op == "prmt":
            source = values[0] | values[1] << 32
            result = 0
            for byte in range(4):
                selector = values[2] >> 4 * byte & 15
                chosen = source >> 8 * (selector & 7) & 0xFF
                if selector & 8:
                    chosen = 0xFF if chosen & 0x80 else 0
                result |= chosen << 8 * byte
        else:
            pytest.fail(f"the emulator does not know {op}")
        registers[target] = result


def test_the_ptx_expands_every_pair_of_patterns() -> None:
    from vllm_spense.kernels.one_launch_kernel import _expansion_ptx

    def word(values: list[int]) -> int:
        return int.from_bytes(bytes(values), "little")

    generator = torch.Generator().manual_seed(0)
    pairs = list(combinations(range(4), 2))
    for pattern_a, pattern_b in product(pairs, pairs):
        kept = torch.randint(0, 256, (4, 4), generator=generator).tolist()  # first a, second a, first b, second b
        mask = sum(8 >> place for place in pattern_a) << 4 | sum(8 >> place for place in pattern_b)
        registers = {f"${8 + i}": word(values) for i, values in enumerate(kept)} | {"$12": word([mask] * 4)}
        emulate(_expansion_ptx(), registers)
        for half, pattern in enumerate((pattern_a, pattern_b)):
            for place in range(4):
                expected = kept[2 * half + pattern.index(place)] if place in pattern else [0] * 4
                assert registers[f"${4 * half + place}"] == word(expected)


INTERPRETED = """
import json, sys, torch
from vllm_spense.format import Regions
from vllm_spense.kernels import one_launch
from vllm_spense.kernels.problem import Problem
from vllm_spense.kernels.synthetic import random_fp8, random_weight

torch.manual_seed(0)
cpu = torch.device("cpu")
results = []
for n, k, sparse, dense, split, tokens, tiling in json.load(sys.stdin):
    problem = Problem(n, k, Regions(sparse, dense), split, torch.float32)
    plan = one_launch.OneLaunchPlan(problem, tokens, cpu, one_launch.Tiling(*tiling))
    weight, x = random_weight(problem, cpu), random_fp8(tokens, k, cpu)
    packed = one_launch.pack(weight, problem)
    ordered = one_launch.kernel_order(x)
    wide = torch.full((tokens + 1, n), torch.nan)
    first = plan.run(ordered, packed, wide[:tokens]).clone()
    again = plan.run(ordered, packed)
    exact = x.double() @ weight.double().t()
    error = ((first - exact).norm() / exact.norm()).item()
    results.append([error, torch.equal(first, again), wide[tokens:].isnan().all().item()])
print(json.dumps(results))
"""


def test_the_kernel_in_tritons_interpreter() -> None:
    """In a process of its own: Triton decides when a kernel is defined whether it will be interpreted."""
    cases = [
        (256, 512, 128, 128, "output", 7, (64, 128, 3, 3, 4, 1, 1)),
        (384, 512, 256, 128, "output", 16, (128, 256, 3, 3, 4, 1, 2)),
        (192, 1024, 64, 128, "output", 33, (64, 128, 3, 3, 4, 2, 4)),
        (128, 1024, 512, 512, "input", 20, (128, 128, 3, 3, 4, 1, 1)),
        (128, 1024, 768, 256, "input", 3, (64, 256, 3, 3, 4, 3, 1)),
        (64, 1024, 1024, 0, "input", 5, (64, 128, 3, 3, 4, 3, 1)),
        (64, 1024, 0, 1024, "input", 5, (64, 128, 3, 3, 4, 1, 2)),
        (128, 256, 128, 0, "output", 100, (64, 128, 3, 3, 4, 1, 1)),
    ]
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert process.returncode == 0, process.stderr
    for case, (error, repeats, kept_inside) in zip(cases, json.loads(process.stdout), strict=True):
        # FP8 products are exact in float32, so what is left is the rounding of K additions.
        assert error < 1e-6 * case[1] ** 0.5, case
        assert repeats, case
        assert kept_inside, case


def test_tiling_must_fit() -> None:
    from vllm_spense.kernels.one_launch import OneLaunchPlan, Tiling, candidates

    odd = Problem(192, 512, Regions(128, 64), "output")
    with pytest.raises(AssertionError):
        OneLaunchPlan(odd, 16, CPU, Tiling(128, 128, 3, 3, 4, 1, 1))
    assert {tiling.rows for tiling in candidates(odd, 16)} == {64}
    assert max(tiling.sparse_parts for tiling in candidates(odd, 16)) == 2, "a part needs a tile"
    assert list(candidates(Problem(64, 256, Regions(0, 64), "output"), 16))
    assert {(tiling.sparse_parts, tiling.dense_parts) for tiling in candidates(odd, 128)} == {(1, 1)}


def test_tokens_are_blocked_by_powers_of_two() -> None:
    from vllm_spense.kernels.one_launch import token_block

    assert [token_block(tokens) for tokens in (1, 16, 17, 32, 33, 64, 65, 5000)] == [16, 16, 32, 32, 64, 64, 64, 64]
    assert random_fp8(3, 5, CPU).shape == (3, 5)
