"""The whole pruner on tiny random models: every architecture, every method and option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from safetensors.torch import load_file
from tiny_models import FAMILIES, HIDDEN, INTERMEDIATE, LAYERS, tiny_model
from transformers import AutoModelForCausalLM

from offline_prune.calibration.hidden_states import Stream
from offline_prune.checkpoint.dense_model import load_dense, perplexity
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.methods.recipe import METHODS, Selection
from offline_prune.model.loading import SourceModel
from offline_prune.model.safetensors_reader import SafetensorsReader
from offline_prune.pipeline import prune
from offline_prune.runtime.matmul_precision import fast_matmul
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions

SPARSE = 96


def stacked(files: SafetensorsReader, layer: int) -> dict[str, torch.Tensor]:
    """gate, up and down of a layer, whether fused on disk or not."""
    mlp = f"model.layers.{layer}.mlp"
    down = files.read(f"{mlp}.down_proj.weight").float()
    if f"{mlp}.gate_up_proj.weight" in files:
        gate, up = files.read(f"{mlp}.gate_up_proj.weight").float().chunk(2)
    else:
        gate, up = (files.read(f"{mlp}.{name}_proj.weight").float() for name in ("gate", "up"))
    return {"gate": gate, "up": up, "down": down.T}


class Shown:
    """An observer that keeps what it is shown."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    def __call__(self, inputs: torch.Tensor, part: int) -> None:
        self.inputs.append(inputs)


