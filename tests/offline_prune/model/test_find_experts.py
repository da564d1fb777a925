"""Which modules are routed experts, and what their router sends to each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import _SIZES, EXPERTS, HIDDEN, INTERMEDIATE, stacked, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import zoo
from offline_prune.model.experts import Experts, Mixture, find_mlps, routed
from offline_prune.model.gated_mlp import GatedMlp, Unsupported
from offline_prune.model.loading import SourceModel
from offline_prune.model.safetensors_reader import SafetensorsReader
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


def of_files(folder: Path, architecture: str) -> tuple[str, dict[str, torch.Tensor], list[torch.Tensor]]:
    """A tiny model whose files hold all experts in one tensor: what a pruned checkpoint of it calls the first layer's,
    all tensors, and of that layer (E, 2·I, H) and (E, H, I)."""
    if architecture == "granite-moe":
        tiny_model(architecture, folder)
        holder, names = "model.layers.0.block_sparse_moe", ("input_linear.weight", "output_linear.weight")
        stored = f"{holder}.experts"
    elif architecture == "qwen3-moe":
        stacked(tiny_model(architecture, folder / "single"), folder / "whole")
        folder, stored, names = folder / "whole", "model.layers.0.mlp.experts", ("gate_up_proj", "down_proj")
        holder = stored
    else:
        zoo.tiny_model(zoo.Architecture(architecture, "Qwen3VLMoeForConditionalGeneration"), folder)
        stored, names = "model.language_model.layers.0.mlp.experts", ("gate_up_proj", "down_proj")
        holder = stored
    tensors = load_file(folder / "model.safetensors")
    return stored, tensors, [tensors[f"{holder}.{name}"] for name in names]


@pytest.mark.parametrize("architecture", ["granite-moe", "qwen3-moe", "qwen3_vl_moe", "qwen3_vl_moe as published"])
def test_files_have_all_experts_in_one_tensor(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, published = architecture.partition(" as ")
    stored, tensors, (gate_ups, downs) = of_files(tmp_path, kind)
    folder = next(tmp_path.rglob("whole"), tmp_path)
    if published:
        exchanged = {name: each.mT.contiguous() if ".experts." in name else each for name, each in tensors.items()}
        save_file(exchanged, folder / "model.safetensors", metadata={"format": "pt"})
    source = SourceModel(str(folder))
    experts = next(iter(source.experts.values()))
    assert (experts.stored, experts.projections) == (stored, NAMES)
    assert source.tensors.read_by_transformers == (kind == "qwen3-moe")
    read: list[int] = []
    whole_read = SafetensorsReader.read

    def counted(self: SafetensorsReader, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        found = whole_read(self, name, part)
        read.append(found.numel() if found.ndim == 3 else 0)
        return found

    monkeypatch.setattr(SafetensorsReader, "read", counted)
    name = source.blocks[0].name
    block = source.load(name, torch.device("cpu"), torch.float32)
    # Each number once.
    assert sum(read) == gate_ups.numel() + downs.numel()
    for expert in range(4):
        (gate_up,), down = experts.parameters(block, expert)
        assert torch.equal(gate_up, gate_ups[expert].float())
        assert torch.equal(down, downs[expert].float())
        for layer, weight in zip(NAMES.to_dict().values(), (*gate_ups[expert].chunk(2), downs[expert]), strict=True):
            part = f"{stored}.{expert}.{layer}.weight"
            assert torch.equal(source.tensors.read(part), weight)
            assert source.tensors.shape(part) == tuple(weight.shape)
            assert source.tensors.dtype(part) == torch.bfloat16
            assert source.tensors.nbytes(part) == 2 * weight.numel()
            assert source.tensors.file_of(part) == folder / "model.safetensors"
    matrices = [each for each in source.tensors if len(source.tensors.shape(each)) == 3]
    assert not matrices, "the whole tensors stand beside their parts"


@pytest.mark.parametrize("scales", ["of all", "of rows", "of blocks"])
@pytest.mark.parametrize("architecture", ["granite-moe", "qwen3_vl_moe"])
def test_fp8_experts_in_one_tensor(architecture: str, scales: str, tmp_path: Path) -> None:
    stored, tensors, wholes = of_files(tmp_path, architecture)
    worth = []
    for whole in wholes:
        name = next(key for key, each in tensors.items() if each is whole)
        published = whole.float() if architecture == "granite-moe" else whole.float().mT.contiguous()
        count, n, k = published.shape
        size = {"of all": (1,), "of rows": (count, n, 1), "of blocks": (count, -(-n // 48), -(-k // 48))}[scales]
        scale = torch.rand(size) + 0.5
        tensors[name] = (published / 2).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale" if scales == "of rows" or name.endswith("weight") else f"{name}_scale_inv"] = scale
        spread = scale
        if scales == "of blocks":
            spread = scale.repeat_interleave(48, 1)[:, :n].repeat_interleave(48, 2)[..., :k]
        found = (tensors[name].float() * spread).bfloat16()
        worth.append(found if architecture == "granite-moe" else found.mT)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [48, 48]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = SourceModel(str(tmp_path))
    gate_ups, downs = worth
    for expert in range(4):
        for layer, weight in zip(NAMES.to_dict().values(), (*gate_ups[expert].chunk(2), downs[expert]), strict=True):
            assert torch.equal(source.tensors.read(f"{stored}.{expert}.{layer}.weight"), weight), layer
    assert not [name for name in source.tensors if "scale" in name]


def test_experts_in_one_tensor_of_another_form_are_refused(tmp_path: Path) -> None:
    """Inkling's files have gate's and up's rows in turns."""
    zoo.tiny_model(zoo.Architecture("inkling_mm_model", "InklingForConditionalGeneration"), tmp_path)
    found = SourceModel(str(tmp_path)).blocks[0].mlp
    assert isinstance(found, Unsupported)
    assert found.found == (
        "a mixture of experts whose files do not hold each expert by itself: model.llm.layers.0.mlp.experts.w13_weight "
        "(4, 256, 64), which transformers converts by Interleave"
    )


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3-moe", tmp_path)
    file = model / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.experts.2.up" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    found = SourceModel(str(model)).blocks[1].mlp
    assert isinstance(found, Unsupported)
    assert found.found == "a mixture of 4 experts, model.layers.1.mlp.experts, of which the files lack expert 2"
