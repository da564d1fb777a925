"""What each rank gets of an adapter: the part that belongs to what it holds of the layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.lora.utils as lora_utils
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

from vllm_spense.errors import FormatError
from vllm_spense.format import Regions
from vllm_spense.layout import shard
from vllm_spense.plugin.linear import InputSplitLinearMethod, OutputSplitLinearMethod
from vllm_spense.plugin.lora import arrangement
from vllm_spense.plugin.vllm_internals import arrange_loras

REGIONS, HIDDEN, RANK = Regions(sparse=192, dense=64), 16, 8
I = REGIONS.intermediate  # noqa: E741


@pytest.fixture(autouse=True)
def _arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_utils, "_all_lora_classes", lora_utils._all_lora_classes)
    arrange_loras(arrangement)


def base(kind: Any, rank: int, ranks: int, pruned: bool = True) -> torch.nn.Module:
    """A layer of vLLM's as far as LoRA looks at it: vLLM builds whole ones only inside an engine."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    rows = I * (2 if kind is MergedColumnParallelLinear else 1)
    split = kind is RowParallelLinear
    layer.tp_rank, layer.tp_size = rank, ranks
    layer.input_size, layer.output_size = (I, HIDDEN) if split else (HIDDEN, rows)
    layer.input_size_per_partition = I // ranks
    layer.output_size_per_partition = HIDDEN if split else rows // ranks
    layer.output_sizes = [I] * (rows // I)
    layer.weight_packed = torch.zeros(1)
    method_of = InputSplitLinearMethod if split else OutputSplitLinearMethod
    method: Any = method_of.__new__(method_of)
    method.regions, method.name = REGIONS, "mlp"
    layer.quant_method = method if pruned else None
    return layer


def with_lora(layer: torch.nn.Module, packed: list[str], sharded: bool = False) -> Any:
    config: Any = SimpleNamespace(max_lora_rank=RANK, fully_sharded_loras=sharded, lora_dtype=torch.float32)
    return lora_utils.from_layer(layer, 1, config, packed)


def rows_of(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    part = shard(REGIONS, rank, ranks)
    return torch.cat([tensor[part.sparse], tensor[part.dense]])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", ["merged", "one tensor", "alone", "up alone"])
def test_gate_and_up(stored: str, sharded: bool, ranks: int) -> None:
    gate, up, a = torch.randn(I, RANK), torch.randn(I, RANK), torch.randn(RANK, HIDDEN)
    for rank in range(ranks):
        part_a = a.split(RANK // ranks if sharded else RANK)[rank if sharded else 0]
        if stored in ("merged", "up alone"):
            layer = with_lora(base(MergedColumnParallelLinear, rank, ranks), ["gate_proj", "up_proj"], sharded)
            first = None if stored == "up alone" else a
            layer.set_lora(0, [first, a], [None if first is None else gate, up])
            zeros = torch.zeros(I // ranks, RANK)
            expected = [zeros if first is None else rows_of(gate, rank, ranks), rows_of(up, rank, ranks)]
        elif stored == "one tensor":
            layer = with_lora(base(MergedColumnParallelLinear, rank, ranks), ["gate_up_proj"], sharded)
            layer.set_lora(0, a, torch.cat([gate, up]))
            expected = [torch.cat([rows_of(gate, rank, ranks), rows_of(up, rank, ranks)])]
        else:
            layer = with_lora(base(ColumnParallelLinear, rank, ranks), [], sharded)
            layer.set_lora(0, a, gate)
            expected = [rows_of(gate, rank, ranks)]
        assert [torch.equal(b[0, 0], e) for b, e in zip(layer.lora_b_stacked, expected, strict=True)] == [True] * len(
            expected
        )
        assert torch.equal(layer.lora_a_stacked[-1][0, 0], part_a)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("sharded", [False, True])
def test_down(sharded: bool, ranks: int) -> None:
    a, b = torch.randn(RANK, I), torch.randn(HIDDEN, RANK)
    for rank in range(ranks):
        layer = with_lora(base(RowParallelLinear, rank, ranks), [], sharded)
        layer.set_lora(0, a, b)
        assert torch.equal(layer.lora_a_stacked[0][0, 0], rows_of(a.T, rank, ranks).T)
        expected = b.split(HIDDEN // ranks)[rank] if sharded else b
        assert torch.equal(layer.lora_b_stacked[0][0, 0], expected)


def test_layers_that_are_not_pruned_or_not_shared_stay_vllms() -> None:
    theirs = lora_utils._all_lora_classes
    arrange_loras(arrangement)
    assert lora_utils._all_lora_classes is theirs
    for layer in (base(RowParallelLinear, 0, 2, pruned=False), base(RowParallelLinear, 0, 1)):
        assert type(with_lora(layer, [])).__module__.startswith("vllm.lora")
    assert not type(with_lora(base(RowParallelLinear, 0, 2), [])).__module__.startswith("vllm.lora")


def test_zeros_in_a_ranks_shape_are_vllms_warm_up_and_all_else_is_refused() -> None:
    layer = with_lora(base(RowParallelLinear, 1, 2), [])
    layer.set_lora(0, torch.zeros(RANK, I // 2), torch.zeros(HIDDEN, RANK))
    with pytest.raises(FormatError, match=rf"does not fit the layer \(layer: mlp; found: \(8, 128\); expected: {I}\)"):
        layer.set_lora(0, torch.ones(RANK, I // 2), torch.zeros(HIDDEN, RANK))
