"""A whole model in memory at once, for what cannot be done block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import nn

from offline_prune.model.loading import SourceModel
from vllm_spense.errors import SpenseError


def output_head(source: SourceModel) -> nn.Linear:
    """
    Raises:
        SpenseError: the model has none.
    """
    if source.head_name is None:
        raise SpenseError(f"{source.folder}: found no output head, so this model has no logits")
    return cast(nn.Linear, source.module(source.head_name))


@contextmanager
def around_blocks(source: SourceModel, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Linear]:
    """The language model without its blocks, and its output head, in memory; yields the head.

    Raises:
        SpenseError: the model has no head, or a tensor is missing or damaged.
    """
    head = output_head(source)
    embedding = cast(nn.Embedding, source.text.get_input_embeddings())
    tied = head.weight is embedding.weight
    with ExitStack() as context:
        if tied:
            context.callback(setattr, head, "weight", head.weight)
        context.enter_context(source.outside_blocks(device, dtype))
        if not tied or head.bias is not None:
            assert source.head_name is not None
            source.load(source.head_name, device, dtype)
            context.callback(source.unload, source.head_name)
        if tied:
            head.weight = embedding.weight
        yield head


@contextmanager
def whole_model(source: SourceModel, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, all of the language model and its head is in memory.

    Raises:
        SpenseError: as `around_blocks`.
    """
    with around_blocks(source, device, dtype), ExitStack() as context:
        for block in source.blocks:
            source.load(block.name, device, dtype)
            context.callback(source.unload, block.name)
        yield
