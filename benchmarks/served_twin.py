"""transformers' model of a checkpoint with the arithmetic of a server: activations in FP8, a scale for each token.

What the files say, run by code that is neither Spense's nor vLLM's. A reference where vLLM has no dense kernels: for
FP8 experts on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.checkpoint.verify import Checkpoint, open_checkpoint
from vllm_spense.layout import rank_order

FP8 = torch.finfo(torch.float8_e4m3fn)


class RoundedLinear(nn.Module):
    """Y = Σ q(X_r)·W_rᵀ + s·X·Aᵀ·Bᵀ, with q the rounding of a token's part to FP8 on rank r.

    Args:
        parts: input indices of each rank.
    """

    def __init__(self, linear: nn.Linear, parts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.parts = linear, parts
        self.lora: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([rounded(x[..., part]) @ self.linear.weight[:, part].T for part in self.parts]).sum(0)
        if self.linear.bias is not None:
            y = y + self.linear.bias
        if self.lora is None:
            return y
        a, b, scale = self.lora
        return y + scale * (x @ a.T @ b.T)


class RoundedExperts(nn.Module):
    """All routed experts of a layer, their inputs and intermediate activations rounded.

    Args:
        experts: transformers' module with `gate_up_proj` and `down_proj` of three dimensions.
        parts: intermediate indices of each rank.
    """

    def __init__(self, experts: nn.Module, parts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.experts, self.parts = experts, parts

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        held = self.experts
        out = torch.zeros_like(x)
        for expert in range(len(held.down_proj)):
            token, place = (index == expert).nonzero(as_tuple=True)
            mid = held._apply_gate(rounded(x[token]) @ held.gate_up_proj[expert].T)
            down = held.down_proj[expert]
            y = torch.stack([rounded(mid[:, part]) @ down[:, part].T for part in self.parts]).sum(0)
            out.index_add_(0, token, y * weights[token, place, None])
        return out


def rounded(x: torch.Tensor) -> torch.Tensor:
    """(…, K) as FP8 with one scale for each row."""
    scale = (x.abs().amax(-1, keepdim=True) / FP8.max).clamp(min=1 / (FP8.max * 512))
    return (x * scale.reciprocal()).clamp(FP8.min, FP8.max).to(torch.float8_e4m3fn).float() * scale


def load_as_served(
    folder: Path, ranks: int = 1, expert_ranks: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Spense checkpoint as so many tensor parallel ranks compute it, in float32.

    Linear layers are `RoundedLinear`, under the names that they have in the files.

    Args:
        expert_ranks: that share each routed expert, if not all do.
    """
    model, tokenizer = load_dense(folder)
    found = open_checkpoint(folder)
    annotation = found.annotation
    downs = {annotation.layers(module)[2]: module for module in annotation.modules}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.weight_scale" in found.tensors:
            whole = torch.arange(module.in_features)
            parts = list(whole.chunk(ranks)) if name.endswith("o_proj") else [whole]
            if name in downs:
                parts = _parts(found, downs[name], ranks)
            _replace(model, name, RoundedLinear(module, parts))
        elif type(module).__name__.endswith("Experts") and hasattr(module, "gate_up_proj"):
            (stored,) = [each for each in annotation.experts if _layer(each) == _layer(name)]
            _replace(model, name, RoundedExperts(module, _parts(found, stored, expert_ranks or ranks)))
    return model, tokenizer


def _parts(found: Checkpoint, module: str, ranks: int) -> list[torch.Tensor]:
    return list(rank_order(found.annotation.regions(module), ranks).chunk(ranks))


def _layer(name: str) -> str:
    """The number of a module's layer: what files and modules agree about."""
    return name.partition("layers.")[2].partition(".")[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