@pytest.mark.parametrize(
    ("family", "sizes", "columns"), [("llama", {}, 128), ("qwen3-moe", {"moe_intermediate_size": 32}, 64)]
)
def test_a_text_of_fewer_tokens_than_columns_is_warned_of(
    family: str, sizes: dict[str, Any], columns: int, tmp_path: Path, text: Path
) -> None:
    """The columns are down's, or, where experts are narrow, those of gate and up."""
    model = tiny_model(family, tmp_path / "model", **sizes)
    source = SourceModel(str(model))
    mlps = [*(mlp for block in source.blocks for mlp in block.mlps), *source.experts.values()]
    assert max(max(mlp.hidden, mlp.intermediate) for mlp in mlps) == columns
    given = {"calibration": str(text), "samples": 2, "sparsity": 0.5, "device": "cpu"}

    def warned(length: int, method: str = "spensegpt+") -> list[str]:
        said: list[str] = []
        prune(
            PruneSettings(str(model), tmp_path / "out", method, length=length, overwrite=True, **given), say=said.append
        )
        return [line for line in said if line.startswith("calibration text:")]

    assert not warned(columns // 2)
    assert not warned(columns // 2 - 1, "wanda")
    (line,) = warned(columns // 2 - 1)
    assert line.startswith(
        f"calibration text: found {columns - 2} tokens (2 × {columns // 2 - 1}), expected at least {columns}, "
    )


def test_sequences_are_no_longer_than_the_context(tmp_path: Path, text: Path) -> None:
    """And the checkpoint is that of a run that asked for what was taken."""
    model = tiny_model("llama", tmp_path / "model", max_position_embeddings=24)
    said: list[str] = []
    given = {"method": "spensegpt+", "calibration": str(text), "samples": 8, "length": 64, "device": "cpu"}
    settings = PruneSettings(str(model), tmp_path / "long", **given)
    report = prune(settings, say=said.append)
    assert "calibration text: 24 × 21 tokens instead of 8 × 64, because the model's context is 24" in said
    assert (report.settings["samples"], report.settings["length"]) == (24, 21)
    calibration = open_checkpoint(tmp_path / "long").annotation.calibration
    assert calibration is not None
    assert (calibration.samples, calibration.length) == (24, 21)
    run(model, tmp_path / "short", text, samples=24, length=21)
    files = [SafetensorsReader(tmp_path / name) for name in ("long", "short")]
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(files[0].read(name), files[1].read(name)) for name in files[0])


def test_given_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", max_position_embeddings=24)
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    report = prune(PruneSettings(str(model), tmp_path / "out", device="cpu"), tokens=tokens)
    assert (report.settings["samples"], report.settings["length"]) == (4, 64)
    calibration = open_checkpoint(tmp_path / "out").annotation.calibration
    assert calibration is not None
    assert (calibration.source, calibration.samples, calibration.length) == ("given tokens", 4, 64)
    for wrong, found in (
        (tokens[0], r"torch.int64 \(64,\)"),
        (tokens.float(), r"torch.float32 \(4, 64\)"),
        (tokens > 9, r"torch.bool \(4, 64\)"),
    ):
        with pytest.raises(SpenseError, match=f"tokens: found {found}, expected int64"):
            prune(PruneSettings(str(model), tmp_path / "wrong", device="cpu"), tokens=wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_streams_like_the_whole_model(name: str, tmp_path: Path) -> None:
    model = SourceModel(str(tiny_model(name, tmp_path / "model")))
    tokens = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    stream = Stream(model, tokens, torch.device("cpu"), torch.float32, batch_tokens=80)
    for index, block in enumerate(model.blocks):
        module = model.load(block.name, torch.device("cpu"), torch.float32)
        seen, first, again = Shown(), Shown(), Shown()
        attended = stream.attend(index, module, block.mlp, seen, first)
        assert torch.cat(seen.inputs).shape == (120, HIDDEN)
        stream.observe(attended, again)
        assert torch.cat(first.inputs).shape == (120, INTERMEDIATE)
        assert all(torch.equal(*pair) for pair in zip(first.inputs, again.inputs, strict=True))
        stream.advance(index, module, block.name)
        model.unload(block.name)
    whole, _ = load_dense(tmp_path / "model")
    # As exact as a stream is, which lets FP32 products run on BF16 units where a CPU has them.
    with torch.inference_mode(), fast_matmul():
        expected = whole.model(input_ids=tokens, use_cache=False).last_hidden_state
        found = whole.model.norm(stream.hidden)
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("grouping", ["original", "mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_pruned_consistently(name: str, grouping: Any, tmp_path: Path, text: Path) -> None:
    """Magnitude pruning changes no kept weight, so each new index shows which old one it was, in all projections."""
    model = tiny_model(name, tmp_path / "model")
    how = {"method": "magnitude", "selection": "random", "grouping": grouping, "quantize": "none"}
    run(model, tmp_path / "out", text, sparsity=0.375, **how)
    verify(tmp_path / "out")
    before, after = SafetensorsReader(model), SafetensorsReader(tmp_path / "out")
    for layer in range(LAYERS):
        old, new = stacked(before, layer), stacked(after, layer)
        found = (new["gate"] @ old["gate"].T).argmax(1)
        assert sorted(found.tolist()) == list(range(INTERMEDIATE))
        assert not torch.equal(found, torch.arange(INTERMEDIATE))
        assert torch.equal(found[:SPARSE], found[:SPARSE].sort().values) == (grouping == "original")
        for projection in ("gate", "up", "down"):
            kept = new[projection] != 0
            assert torch.equal(new[projection][kept], old[projection][found][kept])
            assert kept[SPARSE:].all()
    for key in ("gate_proj", "up_proj"):
        bias = f"model.layers.0.mlp.{key}.bias"
        if bias in before:
            order = (stacked(after, 0)["gate"] @ stacked(before, 0)["gate"].T).argmax(1)
            assert torch.equal(after.read(bias), before.read(bias)[order])


@pytest.mark.parametrize("name", ["llama with biases", "gemma3", "phi3"])
def test_transformers_opens_the_same_files(name: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(name, tmp_path / "model")
    run(model, tmp_path / "out", text)
    ours, _ = load_dense(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits
    weights = dict(theirs.named_parameters())  # compressed-tensors dequantizes them at the first forward pass
    for key, weight in ours.named_parameters():
        assert torch.equal(weights[key], weight), key
    # transformers rounds the activations to FP8 too, which ours does not.
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min().item() > 0.95


def test_blocks_of_experts_are_left_as_they_are_by_request(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama4 with a plain layer", tmp_path / "model")
    report = run(model, tmp_path / "out", text, skip_unsupported=True)
    assert list(report.skipped) == ["model.layers.0"]
    annotation = open_checkpoint(tmp_path / "out").annotation
    assert annotation.modules == ("model.layers.1.feed_forward",)
    verify(tmp_path / "out")
    before, after = SafetensorsReader(model), SafetensorsReader(tmp_path / "out")
    for name in before:
        if ".layers.0." in name:
            assert torch.equal(after.read(name), before.read(name)), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    shared = "model.layers.0.feed_forward.shared_expert.down_proj.weight"
    assert torch.equal(theirs.get_parameter(shared), before.read(shared).float())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.375, 0.5])
def test_methods_and_sparsities(method: str, sparsity: float, llama: Path, tmp_path: Path, text: Path) -> None:
    report = run(llama, tmp_path / "out", text, method=method, sparsity=sparsity)
    assert report.mlp_sparsity == sparsity
    verified = verify(tmp_path / "out")
    assert verified.mlps == LAYERS
    annotation = open_checkpoint(tmp_path / "out").annotation
    assert annotation.method == method
    assert annotation.default == Regions(round(2 * sparsity * INTERMEDIATE), round((1 - 2 * sparsity) * INTERMEDIATE))
    for layer in report.layers:
        for part in (layer.gate, layer.up, layer.down):
            assert part.zeros == pytest.approx(sparsity, abs=0.01)
            assert (part.loss > 0.002) == (sparsity > 0)
            assert part.loss < 0.6
            assert (part.damping is not None) == (METHODS[method].solver == "sparsegpt")


@pytest.mark.parametrize("selection", Selection)
@pytest.mark.parametrize("layout", ["back", "front", "none"])
def test_ablations(selection: Any, layout: Any, llama: Path, tmp_path: Path, text: Path) -> None:
    run(llama, tmp_path / "out", text, selection=selection, layout=layout)
    verify(tmp_path / "out")
    settings = open_checkpoint(tmp_path / "out").annotation.settings
    assert (settings["selection"], settings["layout"]) == (selection, layout)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": "none"},
        {"quantize": "fp8"},
        {"quantize": "fp8", "rounding": "after"},
        {"layout": "none"},
        {"method": "wanda", "sparsity": 0.375},
    ],
    ids=str,
)
def test_descent_makes_every_projection_lose_less(
    options: dict[str, Any], llama: Path, tmp_path: Path, text: Path
) -> None:
    layers = []
    for passes in (0, 2):
        report = run(llama, tmp_path / str(passes), text, samples=32, descent_passes=passes, **options)
        verify(tmp_path / str(passes))
        assert open_checkpoint(tmp_path / str(passes)).annotation.settings.get("descent_passes", 0) == passes
        layers.append(report.layers[0])
    without, with_descent = layers
    assert with_descent.dense_indices == without.dense_indices
    for name in ("gate", "up", "down"):
        assert getattr(with_descent, name).loss < 0.97 * getattr(without, name).loss, name


def test_back_loses_less_than_front(llama: Path, tmp_path: Path, text: Path) -> None:
    losses = {}
    for layout in ("back", "front"):
        report = run(llama, tmp_path / layout, text, sparsity=0.25, layout=layout, samples=32)
        losses[layout] = report.layers[0].down.loss
    assert losses["back"] < losses["front"]


def test_true_sequential_is_an_option_that_matters(llama: Path, tmp_path: Path, text: Path) -> None:
    on = run(llama, tmp_path / "on", text).layers[0]
    off = run(llama, tmp_path / "off", text, true_sequential=False).layers[0]
    assert on.gate == off.gate
    assert on.down.loss != off.down.loss
    verify(tmp_path / "off")


def test_the_same_settings_give_the_same_files(llama: Path, tmp_path: Path, text: Path) -> None:
    for out in ("one", "two"):
        run(llama, tmp_path / out, text)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_what_lies_in_the_folder(llama: Path, tmp_path: Path, text: Path) -> None:
    run(llama, tmp_path / "out", text)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {"report.json", "report.png"} <= names
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )
    assert "sparsity_config" not in config
    tensors = load_file(tmp_path / "out/model.safetensors")
    attention = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{attention}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{attention}.weight_scale"].shape == (64, 1)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["layers"]) == LAYERS
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")


def test_large_checkpoints_are_sharded(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline_prune.checkpoint.writer.MAX_SHARD_BYTES", 40_000)
    run(llama, tmp_path / "many", text)
    monkeypatch.undo()
    run(llama, tmp_path / "one", text)
    verify(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 1
    many, one = SafetensorsReader(tmp_path / "many"), SafetensorsReader(tmp_path / "one")
    assert sorted(many) == sorted(one)
    assert all(torch.equal(many.read(n).float(), one.read(n).float()) for n in one)


def test_perplexity_is_that_of_transformers(llama: Path) -> None:
    model, _ = load_dense(llama)
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in tokens]).mean().exp()
    assert perplexity(model, tokens) == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("method", ["spensegpt++", "spensegpt+"])
def test_the_first_mlp_stays_dense_at_the_same_sparsity(method: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=12, hidden_size=16, head_dim=4)
    report = run(
        model, tmp_path / "out", text, method=method, dense_first=True, sparsity=0.25, alignment=32, tune_steps=1
    )
    verify(tmp_path / "out")
    annotation = open_checkpoint(tmp_path / "out").annotation
    sparse = [annotation.regions(name).sparse for name in annotation.modules]
    assert (sparse[0], sum(sparse)) == (0, 12 * INTERMEDIATE // 2)
    assert sorted(set(sparse[1:])) == [64, 96]
    # Two units more among eleven blocks, in the middle of each half.
    assert [i for i, width in enumerate(sparse) if width == 96] == [3, 9]
    assert report.mlp_sparsity == 0.25


def test_few_mlps_share_their_sparsity_with_the_first(tmp_path: Path, llama: Path, text: Path) -> None:
    run(llama, tmp_path / "out", text, method="spensegpt++", tune_steps=1)
    assert not open_checkpoint(tmp_path / "out").annotation.overrides
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=12, hidden_size=16, head_dim=4)
    with pytest.raises(SpenseError, match="--dense-first: the other 11 MLPs cannot take over"):
        run(model, tmp_path / "half", text, method="sparsegpt", dense_first=True)
    with pytest.raises(SpenseError, match="--dense-first: the other 1 MLPs cannot take over"):
        run(llama, tmp_path / "few", text, dense_first=True)
