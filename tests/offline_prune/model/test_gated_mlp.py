"""Gated MLPs are recognized by what they compute."""

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from tiny_models import _SIZES, FAMILIES, HIDDEN, INTERMEDIATE, UNSUPPORTED
from torch import nn
from transformers import AutoModelForCausalLM

from offline_prune.model.gated_mlp import GatedMlp, Unsupported, find_gated_mlp
from offline_prune.model.skeleton import find_text_model
from vllm_spense.format import Projections


def first_block(name: str) -> nn.Module:
    kind, special = (FAMILIES | UNSUPPORTED)[name]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**_SIZES, **special}))
    return find_text_model(model).blocks[0][1]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    projections = ("gate_up_proj", "gate_up_proj") if name == "phi3" else ("gate_proj", "up_proj")
    assert find_gated_mlp(first_block(name)) == GatedMlp(
        "mlp", Projections(*projections, "down_proj"), HIDDEN, INTERMEDIATE
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-neox", "no gated MLP .*mlp.dense_h_to_4h"),
        ("opt", "no gated MLP .*fc1"),
        ("gpt-oss", "mixture of experts: mlp.experts.gate_up_proj"),
        ("starcoder2", "no gated MLP .*mlp.c_fc"),
        # Parameters of three dimensions that are no experts.
        ("rwkv", "no gated MLP .*feed_forward.key"),
        ("xlnet", "no gated MLP .*ff.layer_1"),
    ],
)
def test_what_else_was_found_is_said(name: str, words: str) -> None:
    found = find_gated_mlp(first_block(name))
    assert isinstance(found, Unsupported)
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(found.found))


class OddNames(nn.Module):
    def __init__(self, swapped: bool = False, width: int = 16) -> None:
        super().__init__()
        self.swapped = swapped
        self.third = nn.Linear(width, 8, bias=False)
        self.first = nn.Linear(8, width, bias=False)
        self.second = nn.Linear(8, width, bias=False)

    def combine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(b) * a if self.swapped else nn.functional.gelu(a) * b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.combine(self.first(x), self.second(x)))


class Sum(OddNames):
    def combine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(a) + b


class Mixing(OddNames):
    def combine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(a) * b.roll(1, -1)


class Interleaved(nn.Module):
    """Gate and up in alternating rows, which a contiguous split would tear apart."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 32, bias=False)
        self.out = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.both(x)
        return self.out(nn.functional.silu(y[..., ::2]) * y[..., 1::2])


class Holder(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(f"part{i}", module)


def test_the_linear_factor_is_up_whatever_its_name() -> None:
    assert find_gated_mlp(Holder(OddNames())) == GatedMlp("part0", Projections("first", "second", "third"), 8, 16)
    assert find_gated_mlp(Holder(OddNames(swapped=True))) == GatedMlp(
        "part0", Projections("second", "first", "third"), 8, 16
    )


def test_square_projections_are_told_apart() -> None:
    assert find_gated_mlp(Holder(OddNames(width=8))) == GatedMlp("part0", Projections("first", "second", "third"), 8, 8)


@pytest.mark.parametrize("module", [Sum(), Mixing(), Interleaved()])
def test_matching_shapes_are_not_enough(module: nn.Module) -> None:
    assert isinstance(find_gated_mlp(Holder(module)), Unsupported)


def test_two_gated_mlps_in_a_block_are_refused() -> None:
    found = find_gated_mlp(Holder(OddNames(), OddNames()))
    assert isinstance(found, Unsupported)
    assert "2 gated MLPs: part0, part1" in found.found
