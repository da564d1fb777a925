"""Which part of which expert a rank loads, and what is refused before and after that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import Regions
from vllm_spense.layout import rank_order
from vllm_spense.ops.dispatch import Path
from vllm_spense.plugin import experts as plugin
from vllm_spense.plugin.experts import ExpertRegions, RegionExpertsMethod

COUNT, HIDDEN, REGIONS = 4, 64, Regions(64, 32)
FP8, SHARDS = torch.float8_e4m3fn, {"w1": (96, HIDDEN), "w3": (96, HIDDEN), "w2": (HIDDEN, 96)}


class Layer(nn.Module):
    """As much of vLLM's `RoutedExperts` as a method sees."""

    def __init__(self, rank: int = 0, size: int = 1, local: dict[int, int] | None = None, **settings: Any) -> None:
        super().__init__()
        self.local = local or {expert: expert for expert in range(COUNT)}
        given = {"num_experts": COUNT, "intermediate_size": REGIONS.intermediate, "has_bias": False, **settings}
        self.moe_config = SimpleNamespace(
            **given,
            activation=SimpleNamespace(value=settings.get("activation_name", "silu")),
            moe_parallel_config=SimpleNamespace(tp_rank=rank, tp_size=size),
        )
        self.expert_map = None
        self.method = RegionExpertsMethod(self, ExpertRegions(REGIONS, COUNT, "mlp.experts", dummy=False))

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return self.local.get(expert, -1)

    def create(self) -> Layer:
        size = self.moe_config.moe_parallel_config.tp_size
        self.method.create_weights(self, len(self.local), HIDDEN, REGIONS.intermediate // size, torch.float32)
        return self

    def load(self, tensors: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]) -> None:
        for (expert, shard), loaded in tensors.items():
            for parameter, tensor in zip(self.of(shard), loaded, strict=True):
                done = parameter.weight_loader(parameter, tensor, "name", shard, expert, return_success=True)
                assert done == (expert in self.local)

    def of(self, shard: str) -> tuple[nn.Parameter, nn.Parameter]:
        part = "w2" if shard == "w2" else "w13"
        return getattr(self, f"{part}_weight"), getattr(self, f"{part}_weight_scale")


