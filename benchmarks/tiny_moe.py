"""Trains a small mixture of experts, for benchmarks that need a real one where no hub can be reached.

    python -m benchmarks.tiny_moe OUT --device cuda

makes a Hugging Face folder: a Qwen3-MoE of 66 million parameters, 23 million of which a token passes, with a tokenizer
of its own. Both learn from docstrings and code of installed packages, or from the training text in `--texts`, a folder
that `python -m benchmarks.texts FOLDER --training` wrote. The held-out texts of `benchmarks.accuracy` have none of it;
its calibration text, docstrings, is a part of it. OUT/training.json says how the model was made, and what it loses on
held-out text. On a GPU weights are BF16, with float32 copies for AdamW.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.command_line import positive, readable_folder, run_main, writable_folder
from benchmarks.envelope import write_result
from benchmarks.texts import TRAINING, documents_in, heldout, require
from offline_prune.calibration.heldout import HELDOUT
from offline_prune.checkpoint.dense_model import load_dense, perplexity
from offline_prune.runtime.device import pick_device
from scripts.lock import appearing
from vllm_spense.errors import SpenseError

FILE = "training.json"
_END = "<|endoftext|>"
#: Characters that the tokenizer learns from, spread over the training text.
_TOKENIZER_CHARACTERS = 8_000_000
#: Steps in which the rate rises, the share of it that is left at the end, and steps between two lines of progress.
_WARM_UP, _LAST_RATE, _SAID = 100, 0.1, 50
_HELDOUT_SAMPLES = 40

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of the model and of its training.

    Attributes:
        intermediate: of one expert.
        experts: in each layer.
        chosen: experts of each token.
        vocabulary: tokens of the tokenizer.
        length: tokens in a training sequence.
        batch: sequences in a step.
        rate: AdamW's, at its highest.
        balance: weight of the load-balancing loss.
    """

    hidden: int = 512
    intermediate: int = 384
    layers: int = 6
    experts: int = 16
    chosen: int = 4
    vocabulary: int = 8192
    length: int = 512
    batch: int = 64
    steps: int = 1500
    rate: float = 2e-3
    balance: float = 0.01
    seed: int = 0

    @property
    def config(self) -> Qwen3MoeConfig:
        heads = max(self.hidden // 64, 2)
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=64,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            norm_topk_prob=True,
            router_aux_loss_coef=self.balance,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_moe", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=writable_folder, help="folder to write")
    parser.add_argument("--texts", type=readable_folder, help="folder of texts [default: what is installed]")
    parser.add_argument("--device", default="auto")
    for field in fields(Settings):
        kind = type(field.default) if field.name == "seed" or isinstance(field.default, float) else positive
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    options = parser.parse_args()
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    make(options.out, settings, pick_device(options.device), options.texts)


def make(out: Path, settings: Settings, device: torch.device, texts: Path | None) -> Row:
    """Trains a model and writes it to `out`, which appears when all of it is there.

    Args:
        texts: a folder of texts, or None for what is installed.

    Returns:
        What `FILE` has in its row.

    Raises:
        SpenseError: `out` exists, no such texts, or too little of them.
    """
    if out.exists():
        raise SpenseError(f"{out}: exists; expected a folder that is still to be made")
    require(texts, [TRAINING, *HELDOUT])
    start = time.perf_counter()
    documents = list(documents_in(texts, TRAINING))
    tokenizer = tokenizer_of(documents, settings.vocabulary)
    sequences = packed(documents, tokenizer, settings.length)
    say(f"{len(documents)} documents, {sequences.numel()} tokens after {time.perf_counter() - start:.0f} s")
    model, losses = train(settings, sequences, device)
    with appearing(out) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        row = {
            **asdict(settings),
            "parameters": parameters,
            "training_tokens": sequences.numel(),
            "epochs": settings.steps * settings.batch / len(sequences),
            "losses": losses,
            "seconds": time.perf_counter() - start,
            "heldout_losses": heldout_losses(unfinished, settings.length, device, texts),
        }
        write_result(unfinished / FILE, "tiny_moe", [row])
    say(f"held out: {row['heldout_losses']}; written: {out}, {row['seconds']:.0f} s")
    return row


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def tokenizer_of(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many tokens, learned from some of the documents; token 0 ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    stride = max(1, sum(map(len, documents)) // _TOKENIZER_CHARACTERS)
    bpe.train_from_iterator(documents[::stride], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END, pad_token=_END)


def packed(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """int64 (sequences, length): all documents, one after the other, the end of a text after each.

    Raises:
        SpenseError: there is not even one sequence.
    """
    stream = [
        token
        for ids in tokenizer(list(documents), verbose=False)["input_ids"]
        for token in (*ids, tokenizer.eos_token_id)
    ]
    count = len(stream) // length
    if not count:
        raise SpenseError(f"{TRAINING}: found {len(stream)} tokens, expected at least one sequence of {length}")
    return torch.tensor(stream[: count * length]).view(count, length)


def train(
    settings: Settings, sequences: torch.Tensor, device: torch.device
) -> tuple[Qwen3MoeForCausalLM, dict[int, float]]:
    """Next-token prediction with AdamW, a warm-up and a cosine.

    Args:
        sequences: int64 (n, length).

    Returns:
        The model, in BF16, and the training loss at some steps, the load-balancing loss included.
    """
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM(settings.config)
    # A CPU without BF16 instructions would take many times as long.
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).train()
    weights = list(model.parameters())
    masters = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
    groups = [
        {"params": [each for each in masters if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for each in masters if each.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    losses: dict[int, float] = {}
    every = batches(sequences, settings.batch, settings.seed)
    for step in range(1, settings.steps + 1):
        tokens = next(every).to(device, non_blocking=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True).loss
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        if step == 1 or step % _SAID == 0 or step == settings.steps:
            losses[step] = loss.item()
            say(f"step {step} of {settings.steps}: loss {losses[step]:.3f}")
    return model.to(torch.bfloat16).eval(), losses


def batches(sequences: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Without end, passes over the sequences in another order each time; what does not fill a batch is left out.

    Raises:
        SpenseError: fewer sequences than one batch takes.
    """
    if len(sequences) < size:
        raise SpenseError(f"{TRAINING}: found {len(sequences)} sequences, expected at least a batch of {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(sequences), generator=generator).split(size):
            if len(chosen) == size:
                yield sequences[chosen]


def rate(step: int, settings: Settings) -> float:
    """Of a step, counted from 1."""
    risen = min(1.0, step / min(_WARM_UP, settings.steps))
    fallen = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.rate * risen * (_LAST_RATE + (1 - _LAST_RATE) * fallen)


def heldout_losses(folder: Path, length: int, device: torch.device, texts: Path | None) -> dict[str, float]:
    """Mean negative log-likelihood of each next token, in nats, of held-out texts that need no download."""
    model, tokenizer = load_dense(folder, str(device))
    return {
        domain: math.log(perplexity(model, heldout(domain, tokenizer, _HELDOUT_SAMPLES, length, texts)))
        for domain in HELDOUT
    }


if __name__ == "__main__":
    run_main(main)
