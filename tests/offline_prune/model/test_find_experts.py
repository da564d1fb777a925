"""Which modules are routed experts, and what their router sends to each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import _SIZES, EXPERTS, HIDDEN, INTERMEDIATE, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from offline_prune.model.experts import Experts, Mixture, find_mlps, routed
from offline_prune.model.gated_mlp import GatedMlp, Unsupported
from offline_prune.model.loading import SourceModel
from vllm_spense.format import Projections

NAMES = Projections("gate_proj", "up_proj", "down_proj")


def last_block(name: str, **changes: object) -> nn.Module:
    kind, special = EXPERTS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**_SIZES, **special, **changes}))
    return model.model.layers[-1]


class Expert(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(4, size), nn.Linear(4, size), nn.Linear(size, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(torch.tanh(self.w1(x)) * self.w3(x))


class Listed(nn.Module):
    """As code that comes with a model has it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(size) for size in sizes)
        self.shared = Expert(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x.sum(-1) > 0).long()
        out = self.shared(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] += expert(x[chosen == number])
        return out


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "deepseek-v3"])
def test_stacked_experts_are_found_by_what_they_compute(name: str) -> None:
    found = find_mlps(last_block(name))
    assert isinstance(found, Mixture)
    fused = Projections("gate_up_proj", "gate_up_proj", "down_proj")
    stacked = ("gate_up_proj", "down_proj")
    assert found.experts == Experts("mlp.experts", 4, HIDDEN, INTERMEDIATE, fused, stacked)
    shared = GatedMlp("mlp.shared_experts", NAMES, HIDDEN, 2 * INTERMEDIATE)
    assert found.shared == ((shared,) if name == "deepseek-v3" else ())


@pytest.mark.parametrize("wrong", ["scaled", "other experts", "other inputs"])
def test_modules_that_compute_something_else_are_none(wrong: str) -> None:
    block = last_block("qwen3-moe")
    theirs = type(block.mlp.experts)

    def forward(self: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        given = {"other experts": (x, index.flip(-1), weights), "other inputs": (x.abs(), index, weights)}
        return theirs.forward(self, *given.get(wrong, (x, index, 2 * weights)))

    block.mlp.experts.__class__ = type("Other", (theirs,), {"forward": forward})
    assert isinstance(find_mlps(block), Unsupported)


def test_an_activation_that_is_not_elementwise_is_refused() -> None:
    block = last_block("qwen3-moe")
    block.mlp.experts._apply_gate = lambda gate_up: torch.softmax(gate_up.chunk(2, -1)[0], -1) * gate_up.chunk(2, -1)[1]
    assert isinstance(find_mlps(block), Unsupported)


def test_lists_of_experts() -> None:
    names = Projections("w1", "w3", "w2")
    found = find_mlps(Block(Listed(8, 8)))
    assert found == Mixture(Experts("mlp.experts", 2, 4, 8, names, None), (GatedMlp("mlp.shared", names, 4, 16),))
    assert isinstance(find_mlps(Block(Listed(8, 12))), Unsupported), "experts of several sizes"


def test_experts_of_a_list_are_watched() -> None:
    torch.manual_seed(0)
    block, x = Block(Listed(8, 8)), torch.randn(2, 5, 4)
    found = find_mlps(block)
    assert isinstance(found, Mixture)
    seen = {}
    with found.experts.watched(block, lambda expert, inputs: seen.update({expert: inputs}), lambda: None):
        block(x)
    chosen = (x.sum(-1) > 0).long()
    for expert in range(2):
        assert torch.equal(seen[expert], x[chosen == expert])
        mlp = block.mlp.experts[expert]
        expected = torch.tanh(mlp.w1(seen[expert])) * mlp.w3(seen[expert])
        assert torch.equal(found.experts.mid(block, expert, seen[expert]), expected)


def test_tokens_keep_their_order_and_strangers_are_left_out() -> None:
    hidden = torch.arange(4.0)[:, None]
    index = torch.tensor([[2, 0], [0, 9], [2, 1], [9, 0]])
    found = {expert: inputs.flatten().tolist() for expert, inputs in routed(hidden, index, 4)}
    assert found == {0: [0.0, 1.0, 3.0], 1: [2.0], 2: [0.0, 2.0]}


@pytest.mark.parametrize(
    ("name", "stored", "names"),
    [
        ("qwen3-moe", "model.layers.0.mlp.experts", NAMES),
        ("mixtral", "model.layers.0.block_sparse_moe.experts", Projections("w1", "w3", "w2")),
    ],
)
def test_files_have_each_expert_by_itself(name: str, stored: str, names: Projections, tmp_path: Path) -> None:
    model = tiny_model(name, tmp_path)
    source = SourceModel(str(model))
    experts = source.experts["model.layers.0"]
    assert (experts.stored, experts.projections) == (stored, names)
    block = source.load("model.layers.0", torch.device("cpu"), torch.float32)
    files = load_file(model / "model.safetensors")
    for expert in range(4):
        (gate_up,), down = experts.parameters(block, expert)
        gate, up, stored_down = (files[f"{stored}.{expert}.{leaf}.weight"] for leaf in names.to_dict().values())
        assert torch.equal(gate_up, torch.cat([gate, up]).float())
        assert torch.equal(down, stored_down.float())


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3-moe", tmp_path)
    file = model / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.experts.2.up" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    found = SourceModel(str(model)).blocks[1].mlp
    assert isinstance(found, Unsupported)
    assert found.found == "a mixture of 4 experts, model.layers.1.mlp.experts, of which the files lack expert 2"