def whole(broken: bool = False) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """Weights of all experts that are 2:4 everywhere."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for expert in range(COUNT):
        for shard, shape in SHARDS.items():
            weight = torch.randn(shape, generator=generator)
            weight.unflatten(-1, (-1, 4))[..., :2] = 0
            found[expert, shard] = weight.to(FP8), torch.rand(shape[0], 1, generator=generator).bfloat16() + 0.1
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_load_their_share_of_both_regions(size: int) -> None:
    tensors = whole()
    orders = rank_order(REGIONS, size).chunk(size)
    for rank in range(size):
        layer = Layer(rank, size).create()
        layer.load(tensors)
        order, half = orders[rank], REGIONS.intermediate // size
        for expert in range(COUNT):
            for i, shard in enumerate(("w1", "w3")):
                for found, loaded in zip(layer.of(shard), tensors[expert, shard], strict=True):
                    mine = found[expert][i * half : (i + 1) * half]
                    assert torch.equal(mine.float(), loaded[order].float()), (expert, shard)
            weight, scale = layer.of("w2")
            assert torch.equal(weight[expert].float(), tensors[expert, "w2"][0][:, order].float())
            assert torch.equal(scale[expert], tensors[expert, "w2"][1].float())


def test_a_rank_of_expert_parallelism_loads_whole_experts() -> None:
    layer, tensors = Layer(local={2: 0, 3: 1}).create(), whole()
    layer.load(tensors)
    assert layer.w13_weight.shape == (2, 192, HIDDEN)
    assert torch.equal(layer.w2_weight[1].float(), tensors[3, "w2"][0].float())


def test_ranks_add_up_to_the_whole() -> None:
    tensors, torch_x = whole(), torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [0, 2], [1, 3]])
    weights = torch.full((6, 2), 0.5)

    def output(layer: Layer, topk: torch.Tensor) -> torch.Tensor:
        layer.load(tensors)
        layer.method.process_weights_after_loading(layer)
        return layer.method.apply(layer, torch_x, weights, topk, None, None)

    alone = output(Layer().create(), ids)
    ranks = [output(Layer(rank, 2).create(), ids) for rank in range(2)]
    # Each rank has scales of its own for its part of the activations.
    torch.testing.assert_close(sum(ranks), alone, rtol=0.1, atol=0.1 * alone.abs().max().item())
    experts = []
    for first in (0, 2):
        layer = Layer(local={first: 0, first + 1: 1}).create()
        layer.expert_map = torch.tensor([layer.local.get(expert, -1) for expert in range(COUNT)])
        experts.append(output(layer, ids))
    torch.testing.assert_close(sum(experts), alone)


def test_what_is_missing_or_broken_is_found() -> None:
    def said(change: Any) -> str:
        layer, tensors = Layer().create(), whole()
        change(tensors)
        layer.load(tensors)
        with pytest.raises(FormatError) as caught:
            layer.method.process_weights_after_loading(layer)
        return str(caught.value)

    def broken(tensors: Any) -> None:
        tensors[2, "w3"][0][7] = 1.0

    assert "missing or holds NaN" in said(lambda tensors: tensors.pop((1, "w2")))
    assert "expert 2 of this rank" in said(lambda tensors: tensors.pop((2, "w1")))
    assert "not 2:4" in said(broken)
    assert "expert 2 of this rank" in said(broken)
    assert "scale is missing or wrong" in said(lambda tensors: tensors[0, "w2"][1].zero_())


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: Layer(0, 3), "tensor parallel size 3 does not divide the sparse region"),
        (lambda: Layer(num_experts=8), "another number of experts than the model has.*found: 4; expected: 8"),
        (lambda: Layer(intermediate_size=128), "do not add up to the intermediate size"),
        (lambda: Layer(has_bias=True), "found biases, activation silu; expected no biases"),
        (lambda: Layer(activation_name="swigluoai"), r"found activation swigluoai.*compressed-tensors serves"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layer: Any, words: str) -> None:
    with pytest.raises(SpenseError, match=words):
        layer().create()


def test_a_shape_that_does_not_fit_is_refused() -> None:
    layer, tensors = Layer().create(), whole()
    tensors[1, "w2"] = tensors[1, "w2"][0][:, :64], tensors[1, "w2"][1]
    with pytest.raises(FormatError, match="does not fit the regions"):
        layer.load(tensors)


@pytest.mark.parametrize("path", [None, Path.DENSE, Path.ONE_LAUNCH, Path.LIBRARY])
@pytest.mark.parametrize("reason", [None, "an old GPU"])
def test_which_kernel_runs(path: Path | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(hidden, regions, count, top_k, dtype, activation, device) -> str | None:
        assert (hidden, regions, count, top_k, activation) == (HIDDEN, Regions(32, 16), COUNT, 2, "silu")
        return reason

    monkeypatch.setattr(plugin.experts, "reason_against_kernel", asked)
    monkeypatch.setattr(plugin, "forced", lambda: path)
    sizes = {"hidden_dim": HIDDEN, "num_local_experts": COUNT, "experts_per_token": 2, "in_dtype": torch.bfloat16}
    layer = Layer(1, 2, **sizes)
    if path is Path.ONE_LAUNCH and reason:
        with pytest.raises(SpenseError, match=r"SPENSE_PATH=one-launch cannot be followed: an old GPU .*mlp\.experts"):
            layer.method.parts.reason_against_kernel(layer, torch.device("cpu"))
    else:
        found = layer.method.parts.reason_against_kernel(layer, torch.device("cpu"))
        assert found == ("SPENSE_PATH=dense" if path is Path.DENSE else reason)
