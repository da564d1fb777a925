"""Calibration text that the dense model writes itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from offline_prune.calibration.chat import Chat, RefusedChat, chat_template, templated
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import output_head
from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError, first_line

#: Texts that are written together: at least where they fit, and at most on each kind of device.
FEWEST_AT_ONCE, MOST_AT_ONCE = 32, {"cpu": 32, "cuda": 2048}
#: Tokens of a text that is written for longer sequences; so many are written together then that keys and values fit.
PIECE = 512
#: Not cuDNN's, which makes a plan for every length that the keys have: each step of the first texts would wait for one.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
#: Tokens that a sequence begins with where there is no chat template.
_PROMPT = 4
#: Stands for what a user says while a template is looked at.
_SAID = "what the user says"


@dataclass(frozen=True)
class Writer:
    """What a model takes to write text.

    Attributes:
        weights: numbers in the language model and its head.
        cache: numbers that keys and values of a token are, in all blocks.
        vocabulary: logits of a token.
        itemsize: bytes of a number.
    """

    weights: int
    cache: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, source: SourceModel, dtype: torch.dtype) -> Writer:
        """
        Raises:
            SpenseError: the model cannot write.
        """
        head, skeleton = output_head(source), source.skeleton
        if not skeleton.can_generate():
            raise SpenseError(
                f"--calibration: {type(skeleton).__name__} has no way to generate text; name another source than "
                "`generated`"
            )
        parameters = {*source.text.parameters(), *head.parameters()}
        text = source.text.config.get_text_config()
        return cls(
            weights=sum(parameter.numel() for parameter in parameters),
            cache=len(source.blocks) * keys_and_values(text),
            vocabulary=head.weight.shape[0],
            itemsize=dtype.itemsize,
        )

    def bytes(self, at_once: int, length: int) -> int:
        """Bytes that so many sequences of so many tokens need, the weights among them."""
        return (self.weights + at_once * length * self.cache) * self.itemsize + 4 * 4 * at_once * self.vocabulary

    def at_once(self, samples: int, length: int, device: torch.device, room: int) -> int:
        """How many of this rank's texts to write together.

        A step costs a GPU about the same for one as for many, so as many as half of what the weights leave has space
        for; `FEWEST_AT_ONCE` may take all of it, and fewer are written only where that does not do.

        Args:
            samples: of all ranks.
            room: bytes.
        """
        count = min(MOST_AT_ONCE[device.type], -(-samples // distributed.size()))
        weights = self.bytes(0, length)
        while count > 1 and self.bytes(count, length) > ((room + weights) // 2 if count > FEWEST_AT_ONCE else room):
            count //= 2
        return count


def pieces(samples: int, length: int) -> tuple[int, int]:
    """How many texts of how many tokens are written for so many sequences of so many."""
    piece = min(length, PIECE)
    return -(-samples * length // piece), piece


def keys_and_values(text: PretrainedConfig) -> int:
    """Numbers that a token's keys and values are in one block."""
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * width


def joined(
    source: SourceModel,
    device: torch.device,
    samples: int,
    length: int,
    seed: int,
    at_once: int,
    say: Callable[[str], None],
) -> torch.Tensor:
    """As `generate`, but in `pieces`, which are put together to sequences: a model wanders off from its own words, and
    keys and values of long sequences leave room for few.

    Returns:
        int64 (samples, length), on every rank, in host memory.
    """
    texts, piece = pieces(samples, length)
    say(f"the dense model writes {texts} × {piece} tokens, {at_once} texts together")
    written = generate(source, device, texts, piece, seed, at_once, say)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # What comes next allocates other sizes.
    return written.flatten()[: samples * length].view(samples, length).clone()


@torch.no_grad()
def generate(
    source: SourceModel,
    device: torch.device,
    samples: int,
    length: int,
    seed: int,
    at_once: int,
    say: Callable[[str], None],
) -> torch.Tensor:
    """Sequences drawn from a model's own distribution (temperature 1), each rank's share of them.

    Each begins as the chat template begins a user's turn, so that a chat model writes the question as well as the
    answer; without a template with the tokenizer's first token, if it has one, and three random ones. What ends
    a document does not end a sequence. Other values of `at_once` give other text.

    Args:
        source: whole on every rank's device.
        samples, length: of all ranks together, how many sequences of how many tokens.
        at_once: how many are written together.
        say: told how many this rank has.

    Returns:
        int64 (samples, length), on every rank, in host memory.

    Raises:
        SpenseError: the model's own code fails.
    """
    ranks, rank = distributed.size(), distributed.rank()
    share = -(-samples // ranks)
    model: Any = source.skeleton
    random = torch.Generator().manual_seed(seed * 1_000_003 + rank)
    done: list[torch.Tensor] = []
    began = time.perf_counter()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        sdpa_kernel(_ATTENTION),
        warnings.catch_warnings(),
    ):
        # A vision tower takes no part and has no weights here; transformers takes its device for the model's.
        warnings.filterwarnings("ignore", ".*input_ids.* on a device type different")
        # transformers draws from torch's own generator.
        torch.manual_seed(seed * 1_000_003 + rank)
        for start in range(0, share, at_once):
            prompts = _prompts(source, min(at_once, share - start), random, length)
            done.append(_continued(model, prompts.to(device), length))
            count = min(start + at_once, share)
            left = (time.perf_counter() - began) / count * (share - count) / 60
            say(f"{count} of {share} texts written" + (f", {left:.1f} minutes left" if left else ""))
    mine = torch.cat(done).to(torch.int64)
    if ranks == 1:
        return mine.cpu()
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[:samples].cpu()


def _continued(model: Any, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """Sequences that begin with these: int64 (n, length) of (n, fewer), on the same device."""
    try:
        return model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=length - prompts.shape[1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Whatever the code of a model raises, above all what it brings along itself.
        raise SpenseError(
            f"--calibration generated: {type(model).__name__} cannot write here, {type(error).__name__}: "
            f"{first_line(error)}; --calibration builtin --calibration builtin-code does without"
        ) from error


def _prompts(source: SourceModel, count: int, random: torch.Generator, length: int) -> torch.Tensor:
    """int64 (count, n), n < length."""
    # A tokenizer may have more tokens than the model.
    embeddings: Any = source.text.get_input_embeddings()
    tokenizer, known = source.tokenizer, int(embeddings.num_embeddings)
    start = _turn(tokenizer)
    if start and len(start) < length and max(start) < known:
        return torch.tensor(start).expand(count, -1)
    special = set(tokenizer.all_special_ids)
    usual = sorted(token for token in tokenizer.get_vocab().values() if token not in special and token < known)
    n = min(_PROMPT, length - 1)
    # All of a tokenizer's tokens may be special, or beyond the model's.
    drawn = torch.tensor(usual or range(known))[torch.randint(len(usual) or known, (count, n), generator=random)]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None or first >= known:
        return drawn
    return torch.cat([torch.full((count, 1), first), drawn[:, : n - 1]], dim=1)


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
