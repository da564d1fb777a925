"""Rank shards and the 2:4 rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spense.errors import FormatError
from vllm_spense.format import Regions
from vllm_spense.layout import excess_groups, keep_mask_2of4, require_2of4, shard

SIZES = st.integers(0, 12).map(lambda n: n * 32)


@given(sparse=SIZES, dense=SIZES, size=st.sampled_from([1, 2, 4, 8]))
def test_the_shards_of_all_ranks_are_the_whole_weight(sparse: int, dense: int, size: int) -> None:
    weight = torch.arange((sparse + dense) * 3).view(-1, 3)
    shards = [shard(Regions(sparse, dense), rank, size) for rank in range(size)]
    together = torch.cat([weight[s.sparse] for s in shards] + [weight[s.dense] for s in shards])
    assert torch.equal(together, weight)
    assert {s.regions for s in shards} == {Regions(sparse // size, dense // size)}


def test_a_tensor_parallel_size_that_cuts_a_region_is_refused() -> None:
    with pytest.raises(FormatError, match=r"tensor parallel size 8 .*sizes that fit: 1, 2, 4") as caught:
        shard(Regions(96 * 4, 96 - 4), 0, 8, layer="model.layers.0.mlp")
    assert caught.value.layer == "model.layers.0.mlp"


def test_a_tensor_parallel_size_that_cuts_a_group_is_refused() -> None:
    with pytest.raises(FormatError, match="sparse region"):
        shard(Regions(32, 32), 0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_excess_groups_sees_a_third_nonzero(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3], [1, -1, 0.5, 0, -0.0, 1, 1, -0.0]]).to(dtype)
    assert excess_groups(weight).tolist() == [[False, False], [True, False]]


def test_require_2of4_names_row_and_columns() -> None:
    weight = torch.zeros(3, 8)
    weight[2, 4:7] = 1
    with pytest.raises(FormatError, match="row 2, columns 4 to 7") as caught:
        require_2of4(weight, "layer", "file")
    assert caught.value.found == [1.0, 1.0, 1.0, 0.0]


@given(st.lists(st.integers(-3, 3), min_size=8, max_size=8))
def test_keep_mask_keeps_the_two_largest(values: list[int]) -> None:
    scores = torch.tensor([values], dtype=torch.float32)
    keep = keep_mask_2of4(scores)
    for start in (0, 4):
        group, kept = scores[0, start : start + 4], keep[0, start : start + 4]
        assert kept.sum() == 2
        assert group[kept].min() >= group[~kept].max()
