"""The text to train on: drawn as for pruning, or written by the teacher itself, and the share that only judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from offline_prune.calibration.chat import Chat, RefusedChat, chat_template, templated
from offline_prune.healing.models import Language
from offline_prune.healing.settings import HealSettings
from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError

#: The source that is the teacher itself.
GENERATED = "generated"
#: Sequences that are written together: at least, and at most on each kind of device.
FEWEST_AT_ONCE, MOST_AT_ONCE = 32, {"cpu": 32, "cuda": 512}
#: Tokens that a sequence begins with where there is no chat template.
_PROMPT = 4
#: Stands for what a user says while a template is looked at.
_SAID = "what the user says"


@dataclass(frozen=True)
class Text:
    """int64 (n, length) each: what is trained on, and what is not."""

    training: torch.Tensor
    heldout: torch.Tensor


def heldout_sequences(settings: HealSettings) -> int:
    """How many sequences judge: the wanted share, and a multiple of the number of ranks."""
    ranks = distributed.size()
    return max(1, -(-round(settings.heldout * settings.samples) // ranks)) * ranks


def step_sequences(settings: HealSettings) -> int:
    """How many sequences a step takes, of all ranks together."""
    ranks = distributed.size()
    return max(1, settings.step_tokens // settings.length // ranks) * ranks


def steps_in_epoch(settings: HealSettings) -> int:
    """
    Raises:
        SpenseError: the text is too little for one step beside the held-out share.
    """
    heldout, each = heldout_sequences(settings), step_sequences(settings)
    steps = (settings.samples - heldout) // each
    if not steps:
        raise SpenseError(
            f"--samples: found {settings.samples} sequences of {settings.length} tokens, of which {heldout} are held "
            f"out; expected at least {heldout + each}, which is one step; or a smaller --step-tokens"
        )
    return steps


def split(tokens: torch.Tensor, settings: HealSettings) -> Text:
    """The last sequences judge: they come from other documents than those before, but for the one that is cut."""
    heldout = heldout_sequences(settings)
    return Text(tokens[:-heldout], tokens[-heldout:])


def order(count: int, epoch: int, seed: int) -> torch.Tensor:
    """The order of an epoch's sequences."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@torch.no_grad()
def generate(teacher: Language, settings: HealSettings, at_once: int, told: Callable[[int, int], None]) -> torch.Tensor:
    """Sequences drawn from the teacher's own distribution (temperature 1), each rank's share of them.

    Each begins as the chat template begins a user's turn, so that a chat model writes the question as well as the
    answer; without a template with the tokenizer's first token, if it has one, and three random ones. What ends
    a document does not end a sequence.

    Args:
        teacher: whole on every rank.
        at_once: how many are written together.
        told: about (sequences, of how many) this rank has.

    Returns:
        int64 (samples, length), on every rank.
    """
    ranks, rank = distributed.size(), distributed.rank()
    share = -(-settings.samples // ranks)
    model: Any = teacher.source.skeleton
    tokenizer = teacher.source.tokenizer
    random = torch.Generator().manual_seed(settings.seed * 1_000_003 + rank)
    # transformers draws from torch's own generator.
    torch.manual_seed(settings.seed * 1_000_003 + rank)
    done: list[torch.Tensor] = []
    for start in range(0, share, at_once):
        prompts = _prompts(tokenizer, min(at_once, share - start), random, settings.length)
        found = model.generate(
            input_ids=prompts.to(teacher.device),
            attention_mask=torch.ones_like(prompts).to(teacher.device),
            max_new_tokens=settings.length - prompts.shape[1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
        done.append(found)
        told(min(start + at_once, share), share)
    mine = torch.cat(done).to(torch.int64)
    if ranks == 1:
        return mine.cpu()
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: settings.samples].cpu()


def _prompts(tokenizer: PreTrainedTokenizerBase, count: int, random: torch.Generator, length: int) -> torch.Tensor:
    """int64 (count, n), n < length."""
    start = _turn(tokenizer)
    if start and len(start) < length:
        return torch.tensor(start).expand(count, -1)
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([token for token in tokenizer.get_vocab().values() if token not in special])
    n = min(_PROMPT, length - 1)
    drawn = usual.sort().values[torch.randint(len(usual), (count, n), generator=random)]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return drawn if first is None else torch.cat([torch.full((count, 1), first), drawn[:, : n - 1]], dim=1)


def _turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the chat template has before a user's first words; nothing where there is no template, or no such part."""
    template = chat_template(tokenizer)
    if template is None:
        return []
    try:
        whole = templated(Chat(({"role": "user", "content": _SAID},), "a user's turn"), template, tokenizer)
    except RefusedChat:
        return []
    before, found, _ = whole.partition(_SAID)
    return tokenizer(before, add_special_tokens=False)["input_ids"] if found else []
