"""Which module a module is in: vLLM tells a quantization method its layer's name, but nothing of what is around it."""

from __future__ import annotations

import weakref
from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

#: Module → where it was registered, first to last. Neither side is kept alive.
_parents: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, None]] = weakref.WeakKeyDictionary()
_registered = 0


@cache
def note_parents() -> None:
    """Makes modules be noted as they are registered in their parents. Idempotent."""
    register_module_module_registration_hook(_note_parent)


def _note_parent(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    global _registered
    _registered += 1
    if child is not None:
        _parents.setdefault(child, weakref.WeakKeyDictionary())[parent] = None


def parent_of(module: nn.Module | None) -> nn.Module | None:
    """The first module that a module was registered in, of those that hold it still: not a later slice of a
    `ModuleList`, which registers its layers anew, nor one that has another module in its place by now.

    Returns:
        None for a module that is in none, or was registered before `note_parents`.
    """
    noted = () if module is None else _parents.get(module, ())
    return next((parent for parent in noted if any(child is module for child in parent.children())), None)


def registered() -> int:
    """How often modules were registered since `note_parents`: while it stays the same, no model is built on."""
    return _registered
