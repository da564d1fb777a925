"""Text of Python files: the docstrings of installed packages, and their code without docstrings and comments."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import random
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Characters of one file's code, so that a few tables of numbers do not make up much of a text.
LONGEST_CODE = 20_000
#: Levels of a syntax tree whose code is written. `ast.unparse` recurses, four calls a level and more, and Python stops
#: it at a depth that depends on the caller's own; torch's deepest files have below a hundred levels.
_MOST_LEVELS = 120
_SHORTEST_DOCSTRING = 200


def docstrings(packages: Iterable[str], seed: int) -> Iterator[str]:
    """The docstrings of installed packages, one Python file's after another's, files in random order."""
    for path in python_files(packages, seed):
        if text := docstrings_of(path):
            yield text


def code(packages: Iterable[str], seed: int) -> Iterator[str]:
    """The code of installed packages as `bare_code` has it, a file after another, in the order of `docstrings`.

    A file is cut to `LONGEST_CODE` characters.
    """
    for path in python_files(packages, seed):
        if (tree := parsed(path)) and (text := bare_code(tree)):
            yield text[:LONGEST_CODE]


def installed(packages: Iterable[str]) -> dict[str, Path]:
    """Package → its folder, of those that are installed."""
    specs = {package: importlib.util.find_spec(package) for package in packages}
    return {package: Path(spec.origin).parent for package, spec in specs.items() if spec and spec.origin}


def python_files(packages: Iterable[str], seed: int) -> list[Path]:
    """All Python files of installed packages, in random order; packages that are not installed have none."""
    files = [file for folder in installed(packages).values() for file in folder.rglob("*.py")]
    files.sort(key=lambda path: path.parts[-4:])
    random.Random(seed).shuffle(files)
    return files


def docstrings_of(path: Path) -> str:
    """The longer docstrings of a Python file, an empty line between them."""
    tree = parsed(path)
    return "\n\n".join(_long_docstrings(tree)) if tree else ""


def parsed(path: Path) -> ast.Module | None:
    """A Python file's syntax tree, or None: packages ship templates and tests of broken files.

    Besides syntax errors, these are other encodings, null bytes (a `ValueError`), and expressions too deep for Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError):
        return None


def bare_code(tree: ast.Module) -> str:
    """The code of a syntax tree, which is changed, without docstrings and comments; none of a very deep one."""
    level: list[ast.AST] = [tree]
    for _ in range(_MOST_LEVELS):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        return ""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _long_docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield inspect.cleandoc(text)
