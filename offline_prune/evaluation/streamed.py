"""A model's predictions of some text, computed with one decoder block in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import nn

from offline_prune.calibration.hidden_states import Stream
from offline_prune.calibration.recording import head
from offline_prune.model.loading import SourceModel
from offline_prune.runtime.activation_store import Place

#: Told (blocks done, blocks in all, name of the block).
Progress = Callable[[int, int, str], None]
#: Weights, hidden states and logits are float32: what is measured is the files, not a device's rounding.
DTYPE = torch.float32
#: About how many tokens pass through a block at once.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 8192}

#: Logits, float32 (1, stop − start, vocabulary), of a sequence's positions start to stop: (sequence, start, stop).
Logits = Callable[[int, int, int], torch.Tensor]


def last_hidden(model: SourceModel, tokens: torch.Tensor, device: torch.device, progress: Progress) -> Stream:
    """The hidden states after the last block, (n, length, H), of tokens, int64 (n, length).

    Raises:
        SpenseError: the model cannot be run block by block, or a block's output is not finite.
    """
    width = cast(nn.Embedding, model.text.get_input_embeddings()).embedding_dim
    place = _place(2 * tokens.numel() * width * DTYPE.itemsize, device)
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(model, tokens, device, DTYPE, _TOKENS_AT_ONCE[device.type], place, Path(folder))
    for index, block in enumerate(model.blocks):
        module = model.load(block.name, device, DTYPE)
        if device.type == "cuda" and index + 1 < len(model.blocks):
            model.prefetch(model.blocks[index + 1].name, device)
        stream.advance(index, module, block.name)
        model.unload(block.name)
        progress(index + 1, len(model.blocks), block.name)
    return stream


@contextmanager
def logits(model: SourceModel, tokens: torch.Tensor, stream: Stream) -> Iterator[Logits]:
    """Inside, the logits of any positions can be had, made anew each time; the vocabulary makes them too many to keep.

    Args:
        stream: `last_hidden` of the tokens.
    """
    with head(model, stream.device, DTYPE) as of:

        def positions(sequence: int, start: int, stop: int) -> torch.Tensor:
            hidden = stream.hidden[sequence : sequence + 1, start:stop].to(stream.device)
            return of(tokens[sequence : sequence + 1, start:stop], stream.unpacked(hidden)).float()

        yield positions


def _place(size: int, device: torch.device) -> Place:
    """Where hidden states of that many bytes in all go: the device's memory, host memory, or a file."""
    host = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if size <= free // 4:
        return Place.DEVICE
    # Pinned memory comes in powers of two.
    return Place.HOST if device.type == "cuda" and 2 * size <= host // 2 else Place.DISK
