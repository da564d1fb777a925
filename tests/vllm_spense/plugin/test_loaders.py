"""What the loaders place on each rank, against `layout.shard` and by hand."""

import pytest
import torch
from torch.nn import Parameter

from vllm_spense.errors import FormatError
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.layout import excess_groups, shard
from vllm_spense.plugin.loaders import columns_loader, fill_dummy, replicated_loader, rows_loader

REGIONS = Regions(sparse=192, dense=64)
I = REGIONS.intermediate  # noqa: E741
SIZES = [1, 2, 4, 8]
# Each of the 256 rows holds another byte.
GATE = torch.arange(I, dtype=torch.uint8)[:, None].expand(I, 16).contiguous().view(torch.float8_e4m3fn)
UP = GATE.view(torch.uint8).flip(0).view(torch.float8_e4m3fn)


def empty(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Parameter:
    return Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fused", [None, (0, 1), False], ids=["fused", "fused with ids", "apart"])
def test_gate_and_up_on_every_rank(size: int, fused: tuple[int, int] | bool | None) -> None:
    for rank in range(size):
        part = shard(REGIONS, rank, size)
        load = rows_loader("mlp", I, part, projections=2)
        weight = empty(2 * I // size, 16)
        if fused is False:
            load(weight, UP, 1)
            load(weight, GATE, 0)
        else:
            load(weight, torch.cat((bits(GATE), bits(UP))).view(torch.float8_e4m3fn), fused)
        rows = [region[rows] for region in (GATE, UP) for rows in (part.sparse, part.dense)]
        assert torch.equal(bits(weight.data), torch.cat([bits(region) for region in rows]))


@pytest.mark.parametrize("size", SIZES)
def test_down_on_every_rank(size: int) -> None:
    whole = GATE.t()
    for rank in range(size):
        part = shard(REGIONS, rank, size)
        weight = empty(16, I // size)
        columns_loader("mlp", I, part)(weight, whole)
        assert torch.equal(bits(weight.data), torch.cat((bits(whole[:, part.sparse]), bits(whole[:, part.dense])), 1))


@pytest.mark.parametrize("regions", [Regions(0, 256), Regions(256, 0), REGIONS])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_together_hold_everything_once(regions: Regions, size: int) -> None:
    rows, columns = [], []
    for rank in range(size):
        part = shard(regions, rank, size)
        weight, down = empty(I // size, 16), empty(16, I // size)
        rows_loader("mlp", I, part, projections=1)(weight, GATE)
        columns_loader("mlp", I, part)(down, GATE.t())
        rows.append(bits(weight.data)[:, 0])
        columns.append(bits(down.data)[0])
    for found in (rows, columns):
        assert torch.cat(found).sort().values.tolist() == list(range(I))


def test_scales_and_biases_go_with_their_rows() -> None:
    part = shard(REGIONS, 1, 2)
    load = rows_loader("mlp", I, part, projections=2)
    column = torch.arange(2.0 * I)
    scale, bias = empty(I, 1, dtype=torch.float32), empty(I, dtype=torch.float32)
    load(scale, column[:, None].bfloat16())
    load(bias, column)
    expected = torch.cat([column[first:][rows] for first in (0, I) for rows in (part.sparse, part.dense)])
    assert torch.equal(bias.data, expected)
    assert torch.equal(scale.data[:, 0], expected.bfloat16().float())


def test_every_rank_holds_downs_scale_whole() -> None:
    scale = empty(16, 1, dtype=torch.float32)
    replicated_loader("mlp")(scale, torch.arange(16.0)[:, None])
    assert scale.data.flatten().tolist() == list(range(16))


def test_wrong_tensors_are_refused() -> None:
    part = shard(REGIONS, 0, 2)
    rows, columns, whole = (
        rows_loader("a.up", I, part, 2),
        columns_loader("a.down", I, part),
        replicated_loader("a.down"),
    )
    with pytest.raises(FormatError, match=r"layer: a\.up; found: \(255, 16\); expected: \(256, 16\)"):
        rows(empty(I, 16), GATE[:-1], 0)
    with pytest.raises(FormatError, match=r"layer: a\.down; found: \(16, 255\); expected: \(16, 256\)"):
        columns(empty(16, I // 2), GATE.t()[:, :-1])
    with pytest.raises(FormatError, match=r"found: \(16,\); expected: \(16, 1\)"):
        whole(empty(16, 1, dtype=torch.float32), torch.ones(16))
    with pytest.raises(FormatError, match=r"found: torch\.bfloat16; expected: torch\.float8_e4m3fn"):
        rows(empty(I, 16), GATE.bfloat16(), 0)


@pytest.mark.parametrize(("split", "projections"), [("output", 1), ("output", 2), ("input", 1)])
def test_dummy_weights_obey_the_format(split: str, projections: int) -> None:
    regions = Regions(32 // projections, 32 // projections) if split == "output" else Regions(96, 32)
    problem = Problem(64, 128, regions, split, projections=projections)
    weight, scale = torch.empty(64, 128).to(torch.float8_e4m3fn), torch.empty(64, 1)
    fill_dummy(weight, scale, problem)
    assert len(problem.split_regions(weight)) == projections
    for sparse, dense in problem.split_regions(weight):
        assert (sparse.shape, dense.shape) == (problem.sparse_shape, problem.dense_shape)
        assert not excess_groups(sparse).any()
        assert (sparse.float() == 0).float().mean() < 0.55
        assert (dense.float() == 0).float().mean() < 0.05
    assert (scale > 0).all()
