"""FP8 of layers that are only rounded, and of tuned ones: whose inputs count, and what compensation is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import logits, run
from tiny_models import FAMILIES, HIDDEN, tiny_model

from offline_prune.calibration.hidden_states import Stream
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.methods.fp8 import round_to_fp8
from offline_prune.methods.unpruned_fp8 import InputHessians, compensated, nearest
from offline_prune.model.loading import SourceModel
from offline_prune.model.safetensors_reader import SafetensorsReader

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
CPU = torch.device("cpu")


def test_hessians_are_of_what_each_layer_sees(llama: Path) -> None:
    model, tokens = SourceModel(str(llama)), torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))
    stream, hessians = Stream(model, tokens, CPU, torch.float32, batch_tokens=48), InputHessians(CPU)
    block = model.blocks[0]
    module = model.load(block.name, CPU, torch.float32)
    stream.advance(0, module, block.name, hessians.observers(ATTENTION))
    with torch.inference_mode():
        found = dict(hessians.groups())
    assert list(found) == [tuple(ATTENTION[:3]), (ATTENTION[3],)]

    inputs: dict[str, torch.Tensor] = {}
    whole, _ = load_dense(llama)
    for name in ATTENTION:
        layer = whole.get_submodule(f"{block.name}.{name}")
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.inference_mode():
        whole(input_ids=tokens)
    for group, hessian in found.items():
        for name in group:
            assert torch.allclose(hessian, inputs[name].T @ inputs[name], rtol=2e-2, atol=1e-2 * hessian.max().item())


def test_compensation_lowers_the_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(800, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight, hessian = torch.randn(64, 96, generator=generator), inputs.T @ inputs
    errors = []
    for rounded, scales in (nearest(weight), compensated(weight, hessian, 0.01, "layer")):
        assert torch.equal(round_to_fp8(rounded, scales), rounded)
        errors.append(((rounded - weight) @ inputs.T).square().sum())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_rounded_everywhere(name: str, tmp_path: Path, text: Path) -> None:
    model, found = tiny_model(name, tmp_path / "model"), []
    for rounding in ("after", "everywhere"):
        run(model, tmp_path / rounding, text, sparsity=0.0, rounding=rounding, samples=64)
        verify(tmp_path / rounding)
        found.append((logits(tmp_path / rounding) - logits(model)).square().mean())
    assert found[1] < 0.9 * found[0]
    before, after = (SafetensorsReader(tmp_path / rounding) for rounding in ("after", "everywhere"))
    attention = [key for key in before if "self_attn" in key and key.endswith("proj.weight")]
    assert len(attention) >= 4
    assert not any(torch.equal(before.read(key).float(), after.read(key).float()) for key in attention)
    assert all(before.read(key).shape[1] in (HIDDEN, 4 * 16) for key in attention)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"method": "spensegpt++"}, "everywhere"),
        ({"method": "spensegpt++", "rounding": "inside"}, "inside"),
        ({"method": "spensegpt++", "quantize": "none"}, None),
        ({"method": "spensegpt+"}, "inside"),
        ({"method": "spensegpt+", "rounding": "everywhere"}, "everywhere"),
        ({"method": "spensegpt+", "rounding": "everywhere", "tune_steps": 3, "layout": "none"}, "everywhere"),
        ({"method": "wanda"}, "after"),
        ({"method": "wanda", "rounding": "everywhere", "tune_steps": 3}, "everywhere"),
    ],
    ids=str,
)
def test_which_rounding_is_recorded(
    options: dict[str, Any], recorded: str | None, llama: Path, tmp_path: Path, text: Path
) -> None:
    run(llama, tmp_path / "out", text, **options)
    verify(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").annotation.settings.get("fp8_rounding") == recorded


def test_tuned_weights_are_rounded_last(llama: Path, tmp_path: Path, text: Path) -> None:
    """What tuning wins without rounding, the column loop nearly keeps."""
    found = {}
    for rounding in ("after", "everywhere"):
        report = run(llama, tmp_path / rounding, text, method="spensegpt++", rounding=rounding, samples=64)
        assert report.layers[0].tuning
        found[rounding] = report.layers[0].tuning
    assert found["everywhere"].before < found["after"].before
    assert found["everywhere"].after < found["after"].after
