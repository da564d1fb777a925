"""transformers' model of a checkpoint, with the arithmetic of a server: FP8 activations, LoRAs beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from adapters import parts_of, scaling
from engines import PROMPTS, Completion
from torch import nn

from offline_prune.checkpoint.evaluate import load_dense
from offline_prune.checkpoint.verify import open_checkpoint
from vllm_spense.layout import rank_order

FP8 = torch.finfo(torch.float8_e4m3fn)


class _Linear(nn.Module):
    """Y = Σ q(X_r)·W_rᵀ + s·X·Aᵀ·Bᵀ, with q the rounding of a token's part to FP8 on rank r.

    Args:
        parts: input indices of each rank.
    """

    def __init__(self, linear: nn.Linear, parts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.parts = linear, parts
        self.lora: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([_rounded(x[..., part]) @ self.linear.weight[:, part].T for part in self.parts]).sum(0)
        if self.lora is None:
            return y
        a, b, scale = self.lora
        return y + scale * (x @ a.T @ b.T)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / FP8.max).clamp(min=1 / (FP8.max * 512))
    return (x * scale.reciprocal()).clamp(FP8.min, FP8.max).to(torch.float8_e4m3fn).float() * scale


def as_served(
    checkpoint: Path, adapters: Sequence[Path], ranks: int, completions: Sequence[Completion]
) -> list[Completion]:
    """What the model says to the same tokens, with the adapters as `engines.Run` deals them out.

    Args:
        checkpoint: a Spense checkpoint without biases.
        completions: of an engine, for all prompts.
    """
    model, tokenizer = load_dense(checkpoint)
    found = open_checkpoint(checkpoint)
    layers = {}
    for name in [name.removesuffix(".weight_scale") for name in found.tensors if name.endswith(".weight_scale")]:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parts = [torch.arange(linear.in_features)]
        if name.endswith("o_proj"):
            parts = list(parts[0].chunk(ranks))
        elif name.endswith("down_proj"):
            parts = list(rank_order(found.annotation.regions(name.removesuffix(".down_proj")), ranks).chunk(ranks))
        layers[name] = _Linear(linear, parts)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layers[name])
    answers = []
    for i, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        chosen = [None, *adapters][i % (len(adapters) + 1)]
        for layer in layers.values():
            layer.lora = None
        for name, lora in (parts_of(chosen) if chosen else {}).items():
            layers[name].lora = lora["lora_A.weight"], lora["lora_B.weight"], scaling(chosen)
        tokens = tokenizer(prompt).input_ids
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*tokens, *completion.tokens]])).logits[0, len(tokens) - 1 : -1]
        steps = zip(logits.log_softmax(-1), completion.logprobs, strict=True)
        answers.append(
            Completion(completion.tokens, [{token: step[token].item() for token in listed} for step, listed in steps])
        )
    return answers
