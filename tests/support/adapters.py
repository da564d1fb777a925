"""Random LoRA adapters as PEFT writes them, and what they do to the weights of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

PREFIX = "base_model.model."


def write_adapter(
    out: Path, model: nn.Module, leaves: Iterable[str], rank: int = 8, dora: bool = False, bias: bool = False,
    seed: int = 0, **settings: Any,
) -> Path:  # fmt: skip
    """A LoRA on every layer of a model with one of these last names.

    Args:
        dora: with magnitude vectors.
        bias: with a bias of B.
        settings: more of adapter_config.json.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or name.rpartition(".")[2] not in set(leaves):
            continue
        shapes = {"lora_A.weight": (rank, layer.in_features), "lora_B.weight": (layer.out_features, rank)}
        shapes |= {"lora_B.bias": (layer.out_features,)} if bias else {}
        shapes |= {"lora_magnitude_vector": (layer.out_features,)} if dora else {}
        for part, shape in shapes.items():
            drawn = torch.randn(shape, generator=random)
            # As large as the layer's own outputs, so that a wrong order shows.
            scale = layer.in_features**-0.5 if part == "lora_A.weight" else 0.3
            tensors[f"{PREFIX}{name}.{part}"] = (drawn.abs() if dora and part[5] == "m" else drawn * scale).contiguous()
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(leaves), "bias": "none"}
    config |= {"use_dora": dora, "lora_bias": bias, "base_model_name_or_path": None, **settings}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def parts_of(adapter: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Layer → what the adapter has for it: `lora_A.weight`, …"""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_")
        layers.setdefault(layer, {})[f"lora_{part}"] = tensor
    return layers


def scaling(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def merge(model: nn.Module, adapter: Path) -> None:
    """W ← W + s·B·A; with DoRA's magnitudes m, every row of that at length m."""
    s = scaling(adapter)
    for name, parts in parts_of(adapter).items():
        layer = model.get_submodule(name)
        weight = layer.weight + s * (parts["lora_B.weight"] @ parts["lora_A.weight"]).to(layer.weight)
        if (magnitudes := parts.get("lora_magnitude_vector")) is not None:
            weight = weight / weight.norm(dim=1, keepdim=True) * magnitudes[:, None].to(weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if (bias := parts.get("lora_B.bias")) is not None:
            bias = s * bias.to(weight)
            layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias, requires_grad=False)
