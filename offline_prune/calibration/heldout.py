"""Texts that every installation has and the built-in calibration text leaves out, to measure on without a download."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

from offline_prune.calibration.data import HELDOUT_PACKAGES, docstrings

#: From the one most like the built-in calibration text to the one least like it.
HELDOUT = ("docstrings", "reference", "code")
#: No calibration text comes from these parts of the standard library.
_CODE = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
Item = TypeVar("Item")


def heldout_documents(domain: str) -> Iterator[str]:
    """The documents of a held-out text, in an order that is always the same.

    Args:
        domain: `docstrings` (of packages that the built-in calibration text leaves out), `reference` (Python's language
            reference) or `code` (the standard library's, without docstrings and comments).
    """
    if domain == "code":
        return _code()
    if domain == "reference":
        return iter(_shuffled([topics[title] for title in sorted(topics)]))
    assert domain == "docstrings", domain
    return docstrings(HELDOUT_PACKAGES, seed=0)


def _code() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in _shuffled(sorted(file for package in _CODE for file in (library / package).glob("*.py"))):
        yield bare_code(ast.parse(file.read_text(encoding="utf-8")))


def bare_code(tree: ast.Module) -> str:
    """The code of a syntax tree, which is changed, without docstrings and comments."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _shuffled(items: list[Item]) -> list[Item]:
    random.Random(0).shuffle(items)
    return items
