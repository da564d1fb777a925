"""Who serves a checkpoint, without an engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.models.registry import ModelRegistry

from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.plugin.experts import RegionExpertsMethod
from vllm_spense.plugin.linear import InputSplitLinearMethod, OutputSplitLinearMethod, RegionLinearMethod
from vllm_spense.plugin.serving_check import Serving, find_class, prove_serving, registry, require_served

MLP = "language_model.model.layers.0.mlp"
GATE, UP, GATE_UP, DOWN, ATTENTION = "gate_proj", "up_proj", "gate_up_proj", "down_proj", "qkv_proj"


def model(*layers: str, mlp: str = MLP) -> nn.Module:
    """Modules whose methods are Spense's, but for attention's."""
    built = nn.Module()
    for name in layers:
        module: Any = nn.Module()
        kind: type[RegionLinearMethod] = InputSplitLinearMethod if name == DOWN else OutputSplitLinearMethod
        if name != ATTENTION:
            module.quant_method = kind.__new__(kind)
            module.quant_method.name = f"{mlp}.{name}"
            module.quant_method.projections = 2 if name == GATE_UP else 1
        built.add_module(name, module)
    return built


def config(*mlps: str, pruned: int = 1, experts: tuple[str, ...] = ()) -> Any:
    layers = {f"{mlp}.{name}": None for mlp in mlps for name in (GATE, UP, DOWN)}
    named = dict.fromkeys(experts)
    return SimpleNamespace(
        layers=layers, experts=named, annotation=SimpleNamespace(modules=[str(i) for i in range(pruned)])
    )


def test_every_pruned_layer_is_counted() -> None:
    assert require_served(model(ATTENTION, GATE_UP, DOWN), config(MLP)) == 2
    assert require_served(model(GATE, UP, DOWN), config(MLP)) == 3


@pytest.mark.parametrize(
    ("built", "found"),
    [
        (model(ATTENTION), "none of its layers"),
        (model(ATTENTION, GATE_UP), GATE_UP),
        (model(DOWN), DOWN),
        (model(GATE, DOWN), f"{GATE}, {DOWN}"),
        (model(GATE_UP, DOWN, mlp="model.layers.0.mlp"), "none of its layers"),
    ],
    ids=["dense", "down dense", "gate and up dense", "up dense", "under another name"],
)
def test_a_pruned_layer_that_spense_does_not_run(built: nn.Module, found: str) -> None:
    said = rf"does not give this pruned MLP to Spense \(layer: {MLP}; found: {found}; expected: gate, up and down\)"
    with pytest.raises(FormatError, match=said):
        require_served(built, config(MLP))


def test_a_pruned_mlp_that_vllm_drops() -> None:
    with pytest.raises(FormatError, match="leaves pruned MLPs out"):
        require_served(model(GATE_UP, DOWN), config(MLP, pruned=2))


def test_pruned_experts_that_spense_does_not_run() -> None:
    built: Any = model(GATE_UP, DOWN)
    name = "language_model.model.layers.1.mlp.experts"
    with pytest.raises(FormatError, match=rf"does not give these pruned experts to Spense \(layer: {name}"):
        require_served(built, config(MLP, experts=(name,)))
    experts: Any = nn.Module()
    experts.quant_method, experts.layer_name = RegionExpertsMethod.__new__(RegionExpertsMethod), name
    built.add_module("experts", experts)
    assert require_served(built, config(MLP, experts=(name,))) == 3


def test_registry_is_vllms() -> None:
    theirs: Any = ModelRegistry.models
    assert registry() == {name: getattr(each, "class_name", None) for name, each in theirs.items()}


def test_an_architecture_without_a_class_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OwnForCausalLM"]}))
    assert find_class(tmp_path) == Serving("OwnForCausalLM", None)


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_class(tmp_path) is None
    with pytest.raises(SpenseError, match="vLLM is not installed here"):
        prove_serving(tmp_path)
