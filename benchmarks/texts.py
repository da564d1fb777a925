"""Calibration and held-out texts of the accuracy benchmark: what Python installations carry, or files of a folder.

    python -m benchmarks.texts FOLDER

writes them to FOLDER as JSON lines, for a machine where other packages are installed: a benchmark that is given the
folder measures on the same text.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from offline_prune.calibration.data import BUILTIN_PACKAGES, HELDOUT_PACKAGES, docstrings, pack
from vllm_spense.errors import SpenseError

#: No calibration text comes from these parts of the standard library.
_CODE = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
Item = TypeVar("Item")
CALIBRATION = "calibration"
#: Held out, from the one most like the calibration text to the ones least like it.
DOMAINS = ("docstrings", "prose", "code")
#: Of each text; more than any benchmark reads.
_DOCUMENTS = 1000


def documents(name: str) -> Iterator[str]:
    """The documents of a text, in an order that is always the same.

    Args:
        name: `calibration` (docstrings of some packages) or a domain: `docstrings` (of other packages), `prose`
            (Python's language reference) or `code` (the standard library's, without docstrings and comments).
    """
    if name == "code":
        return _code()
    if name == "prose":
        return iter(_shuffled([topics[title] for title in sorted(topics)]))
    return docstrings(BUILTIN_PACKAGES if name == CALIBRATION else HELDOUT_PACKAGES, seed=0)


def heldout(
    domain: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, folder: Path | None
) -> torch.Tensor:
    """int64 (samples, length) of a domain, from this installation or from a folder that `write` filled.

    Raises:
        SpenseError: no such file, or too little text.
    """
    found = documents(domain) if folder is None else _read(folder / f"{domain}.jsonl")
    return pack(found, tokenizer, samples, length, domain)


def write(folder: Path) -> None:
    """One `NAME.jsonl` for each text, a document a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CALIBRATION, *DOMAINS):
        lines = [json.dumps({"text": text}) + "\n" for text in islice(documents(name), _DOCUMENTS)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _read(file: Path) -> Iterator[str]:
    if not file.is_file():
        raise SpenseError(f"{file}: no such file; `python -m benchmarks.texts {file.parent}` writes it")
    # Not `splitlines`: it also cuts at characters that JSON strings may hold.
    for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
        yield json.loads(line)["text"]


def _code() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in _shuffled(sorted(file for package in _CODE for file in (library / package).glob("*.py"))):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documented and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree)


def _shuffled(items: list[Item]) -> list[Item]:
    random.Random(0).shuffle(items)
    return items


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.texts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
