"""The one-launch kernel's tables: every step of every tile once, splits that add up, and even loads."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spense.format import Regions
from vllm_spense.kernels.one_launch.schedule import DENSE_K, FIELDS, ROWS, Schedule, Tiling, schedule
from vllm_spense.kernels.region_gemm.problem import Problem

MULTIPROCESSORS = 132
GATE_UP = Problem(51200, 5120, Regions(19200, 6400), "output", projections=2)
DOWN = Problem(5120, 25600, Regions(19200, 6400), "input")


def segments(tables: Schedule) -> list[list[dict[str, int]]]:
    """Of each thread block, up to the one that says it is the last."""
    out = []
    for line in tables.segments.tolist():
        named = [dict(zip(FIELDS, segment, strict=True)) for segment in line]
        end = next(index for index, segment in enumerate(named) if segment["last"])
        out.append(named[: end + 1])
    return out


def require_complete(problem: Problem, tokens: int, tiling: Tiling) -> list[list[dict[str, int]]]:
    """As the kernel will execute it."""
    tables = schedule(problem, tokens, tiling, MULTIPROCESSORS)
    assert tables.segments.dtype == np.int32
    assert tables.segments.shape[0] <= MULTIPROCESSORS
    blocks = segments(tables)
    done: defaultdict[tuple[int, int], list[dict[str, int]]] = defaultdict(list)
    for segment in (segment for block in blocks for segment in block):
        if segment["row_end"]:
            done[segment["column"], segment["token"]].append(segment)

    sparse, dense = problem.regions.sparse, problem.regions.dense
    output = problem.split == "output"
    # Of each region of each projection: its first column of the output, its rows.
    regions = [(0, 0, problem.n, True, True)]
    if output:
        each = problem.n // problem.projections
        regions = [(p, p * each, sparse, True, False) for p in range(problem.projections)]
        regions += [(p, p * each + sparse, dense, False, True) for p in range(problem.projections)]
    expected = {
        (first + row, token): (projection, row, rows, in_sparse, in_dense)
        for projection, first, rows, in_sparse, in_dense in regions
        for row in range(0, rows, ROWS)
        for token in range(0, tokens, tiling.tokens)
    }
    assert set(done) == set(expected)
    semaphores, partials = set(), set()
    for place, (projection, row, rows, in_sparse, in_dense) in expected.items():
        splits = sorted(done[place], key=lambda segment: segment["split"])
        assert [split["split"] for split in splits] == list(range(len(splits)))
        agreed = {(s["split_count"], s["projection"], s["row"], s["row_end"]) for s in splits}
        assert agreed == {(len(splits), projection, row, rows)}
        steps = (-(-problem.sparse_shape[1] // tiling.sparse_k), -(-problem.dense_shape[1] // DENSE_K))
        for name, wanted in (("sparse", steps[0] * in_sparse), ("dense", steps[1] * in_dense)):
            covered = [step for split in splits for step in range(split[f"{name}_begin"], split[f"{name}_end"])]
            assert covered == list(range(wanted)), "every step once, and in order"
        if len(splits) > 1:
            (semaphore,) = {split["semaphore"] for split in splits}
            semaphores.add(semaphore)
            mine = {splits[0]["first_partial"] + index for index in range(len(splits))}
            assert not partials & mine
            partials |= mine
    if not tiling.cluster:
        assert semaphores == set(range(tables.semaphores))
        assert partials == set(range(tables.partials))
    return blocks


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from(["output", "input"]),
    sizes=st.tuples(*[st.integers(1, 40)] * 2, st.integers(0, 40)),
    projections=st.integers(1, 2),
    tokens=st.integers(1, 700),
    tile=st.sampled_from([8, 64, 256]),
    sparse_k=st.sampled_from([128, 256]),
)
def test_every_step_once(split, sizes, projections, tokens, tile, sparse_k) -> None:
    other, sparse, dense = (32 * size for size in sizes)
    projections = projections if split == "output" else 1
    n, k = (projections * (sparse + dense), other) if split == "output" else (other, sparse + dense)
    problem = Problem(n, k, Regions(sparse, dense), split, projections=projections)
    require_complete(problem, tokens, Tiling(tile, sparse_k))


@pytest.mark.parametrize("cluster", [False, True])
@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("problem", [DOWN, Problem(160, 96, Regions(64, 32), "input")], ids=["down", "tiny"])
def test_splits_of_a_tile_are_neighbours(problem: Problem, splits: int, cluster: bool) -> None:
    """As they must be to form a cluster: block b has split b mod splits, even if there is nothing left for it to do."""
    blocks = require_complete(problem, 32, Tiling(32, 256, splits, cluster))
    for index, block in enumerate(blocks):
        (segment,) = block
        assert (segment["split"], segment["split_count"]) == (index % splits, splits)
        assert segment["row"] == index // splits * ROWS


@pytest.mark.parametrize("tokens", [1, 32, 128, 2048])
@pytest.mark.parametrize("problem", [GATE_UP, DOWN], ids=["gate_up", "down"])
def test_loads_are_even(problem: Problem, tokens: int) -> None:
    tiling = Tiling(min(tokens, 256) if tokens > 1 else 8, 128)
    blocks = require_complete(problem, tokens, tiling)
    loads = [
        sum(
            (s["sparse_end"] - s["sparse_begin"]) * tiling.sparse_cost
            + (s["dense_end"] - s["dense_begin"]) * tiling.dense_cost
            for s in block
        )
        for block in blocks
    ]
    assert len(loads) == MULTIPROCESSORS
    assert max(loads) <= 1.03 * sum(loads) / len(loads)


def test_a_few_tiles_too_many_are_not_cut_into_slivers() -> None:
    """400 tiles for 132 thread blocks: splits of large tiles cost more than they bring."""
    blocks = require_complete(Problem(51200, 5120, Regions(51200, 0), "output"), 256, Tiling(256, 128))
    assert max(segment["split_count"] for block in blocks for segment in block) <= 4
