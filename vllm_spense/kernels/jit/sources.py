"""The source files of this package, as texts: what NVRTC compiles, and what makes searches go stale."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def digest(*texts: str) -> str:
    """A name for exactly these texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


@cache
def code_digest() -> str:
    """Of everything that decides what a search finds: all of this package.

    So plans are searched for anew after every update, rather than kept when a file that mattered was forgotten here.
    """
    return digest(*(text for name, text in sorted(_sources().items())))


def with_includes(name: str) -> dict[str, str]:
    """The texts of a CUDA file and of all that it includes, by file name; the file itself comes first."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = _sources()[file]
            waiting += _INCLUDE.findall(found[file])
    return found


@cache
def _sources() -> Mapping[str, str]:
    """By file name, for Python files by path."""
    found: dict[str, str] = {}
    for path, file in _walk(files("vllm_spense.kernels"), ""):
        name = file.name if file.name.endswith((".cu", ".cuh")) else path
        assert name not in found, f"two files are called {name}"
        found[name] = file.read_text(encoding="utf-8")
    return found


def _walk(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{path}{entry.name}/")
        elif entry.name.endswith((".py", ".cu", ".cuh")):
            yield path + entry.name, entry
