"""Configurations of published models, dense and Spense."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks import make_shape as module
from benchmarks.make_shape import make_shape
from benchmarks.multimodal_shapes import MULTIMODAL_SHAPES
from offline_prune.checkpoint.writer import fp8_config
from vllm_spense.conformance import read_quantization
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, Annotation
from vllm_spense.shapes import MIXTURES, SHAPES

#: Billions of parameters, as published.
PARAMETERS = {"qwen3-32b": 32.8, "qwen3-14b": 14.8, "seed-oss-36b": 36.2, "llama-3.1-8b": 8.03, "llama-3.3-70b": 70.6}


def parameters(shape: str) -> float:
    config = SHAPES[shape]
    hidden, heads = config["hidden_size"], config["num_attention_heads"] + config["num_key_value_heads"]
    attention = 2 * hidden * heads * config["head_dim"]
    mlp = 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * (attention + mlp) + 2 * config["vocab_size"] * hidden


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_have_as_many_parameters_as_published(shape: str) -> None:
    assert parameters(shape) / 1e9 == pytest.approx(PARAMETERS[shape], rel=0.005)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.25, 0.375, 0.5])
def test_a_spense_shape_is_a_checkpoint_without_weights(shape: str, sparsity: float, tmp_path: Path) -> None:
    config = json.loads((make_shape(shape, tmp_path, sparsity) / "config.json").read_text())
    annotation = Annotation.from_dict(config["quantization_config"].pop(KEY))
    assert annotation.default.intermediate == config["intermediate_size"]
    # As near as the alignment lets it: 8960 is 35 times 256.
    half = annotation.alignment / 2 / annotation.default.intermediate
    assert annotation.default.mlp_sparsity == pytest.approx(sparsity, abs=half / 2)
    assert len(annotation.modules) == config["num_hidden_layers"]
    assert config["quantization_config"] == fp8_config(["lm_head"])


@pytest.mark.parametrize(("shape", "billions", "active"), [("qwen3-30b-a3b", 30.5, 3.3), ("glm-4.5-air", 106, 12)])
def test_mixtures_have_as_many_parameters_as_published(shape: str, billions: float, active: float) -> None:
    """All, and those that a token meets."""
    config = {**MIXTURES[shape]}
    hidden, top_k = config["hidden_size"], config["num_experts_per_tok"]
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    attention = config["num_hidden_layers"] * 2 * hidden * heads * config["head_dim"]
    sizes = module.mlp_sizes(config, "model.layers")
    experts = module.expert_counts(config, "model.layers")
    every, met = (
        sum(3 * hidden * size * (count(name) if name in experts else 1) for name, size in sizes.items())
        for count in (experts.__getitem__, lambda _: top_k)
    )
    outside = attention + 2 * config["vocab_size"] * hidden
    # GLM's published figures leave out a layer that predicts tokens further on.
    assert (outside + every) / 1e9 == pytest.approx(billions, rel=0.02)
    assert (outside + met) / 1e9 == pytest.approx(active, rel=0.15)


@pytest.mark.parametrize("shape", MIXTURES)
@pytest.mark.parametrize("sparsity", [0.25, 0.375, 0.5])
def test_a_mixture_has_regions_for_experts_shared_ones_and_dense_layers(
    shape: str, sparsity: float, tmp_path: Path
) -> None:
    folder = make_shape(shape, tmp_path, sparsity, layers=3)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 3
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    annotation = read_quantization(quantization)
    config = MIXTURES[shape]
    first = config.get("first_k_dense_replace", 0)
    holders = [f"model.layers.{i}.mlp" for i in range(first, 3)]
    assert annotation.experts == {f"{name}.experts": 128 for name in holders}
    shared = [f"{name}.shared_experts" for name in holders] if "n_shared_experts" in config else []
    assert annotation.modules == (*(f"model.layers.{i}.mlp" for i in range(first)), *shared)
    for name in (*annotation.modules, *annotation.experts):
        regions = annotation.regions(name)
        size = config["intermediate_size" if name == "model.layers.0.mlp" else "moe_intermediate_size"]
        assert regions.intermediate == size
        assert regions.mlp_sparsity == pytest.approx(sparsity, abs=0.005)
    assert quantization["ignore"] == ["lm_head", *(f"{name}.gate" for name in holders)]


def test_dense_is_the_same_without_regions(tmp_path: Path) -> None:
    configs = [
        json.loads((make_shape("qwen3-14b", tmp_path / str(sparsity), sparsity, 3) / "config.json").read_text())
        for sparsity in (None, 0.25)
    ]
    assert configs[1]["quantization_config"].pop(KEY)["modules"] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_them(shape: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(make_shape(shape, tmp_path, None))
    assert config.intermediate_size == SHAPES[shape]["intermediate_size"]
    assert config.rope_parameters["rope_theta"] == SHAPES[shape]["rope_theta"]
    assert config.head_dim == SHAPES[shape]["head_dim"]


@pytest.mark.parametrize(
    ("option", "found", "said"),
    [
        ("--layers", "0", "--layers: found 0, expected at least 1"),
        ("--layers", "-2", "--layers: found -2, expected at least 1"),
        ("--sparsity", "1.5", "--sparsity: found 1.5, expected 0 to 0.5"),
        ("--sparsity", "nan", "--sparsity: found nan, expected 0 to 0.5"),
    ],
)
def test_numbers_that_no_shape_has_are_refused(
    option: str,
    found: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_shape.py", "tiny", str(tmp_path / "out"), option, found])
    with pytest.raises(SystemExit):
        module.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sparsity_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(module.ALL_SHAPES, "tiny", {**SHAPES["tiny"], "intermediate_size": 64})
    with pytest.raises(SpenseError, match=r"sparsity 0\.2 does not fit intermediate size 64 with alignment 32"):
        make_shape("tiny", tmp_path / "out", 0.2)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["make_shape.py", "tiny", str(tmp_path / "out"), "--sparsity", "much"])
    with pytest.raises(SystemExit):
        module.main()
    assert "could not convert string to float: 'much'" in capsys.readouterr().err


@pytest.mark.parametrize("shape", MULTIMODAL_SHAPES)
def test_of_several_parts_the_language_model_has_the_regions(shape: str, tmp_path: Path) -> None:
    folder = make_shape(shape, tmp_path, 0.375, layers=4)
    text = AutoConfig.from_pretrained(folder).get_text_config()
    published = MULTIMODAL_SHAPES[shape]["text_config"]
    assert (text.hidden_size, text.intermediate_size) == (published["hidden_size"], published["intermediate_size"])
    assert text.num_hidden_layers == 4
    config = json.loads((folder / "config.json").read_text())
    assert any(
        re.match(entry.removeprefix("re:"), "model.visual.blocks.0.attn.qkv")
        for entry in config["quantization_config"]["ignore"]
    )
    annotation = read_quantization(config["quantization_config"])
    assert annotation.modules == tuple(f"model.language_model.layers.{i}.mlp" for i in range(4))
    assert annotation.default.intermediate == published["intermediate_size"]
    assert published["num_hidden_layers"] == 64
