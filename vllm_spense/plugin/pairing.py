"""Which modules of a model are neighbours, told by the order in which vLLM builds them.

A norm hands FP8 to the linear layer after it, which is no tensor of the model's type, so each must know that the other
takes it. vLLM tells modules neither their names nor their neighbours, but plain models build the modules of a decoder
layer in one order: qkv_proj, gate_up_proj, the norm before qkv_proj, the norm before gate_up_proj. Other models get
links too, which come to nothing: no layer takes FP8 that is not in such a decoder layer (`plain_layer.py`).

A pair that is wrong shows in the first forward pass: what is handed on says for whom it was made, and whoever reads it
compares that with its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from vllm.config import VllmConfig, get_current_vllm_config


@dataclass
class NormLink:
    """Between a norm and the linear layer that reads its output.

    Attributes:
        reader: the layer's name.
        takes_fp8: whether the layer takes `Quantized` from this norm; known once its weight is loaded.
    """

    reader: str
    takes_fp8: bool = False


class Quantized(NamedTuple):
    """A linear layer's input in FP8, (M, K), and a scale for each token, (M, 1).

    `reader` is the name of the layer that it was made for, or of the module that this layer is in. `leading` are the
    sizes that the layer's output has before its last one; none where that is M alone.
    """

    values: torch.Tensor
    scale: torch.Tensor
    reader: str
    leading: Sequence[int] = ()


class Pairing:
    """The links of one model, while vLLM builds it.

    Args:
        activations: whether its activations are `FusedSiluAndMul`, and nothing but its own modules reads what they and
            gate_up hand on.
        norms: likewise, whether its norms are `FusedRMSNorm`.
    """

    def __init__(self, activations: bool, norms: bool) -> None:
        self.activations = activations
        self.norms = norms
        self._qkv: NormLink | None = None
        self._norms: list[NormLink | None] = []

    def built_qkv(self, name: str) -> NormLink:
        """The link to the norm before this qkv_proj, which is built later."""
        self._norms, self._qkv = [], NormLink(name)
        return self._qkv

    def built_gate_up(self, name: str) -> NormLink:
        """The link to the norm before this gate_up_proj, which is built later."""
        qkv, self._qkv = self._qkv, None
        if qkv and _decoder_layer(qkv.reader) != _decoder_layer(name):
            # Of a layer before this one, whose MLP was not pruned.
            qkv = None
        norm = NormLink(name)
        self._norms = [qkv, norm] if self.norms else []
        return norm

    def next_norm(self) -> NormLink | None:
        """The link of the norm that is being built, if it is one of a decoder layer's two."""
        return self._norms.pop(0) if self._norms else None


def _decoder_layer(name: str) -> str:
    """Of a layer in its attention or MLP: model.layers.0 of model.layers.0.mlp.gate_up_proj."""
    return name.rsplit(".", 2)[0]


def current_pairing() -> Pairing | None:
    """Of the model that vLLM is building; None if that has no pruned layers."""
    return getattr(get_current_vllm_config().quant_config, "pairing", None)


def only_modules_read_layers(engine: VllmConfig) -> bool:
    """Whether what a layer takes and returns is the model's own business: LoRA reads inputs and adds to outputs, in the
    model's dtype."""
    return engine.lora_config is None


def mispaired(made_for: str | None, reached: str) -> RuntimeError:
    """What a module raises that gets what was made for another."""
    return RuntimeError(
        f"Spense paired the wrong modules: what was made for {made_for} reached {reached}. "
        "This version of vLLM builds or runs the model's modules in another order than Spense expects"
    )
