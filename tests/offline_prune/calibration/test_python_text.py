"""Docstrings and code of installed packages: what is kept of a file, and which files are left out."""

from __future__ import annotations

import ast
from itertools import islice
from pathlib import Path

import pytest

from offline_prune.calibration.data import BUILTIN_PACKAGES
from offline_prune.calibration.python_text import LONGEST_CODE, bare_code, code, docstrings, parsed, python_files

DOCSTRING = "It says so." * 20
SOURCE = f"""#!/usr/bin/env python
'''{DOCSTRING}'''
import os  # for a name

class A:
    '''Short.'''

    def name( self ):
        # A comment.
        return (os.name)
"""
BARE = """import os

class A:

    def name(self):
        return os.name"""

#: As deep as code may be, nearly.
NESTED = f"y = {'[' * 110}{']' * 110}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str]:
    """Installed, with files of every kind."""
    folder = tmp_path / "spense_test_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "source.py").write_text(SOURCE)
    (folder / "long.py").write_text("\n".join(f"x{i} = {i}" for i in range(5000)))
    (folder / "sum.py").write_text("y = " + " + ".join("1" * 400))
    (folder / "deep.py").write_text("y = " + "[" * 180 + "]" * 180)
    (folder / "nested.py").write_text(NESTED)
    (folder / "broken.py").write_text("def {{ name }}():")
    (folder / "null.py").write_bytes(b"x = 1\0")
    (folder / "other.py").write_bytes("s = 'ä'".encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    return (folder.name,)


def test_code_is_what_is_left_without_docstrings_and_comments(package: tuple[str]) -> None:
    assert bare_code(ast.parse(SOURCE)) == BARE
    assert bare_code(ast.parse(f"'{DOCSTRING}'")) == "pass"
    assert list(docstrings(package, 0)) == [DOCSTRING]


def test_no_file_is_too_long_too_deep_or_broken(package: tuple[str]) -> None:
    """Nor does it depend on how deep the caller is what is left out."""

    def found(deep: int) -> list[str]:
        return found(deep - 1) if deep else list(code(package, 0))

    texts = found(0)
    assert found(250) == texts
    assert sorted(map(len, texts)) == sorted([len(BARE), LONGEST_CODE, len(NESTED)])
    assert {BARE, NESTED} < set(texts)
    names = {path.name for path in python_files(package, 0) if parsed(path) is None}
    assert names >= {"broken.py", "null.py", "other.py"}


def test_the_order_is_the_seeds_and_that_of_the_docstrings(package: tuple[str]) -> None:
    orders = {tuple(path.name for path in python_files(package, seed)) for seed in range(9)}
    assert len(orders) > 4
    assert list(code(package, 3)) == list(code(package, 3))
    files = iter(python_files(BUILTIN_PACKAGES, 5))
    for text in islice(code(BUILTIN_PACKAGES, 5), 20):
        assert any((tree := parsed(file)) and bare_code(tree)[:LONGEST_CODE] == text for file in files)


def test_packages_that_are_not_installed_have_no_text() -> None:
    assert not list(code(("no_such_package",), 0))
    assert not list(docstrings(("no_such_package",), 0))
