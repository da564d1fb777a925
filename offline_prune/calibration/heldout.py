"""Texts that every installation has and the built-in calibration texts leave out, to measure on without a download."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

from offline_prune.calibration.data import HELDOUT_PACKAGES
from offline_prune.calibration.python_text import bare_code, docstrings

#: From the one most like `builtin` to the one least like it. `builtin-code` is like the last.
HELDOUT = ("docstrings", "reference", "code")
#: No calibration text comes from these parts of the standard library.
_CODE = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
Item = TypeVar("Item")


def heldout_documents(domain: str) -> Iterator[str]:
    """The documents of a held-out text, in an order that is always the same.

    Args:
        domain: `docstrings` (of packages that the built-in calibration texts leave out), `reference` (Python's language
            reference) or `code` (the standard library's, without docstrings and comments).
    """
    if domain == "code":
        return _code()
    if domain == "reference":
        return iter(_shuffled([topics[title] for title in sorted(topics)]))
    assert domain == "docstrings", domain
    return docstrings(HELDOUT_PACKAGES, seed=0)


def code_files() -> list[Path]:
    """The files of `code`, in order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return _shuffled(sorted(file for package in _CODE for file in (library / package).glob("*.py")))


def _code() -> Iterator[str]:
    for file in code_files():
        yield bare_code(ast.parse(file.read_text(encoding="utf-8")))


def _shuffled(items: list[Item]) -> list[Item]:
    random.Random(0).shuffle(items)
    return items
