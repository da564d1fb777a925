"""Which module a module is in: vLLM tells a quantization method its layer's name, but nothing of what is around it."""

from __future__ import annotations

import weakref
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_registered = 0


@cache
def note_parents() -> None:
    """Makes modules be noted as they are registered in their parents. Idempotent."""
    register_module_module_registration_hook(_note_parent)


def _note_parent(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    global _registered
    _registered += 1
    if child is not None:
        _parents[child] = weakref.ref(parent)


def parent_of(module: nn.Module | None) -> nn.Module | None:
    """None for a module that is in none, or was registered before `note_parents`."""
    noted = None if module is None else _parents.get(module)
    return None if noted is None else noted()


def registered() -> int:
    """How often modules were registered since `note_parents`: while it stays the same, no model is built on."""
    return _registered
