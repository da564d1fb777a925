"""What transformers' model of a checkpoint says, with the arithmetic of a server and LoRAs beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from adapters import parts_of, scaling
from engines import PROMPTS, Completion
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.served_twin import RoundedLinear, load_as_served


def as_served(
    checkpoint: Path,
    adapters: Sequence[Path],
    ranks: int,
    completions: Sequence[Completion],
    expert_ranks: int | None = None,
) -> list[Completion]:
    """What the model says to the same tokens, with the adapters as `engines.Run` deals them out.

    Args:
        checkpoint: a Spense checkpoint.
        completions: of an engine, for all prompts.
        expert_ranks: that share each routed expert, if not all do.
    """
    return said_by(*load_as_served(checkpoint, ranks, expert_ranks), completions, adapters)


def said_by(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    adapters: Sequence[Path] = (),
) -> list[Completion]:
    """What transformers' model says to the tokens of an engine's completions: see `as_served`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoundedLinear)}
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
