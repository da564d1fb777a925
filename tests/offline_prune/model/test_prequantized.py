"""Checkpoints in FP8 are read with their scales, whoever wrote them; what is not understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import logits, run
from safetensors.torch import load_file, save_file

from offline_prune.checkpoint.verify import verify
from offline_prune.model.loading import SourceModel
from vllm_spense.errors import SpenseError

Tensors = dict[str, torch.Tensor]
E4M3 = torch.finfo(torch.float8_e4m3fn).max


def spread(scale: torch.Tensor, shape: torch.Size, block: int) -> torch.Tensor:
    """A scale of any kind, one value for each weight."""
    if scale.ndim < 2 or scale.numel() == 1:
        return scale.reshape(-1, 1).expand(shape)
    if scale.shape == (shape[0], 1):
        return scale.expand(shape)
    return scale.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]


def per_tensor(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max() / E4M3


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(1, keepdim=True) / E4M3


def per_block(weight: torch.Tensor, block: int = 48) -> torch.Tensor:
    """Blocks of 48 leave a rest at every edge."""
    rows, columns = (-(-size // block) for size in weight.shape)
    padded = torch.zeros(rows * block, columns * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    return padded.view(rows, block, columns, block).amax((1, 3)) / E4M3


def quantized(
    model: Path, folder: Path, scales: Callable[[torch.Tensor], torch.Tensor], suffix: str, config: dict[str, Any]
) -> tuple[Path, Tensors]:
    """A copy of a model with FP8 weights in its blocks, and what these weights are worth."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors, worth = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            scale = scales(weight.float())
            each = spread(scale, weight.shape, 48)
            tensors[name] = (weight.float() / each).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + suffix] = scale
            worth[name] = (tensors[name].float() * each).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**whole, **config}))
    return folder, worth


KINDS = {
    "deepseek": (
        per_block,
        "weight_scale_inv",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 48], "fmt": "e4m3"}},
    ),
    "modelopt": (
        per_tensor,
        "weight_scale",
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    ),
    "no config": (per_channel, "weight_scale", {}),
    "compressed-tensors": (
        per_channel,
        "weight_scale",
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_weights_are_multiplied_by_their_scales(kind: str, llama: Path, tmp_path: Path, text: Path) -> None:
    scales, suffix, config = KINDS[kind]
    source, worth = quantized(llama, tmp_path / "source", scales, suffix, config)
    if kind == "modelopt":
        (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    tensors = SourceModel(str(source)).tensors
    assert not [name for name in tensors if "scale" in name]
    assert worth
    for name, weight in worth.items():
        assert torch.equal(tensors.read(name), weight), name
    run(source, tmp_path / "same", text, sparsity=0.0, quantize="none")
    written = json.loads((tmp_path / "same/config.json").read_text())
    assert "quantization_config" not in written
    assert not (tmp_path / "same/hf_quant_config.json").exists()
    plain = load_file(llama / "model.safetensors")
    (tmp_path / "dense").mkdir()
    for path in llama.iterdir():
        (tmp_path / "dense" / path.name).write_bytes(path.read_bytes())
    save_file({**plain, **worth}, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
    expected = logits(tmp_path / "dense")
    assert torch.allclose(logits(tmp_path / "same"), expected, atol=1e-2 * expected.abs().max().item())
    run(source, tmp_path / "out", text)
    verify(tmp_path / "out")


def test_scales_of_activations_are_not_needed(llama: Path, tmp_path: Path) -> None:
    source, worth = quantized(llama, tmp_path / "source", per_tensor, "weight_scale", {})
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"{name.removesuffix('weight')}input_scale": torch.ones(1) for name in worth}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert not [name for name in SourceModel(str(source)).tensors if "scale" in name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"), r"up_proj\.weight is FP8 and has no scale"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight_scale": torch.ones(3, 5)}),
            r"the scale of model\.layers\.1\.mlp\.up_proj\.weight has shape \(3, 5\); expected",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.qzeros": torch.ones(3, dtype=torch.int32)}),
            r"found the tensor model\.layers\.0\.mlp\.up_proj\.qzeros",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_2": torch.ones(1)}),
            r"found the tensor model\.layers\.0\.mlp\.up_proj\.weight_scale_2",
        ),
        (
            lambda t: t.update({"model.norm.weight_scale": torch.ones(1)}),
            r"found the tensor model\.norm\.weight_scale",
        ),
    ],
)
def test_what_is_not_understood_is_named(change: Any, words: str, llama: Path, tmp_path: Path) -> None:
    source, _ = quantized(llama, tmp_path / "source", per_channel, "weight_scale", {})
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpenseError, match=words):
        SourceModel(str(source))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ],
    ids=str,
)
def test_other_quantization_is_refused(config: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    source, _ = quantized(llama, tmp_path / "source", per_channel, "weight_scale", {"quantization_config": config})
    with pytest.raises(SpenseError, match=f"already quantized .*{config['quant_method']}"):
        SourceModel(str(source))


def test_no_quantization_may_be_said(llama: Path, tmp_path: Path, text: Path) -> None:
    source, _ = quantized(llama, tmp_path / "source", per_channel, "weight_scale", {"quantization_config": None})
    run(source, tmp_path / "out", text)
    verify(tmp_path / "out")
