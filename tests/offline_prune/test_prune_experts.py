"""The whole pruner on mixtures of experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import cut_off, logits, run
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, INTERMEDIATE, stacked, tiny_model
from transformers import AutoModelForCausalLM

from offline_prune import expert_pruning
from offline_prune.calibration.hidden_states import Stream
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.checkpoint.permutations import read_permutations
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.methods.recipe import METHODS, Layout, Recipe, Selection
from offline_prune.model.experts import Experts, Mixture
from offline_prune.model.loading import SourceModel
from offline_prune.model.safetensors_reader import SafetensorsReader
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import Projections, Regions

SPARSE = 96
LAYER = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3-moe", tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize("name", EXPERTS)
def test_every_expert_is_pruned_and_nothing_else(name: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(name, tmp_path / "model")
    report = run(model, tmp_path / "out", text)
    verified, annotation = verify(tmp_path / "out"), open_checkpoint(tmp_path / "out").annotation
    mlps = list(annotation.mlps())
    assert verified.mlps == len(mlps) == sum(len(layer.tokens or [0]) for layer in report.layers)
    assert verified.sparse_zeros == pytest.approx(0.5, abs=0.01)
    assert report.mlp_sparsity == 0.375
    before, after = SafetensorsReader(model), SafetensorsReader(tmp_path / "out")
    untouched = (".gate.weight", ".router.weight", ".router.layer.weight", "norm.weight", "embed_tokens.weight")
    routers = [key for key in before if key.endswith(untouched)]
    assert routers
    for key in routers:
        assert torch.equal(before.read(key), after.read(key)), key
    source = SourceModel(str(model)).tensors
    # Experts that the files had in one tensor are there once.
    assert {key for key in after if not key.endswith("_scale")} == {source.stored(key) for key in source}
    for layer in report.layers:
        if layer.tokens is not None:
            # Two experts of each of the 8 · 64 tokens.
            assert sum(layer.tokens) == 2 * 8 * 64
            assert layer.tuning is None
            assert all(0 < part.loss < 0.6 for part in (layer.gate, layer.up, layer.down))


@pytest.mark.parametrize("method", ["spensegpt++", "spensegpt+", "wanda"])
def test_batches_of_experts_come_out_as_one_by_one(
    method: str, qwen: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for at_once in (1, 3, 32):
        monkeypatch.setattr(expert_pruning, "_AT_ONCE", at_once)
        found[at_once] = run(qwen, tmp_path / str(at_once), text, method=method, sparsity=0.375).layers
        verify(tmp_path / str(at_once))
    for one, three, all_of_them in zip(*found.values(), strict=True):
        for part in ("gate", "up", "down"):
            expected = pytest.approx(getattr(one, part).loss, rel=0.02)
            assert getattr(three, part).loss == expected
            assert getattr(all_of_them, part).loss == expected


def test_how_many_experts_are_pruned_at_once() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    published = Experts("mlp.experts", 128, 2048, 768, Projections("gate", "up", "down"), None)
    assert expert_pruning.experts_at_once(published, Recipe(), gpu) == 32
    assert expert_pruning.experts_at_once(published, Recipe(), cpu) == 1
    # Each has an order of its own in which its columns are processed.
    assert expert_pruning.experts_at_once(published, Recipe(layout=Layout.NONE), gpu) == 1
    wide = replace(published, hidden=7168, intermediate=2048)
    assert 1 < expert_pruning.experts_at_once(wide, Recipe(), gpu) < 32
    assert expert_pruning.experts_at_once(replace(published, count=8), Recipe(), gpu) == 8


def test_a_layout_with_orders_of_their_own(qwen: Path, tmp_path: Path, text: Path) -> None:
    run(qwen, tmp_path / "out", text, sparsity=0.25, layout="none")
    assert verify(tmp_path / "out").sparse_zeros == pytest.approx(0.5, abs=0.01)


def test_transformers_reads_the_same_files(qwen: Path, tmp_path: Path, text: Path) -> None:
    run(qwen, tmp_path / "out", text)
    ours, _ = load_dense(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weights = dict(theirs.named_parameters())
    found = [key for key, _ in ours.named_parameters() if ".experts." in key]
    assert len(found) == 4
    for key in found:
        # transformers keeps dequantized experts in BF16.
        assert torch.equal(weights[key], ours.get_parameter(key).bfloat16().float()), key


def test_transformers_has_no_names_for_single_experts_of_some_models(qwen: Path, tmp_path: Path, text: Path) -> None:
    """Which the card says, and only then; Spense reads them all the same."""
    granite = tiny_model("granite-moe", tmp_path / "granite")
    for model, experts, quantize in ((qwen, 0, "fp8"), (granite, 4, "fp8"), (granite, 4, "none")):
        out = tmp_path / f"{model.name} {quantize}"
        run(model, out, text, quantize=quantize)
        _, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert len([key for key in found["missing_keys"] if ".experts." in key]) == experts
        assert ("transformers reads experts of this model only where" in (out / "README.md").read_text()) == bool(
            experts
        )
        assert logits(out).isfinite().all()


@pytest.mark.parametrize("name", ["granite-moe", "granite-moe-hybrid"])
def test_dense_experts_of_one_tensor_are_the_originals(name: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(name, tmp_path / "model")
    run(model, tmp_path / "same", text, sparsity=0.0, quantize="none")
    torch.testing.assert_close(logits(tmp_path / "same"), logits(model), rtol=1e-3, atol=1e-3)


def test_experts_of_one_tensor_become_what_single_ones_do(qwen: Path, tmp_path: Path, text: Path) -> None:
    """As Qwen3.5-MoE is published. What is written, transformers reads; and a run that was cut off goes on."""
    whole = stacked(qwen, tmp_path / "whole")
    run(qwen, tmp_path / "single", text)
    run(whole, tmp_path / "out", text)
    cut_off(whole, tmp_path / "again", text, blocks=1)
    run(whole, tmp_path / "again", text, resume=True)
    expected = load_file(tmp_path / "single/model.safetensors")
    for out in (tmp_path / "out", tmp_path / "again"):
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert "transformers reads experts" not in (tmp_path / "out/README.md").read_text()


def test_experts_have_orders_of_their_own_that_change_nothing(qwen: Path, tmp_path: Path, text: Path) -> None:
    run(qwen, tmp_path / "out", text, sparsity=0.25, quantize="none")
    run(qwen, tmp_path / "same", text, sparsity=0.0, quantize="none", selection="random")
    annotation = open_checkpoint(tmp_path / "out").annotation
    permutations = read_permutations(tmp_path / "out", annotation)
    assert permutations is not None
    orders = permutations[LAYER]
    assert orders.shape == (4, INTERMEDIATE)
    assert not torch.equal(orders[0], orders[1])
    before, after = SafetensorsReader(qwen), SafetensorsReader(tmp_path / "out")
    for expert, order in enumerate(orders):
        dense = order[64:]
        for leaf in ("gate_proj", "up_proj"):
            key = f"{LAYER}.{expert}.{leaf}.weight"
            assert torch.equal(after.read(key)[64:], before.read(key)[dense]), key
    torch.testing.assert_close(logits(tmp_path / "same"), logits(qwen), rtol=1e-3, atol=1e-3)


def test_the_annotation_is_short(qwen: Path, tmp_path: Path, text: Path) -> None:
    run(qwen, tmp_path / "out", text)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    spense = config["spense"]
    assert spense["version"] == 2
    assert spense["modules"] == []
    assert spense["experts"]["counts"] == {f"model.layers.{i}.mlp.experts": 4 for i in range(2)}
    assert spense["regions"]["default"] == Regions(SPARSE, 32).to_dict()
    assert config["ignore"] == ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(2))]


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, qwen: Path, tmp_path: Path, text: Path) -> None:
    report = run(qwen, tmp_path / "out", text, method=method)
    verify(tmp_path / "out")
    seen = [tokens for layer in report.layers for tokens in layer.tokens or ()]
    card = (tmp_path / "out/README.md").read_text()
    assert f"Each expert saw {min(seen)} to {max(seen)} tokens" in card
    assert "Blocks with experts are pruned and not tuned." in card


@pytest.mark.parametrize(
    "options",
    [
        {"selection": Selection.SPARSEGPT_SCORE},
        {"selection": Selection.RANDOM, "grouping": "mixed"},
        {"true_sequential": False, "layout": "none"},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], qwen: Path, tmp_path: Path, text: Path) -> None:
    run(qwen, tmp_path / "out", text, **options)
    verify(tmp_path / "out")


def test_experts_that_see_no_token_are_pruned_too(qwen: Path, tmp_path: Path, text: Path) -> None:
    report = run(qwen, tmp_path / "out", text, samples=1, length=2)
    assert any(0 in (layer.tokens or ()) for layer in report.layers)
    verify(tmp_path / "out")


def test_the_router_itself_is_watched(qwen: Path) -> None:
    """What experts are shown is what the model's own experts are called with."""
    source, cpu = SourceModel(str(qwen)), torch.device("cpu")
    stream = Stream(source, torch.randint(0, 256, (3, 16)), cpu, torch.float32, 32)
    block = source.load("model.layers.0", cpu, torch.float32)
    mixture = source.blocks[0].mlp
    assert isinstance(mixture, Mixture)
    # Which tries out where the block can be entered.
    stream.attend_experts(0, block, mixture)
    calls, seen = [], {}
    hook = block.mlp.experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    stream.attend_experts(0, block, mixture, lambda expert, x, shard: seen.setdefault(expert, []).append(x.clone()))
    hook.remove()
    for expert in range(4):
        expected = [x[(index == expert).any(-1)] for x, index, _ in calls]
        assert torch.equal(torch.cat(seen[expert]), torch.cat(expected))
    assert sum(len(x) for parts in seen.values() for x in parts) == 3 * 16 * 2


def test_damage_is_found(qwen: Path, tmp_path: Path, text: Path) -> None:
    run(qwen, tmp_path / "out", text)
    file = tmp_path / "out/model.safetensors"
    whole = load_file(file)
    key = f"{LAYER}.3.down_proj.weight"
    broken = whole[key].clone()
    broken.view(torch.uint8)[5, 8:12] = 0x38
    save_file({**whole, key: broken}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"not 2:4.*row 5, columns 8 to 11.*{LAYER}\.3\.down_proj"):
        verify(tmp_path / "out")
    save_file({name: each for name, each in whole.items() if name != key}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"a tensor of a pruned module is missing.*{LAYER}\.3\.down_proj"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.3}, r"layers\.0\.mlp\.experts: sparsity 0\.3 does not fit intermediate size 128"),
        ({"dense_first": True}, "--dense-first: the experts of all 2 blocks have the same regions"),
    ],
)
def test_regions_that_do_not_fit(options: dict[str, Any], words: str, qwen: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(SpenseError, match=words):
        run(qwen, tmp_path / "out", text, **options)
