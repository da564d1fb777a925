"""What modules that vLLM builds look for, and are found in.

Further the configuration of a checkpoint with one pruned MLP, and the ranks that vLLM's layers want.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

from vllm_spense.format import KEY, Annotation, Projections, Regions
from vllm_spense.plugin.config import SpenseConfig
from vllm_spense.plugin.pairing import Pairing

HIDDEN, REGIONS = 64, Regions(64, 32)
I = REGIONS.intermediate  # noqa: E741
MLP = "model.layers.0.mlp"


@dataclass
class QuantConfig:
    """As much of `SpenseConfig` as a module that vLLM builds looks for."""

    pairing: Pairing


def quantization_config(**changes: Any) -> dict[str, Any]:
    """Of a checkpoint whose `MLP` is pruned."""
    fp8 = {"num_bits": 8, "type": "float"}
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**fp8, strategy="channel"),
        input_activations=QuantizationArgs(**fp8, strategy="token", dynamic=True),
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="float-quantized", ignore=["lm_head"])
    annotation = Annotation(
        method="magnitude",
        settings={},
        calibration=None,
        alignment=32,
        projections=Projections("gate_proj", "up_proj", "down_proj"),
        modules=(MLP,),
        default=REGIONS,
    )
    return config.to_dict() | {"quantization_status": "compressed", KEY: annotation.to_dict() | changes}


def spense_config() -> SpenseConfig:
    """Of that checkpoint, for a model that merges gate and up."""
    made = SpenseConfig.from_config(quantization_config())
    made.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    return made


def in_plain_model(*mlps: nn.Module) -> nn.Module:
    """A model of one decoder layer for each, of the classes that `plain_layer` knows. Modules know their parents while
    these live."""

    def llama(kind: str, **modules: nn.Module) -> nn.Module:
        made = type(f"Llama{kind}", (nn.Module,), {"__module__": "vllm.model_executor.models.llama"})()
        for name, module in modules.items():
            made.add_module(name, module)
        return made

    def decoder_layer(mlp: nn.Module) -> nn.Module:
        norms = {name: nn.Identity() for name in ("input_layernorm", "post_attention_layernorm")}
        return llama("DecoderLayer", self_attn=llama("Attention"), mlp=mlp, **norms)

    return llama("Model", layers=nn.ModuleList(map(decoder_layer, mlps)))


def load(layer: Any, *arguments: Any, name: str = "weight") -> None:
    """Hands a tensor, and where it goes in a merged layer, to the loader of a layer's parameter."""
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, *arguments)


def sparse_weight(rows: int, columns: int, sparse: tuple[slice, slice]) -> torch.Tensor:
    """Random FP8 (rows, columns), 2:4 in the part that `sparse` slices."""
    weight = torch.randn(rows, columns)
    weight[sparse].unflatten(-1, (-1, 4))[..., 2:] = 0
    return weight.to(torch.float8_e4m3fn)


def dequantized(x: torch.Tensor) -> torch.Tensor:
    """x rounded to FP8 per token, as the layers do."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@contextmanager
def world_of_one(folder: Path) -> Iterator[None]:
    """Within it vLLM builds layers, as the only rank."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        initialize_model_parallel()
        yield
    cleanup_dist_env_and_memory()
