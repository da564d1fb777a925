"""What a block is called with for one sequence, kept in host memory until the block's turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class _Bits:
    """A mask, eight values in a byte: those of long sequences are large."""

    packed: torch.Tensor
    width: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> _Bits:
        width = mask.shape[-1]
        bits = pad(mask.to(torch.uint8), (0, -width % 8)).unflatten(-1, (-1, 8))
        return cls((bits << _places(mask.device)).sum(-1, dtype=torch.uint8).cpu(), width)

    def mask(self, device: torch.device) -> torch.Tensor:
        bits = self.packed.to(device).unsqueeze(-1) >> _places(device) & 1
        return bits.bool().flatten(-2)[..., : self.width]


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def kept(value: Any, known: dict[int, Any]) -> Any:
    """An argument in host memory: tensors, and tuples, lists and mappings of them; anything else as it is.

    Args:
        known: by `id` what was kept of this sequence before. Blocks share masks and positions; their originals must
            live as long as this mapping.
    """
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            known[id(value)] = _Bits.of(value) if value.dtype == torch.bool and value.ndim > 1 else value.cpu()
        return known[id(value)]
    return _inside(value, lambda each: kept(each, known))


def restored(value: Any, device: torch.device) -> Any:
    """What was kept, on a device."""
    if isinstance(value, _Bits):
        return value.mask(device)
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return _inside(value, lambda each: restored(each, device))


def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(change, value))
    if type(value) is dict:
        return {name: change(each) for name, each in value.items()}
    return value
