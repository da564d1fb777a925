"""Teacher and student in memory: opened block by block, spread over the ranks, and compared before that."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from offline_prune.calibration.data import check_vocabulary
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import around_blocks
from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError

#: On which the head is tried, and how far logits may be off, relative to the largest.
_TRIED, _TOLERANCE = "A few words.", 1e-2


class Language:
    """A causal language model on the device: token ids → last hidden states → logits.

    Args:
        source: its files and its module tree.
        device, dtype: where and in what its weights are.
        context: entered; what is outside the blocks stays in memory until it is left.
        trained: full names of parameters that get gradients.
        checkpointing: blocks compute their activations again for the gradients.
        whole: every rank has all weights until `spread` is called; otherwise each block is spread once it is read.

    Attributes:
        head: the output head.
    """

    def __init__(
        self,
        source: SourceModel,
        device: torch.device,
        dtype: torch.dtype,
        context: ExitStack,
        trained: Collection[str] = (),
        checkpointing: bool = False,
        whole: bool = False,
    ) -> None:
        self.source, self.device = source, device
        self.head = context.enter_context(around_blocks(source, device, dtype))
        for block in source.blocks:
            module = source.load(block.name, device, dtype)
            for name, parameter in module.named_parameters(prefix=block.name):
                parameter.requires_grad_(name in trained)
            if checkpointing:
                module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            if not whole:
                _spread(module)
        for name, parameter in source.text.named_parameters(prefix=source.text_name):
            if name in trained:
                parameter.requires_grad_()
        if not whole:
            self._spread_rest()
        text: Any = source.text.config.get_text_config()
        self._cap = getattr(text, "final_logit_softcapping", None)
        self._scale = float(getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1))

    def spread(self) -> None:
        """Leaves every rank its rows of all weights but the embeddings and the head; nothing happens in a process that
        is alone."""
        for block in self.source.blocks:
            _spread(self.source.module(block.name))
        self._spread_rest()

    def _spread_rest(self) -> None:
        _spread(self.source.text, {*self.source.text.get_input_embeddings().parameters(), *self.head.parameters()})

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """The head's input of all positions: (n · length, H) of int64 (n, length)."""
        return self.source.text(input_ids=tokens, use_cache=False)[0].flatten(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (n, vocabulary) of (n, H)."""
        found = self.head(hidden).float()
        if self._scale != 1:
            found = found * self._scale
        return found if self._cap is None else torch.tanh(found / self._cap) * self._cap

    @torch.no_grad()
    def check_logits(self) -> None:
        """Raises SpenseError where the model's own logits are others than `logits`."""
        few = torch.tensor([self.source.tokenizer(_TRIED, add_special_tokens=False)["input_ids"]])
        check_vocabulary(few, self.head.out_features)
        few = few.to(self.device)
        expected = self.source.skeleton(input_ids=few, use_cache=False).logits[0].float()
        found = self.logits(self.hidden(few))
        if found.shape != expected.shape or (found - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise SpenseError(
                f"{type(self.source.skeleton).__name__}: what it makes of its output head's result is not known "
                "(scaling and soft-capping are), so `spense heal` cannot train it"
            )


def _spread(module: nn.Module, but: set[nn.Parameter] | None = None) -> None:
    """FSDP2: rows of every weight on each rank; gradients are the mean over the ranks."""
    if distributed.size() > 1:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(module, reshard_after_forward=True, mp_policy=policy, ignored_params=but)


def require_alike(teacher: SourceModel, student: SourceModel) -> None:
    """Raises SpenseError unless both have one architecture, the same sizes and the same vocabulary."""

    def differ(what: str, found: object, expected: object) -> SpenseError:
        return SpenseError(
            f"{teacher.folder}: not the model that {student.folder} was made from: {what}: found {found}, "
            f"expected {expected}"
        )

    kinds = [type(each.skeleton).__name__ for each in (teacher, student)]
    if kinds[0] != kinds[1]:
        raise differ("architecture", *kinds)
    found, expected = (
        {name: tuple(parameter.shape) for name, parameter in each.skeleton.named_parameters()}
        for each in (teacher, student)
    )
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise differ(name, found.get(name, "nothing"), expected.get(name, "nothing"))
    words, others = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    if words != others:
        first = min(word for word in {**words, **others} if words.get(word) != others.get(word))
        raise differ(f"token {first!r}", words.get(first, "nothing"), others.get(first, "nothing"))
