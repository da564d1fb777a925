"""Headers of a checkpoint's files against its annotation, before a worker starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_config import HIDDEN, MLP, I, quantization_config

from vllm_spense.errors import FormatError
from vllm_spense.plugin.config import SpenseConfig


@pytest.fixture
def config() -> SpenseConfig:
    return SpenseConfig.from_config(quantization_config())


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (
            "up_proj.weight",
            torch.zeros(I, HIDDEN),
            r"wrong type \(file: .*\.safetensors; layer: .*up_proj\.weight; found: F32",
        ),
        ("up_proj.weight_scale", torch.ones(I, 1), r"layer: .*up_proj\.weight_scale; found: F32; expected: BF16"),
        (
            "up_proj.weight_scale",
            torch.ones(I).bfloat16(),
            r"up_proj\.weight_scale; found: \(96,\); expected: \(96, 1\)",
        ),
        ("down_proj.weight_scale", None, r"missing \(file: .*; layer: .*down_proj\.weight_scale; key: modules"),
    ],
)
def test_files_against_the_annotation(
    config: SpenseConfig, tmp_path: Path, name: str, tensor: torch.Tensor | None, said: str
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer, shape in {"gate_proj": (I, HIDDEN), "up_proj": (I, HIDDEN), "down_proj": (HIDDEN, I)}.items():
        tensors[f"{MLP}.{layer}.weight"] = torch.zeros(shape).to(torch.float8_e4m3fn)
        tensors[f"{MLP}.{layer}.weight_scale"] = torch.ones(shape[0], 1, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    config.maybe_update_config(str(tmp_path))

    del tensors[f"{MLP}.{name}"]
    save_file(tensors | ({} if tensor is None else {f"{MLP}.{name}": tensor}), tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=said):
        config.maybe_update_config(str(tmp_path))
