"""Calibration and held-out texts of the accuracy benchmark: what Python installations and Debian carry, or files.

    python -m benchmarks.texts FOLDER

writes them to FOLDER as JSON lines, for a machine where other packages are installed: a benchmark that is given the
folder measures on the same text. `--training` also writes what `python -m benchmarks.tiny_moe` trains on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.command_line import run_main, writable_folder
from offline_prune.calibration.data import BUILTIN_PACKAGES, pack
from offline_prune.calibration.heldout import HELDOUT, heldout_documents
from offline_prune.calibration.python_text import (
    LONGEST_CODE,
    bare_code,
    code,
    docstrings,
    docstrings_of,
    parsed,
    python_files,
)
from scripts.lock import locked
from scripts.pruned import CACHE
from vllm_spense.errors import SpenseError

CALIBRATION, CALIBRATION_CODE = "calibration", "calibration-code"
TRAINING = "training"
HANDBOOK = "handbook"
#: Held out, from the one most like `calibration` on; `calibration-code` is like `code`.
DOMAINS = (*HELDOUT, HANDBOOK)
#: Of each text; more than any benchmark reads. A default run of `heal` takes 1.6 million tokens of each calibration
#: text, and docstrings are shorter than code.
_DOCUMENTS, _DOCSTRINGS = 1000, 2000
#: None of them is in a held-out text; the calibration texts' are.
TRAINING_PACKAGES = (*BUILTIN_PACKAGES, "scipy", "sklearn", "sympy", "networkx", "nltk", "vllm", "fontTools", "pyarrow")
#: Of all training text, and of one document of it.
_TRAINING_CHARACTERS, _LONGEST = 36_000_000, LONGEST_CODE
#: English prose about something else than Python: The Debian Administrator's Handbook.
_PACKAGE, _PAGES = "debian-handbook", "usr/share/doc/debian-handbook/html/en-US"


def documents(name: str) -> Iterator[str]:
    """The documents of a text, in an order that is always the same.

    Args:
        name: `calibration` (docstrings of some packages), `calibration-code` (code of the same, without docstrings and
            comments), `training` (both of more packages), or a domain: `handbook` (Debian's, its paragraphs without
            listings), or as `heldout_documents` has it.

    Raises:
        SpenseError: `handbook` on a machine that cannot download Debian's packages.
    """
    if name == CALIBRATION:
        return docstrings(BUILTIN_PACKAGES, seed=0)
    if name == CALIBRATION_CODE:
        return code(BUILTIN_PACKAGES, seed=0)
    if name == TRAINING:
        return _training()
    return _handbook(CACHE / _PACKAGE) if name == HANDBOOK else heldout_documents(name)


def heldout(
    domain: str, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, folder: Path | None
) -> torch.Tensor:
    """int64 (samples, length) of a domain, from this installation or from a folder that `write` filled.

    Raises:
        SpenseError: no such file, or too little text.
    """
    return pack(documents_in(folder, domain), tokenizer, samples, length, domain)


def documents_in(folder: Path | None, name: str) -> Iterator[str]:
    """As `documents`, or from a folder that `write` filled.

    Raises:
        SpenseError: no such file.
    """
    require(folder, [name])
    return documents(name) if folder is None else _read(folder / f"{name}.jsonl")


def require(folder: Path | None, names: Iterable[str]) -> None:
    """What a program begins with, or it would miss the last of its texts after hours.

    Args:
        folder: that `write` filled, an older version's too, or None for this installation.
        names: of all texts that the program reads.

    Raises:
        SpenseError: the folder lacks some.
    """
    missing = [name for name in dict.fromkeys(names) if folder and not (folder / f"{name}.jsonl").is_file()]
    if missing:
        option = " --training" if TRAINING in missing else ""
        raise SpenseError(
            f"{folder}: found no {', '.join(f'{name}.jsonl' for name in missing)}; expected what "
            f"`python -m benchmarks.texts {folder}{option}` writes"
        )


def write(folder: Path, training: bool = False) -> None:
    """One `NAME.jsonl` for each text, a document a line.

    Args:
        training: the training text too, which is much longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CALIBRATION, CALIBRATION_CODE, *DOMAINS, *([TRAINING] if training else [])):
        most = _DOCSTRINGS if name == CALIBRATION else _DOCUMENTS
        found = documents(name) if name == TRAINING else islice(documents(name), most)
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in found)


def _training() -> Iterator[str]:
    left = _TRAINING_CHARACTERS
    for path in python_files(TRAINING_PACKAGES, seed=0):
        tree = parsed(path)
        if tree is None:
            continue
        for text in filter(None, (docstrings_of(path), bare_code(tree))):
            yield text[: min(left, _LONGEST)]
            left -= min(len(text), _LONGEST)
            if left <= 0:
                return


def _read(file: Path) -> Iterator[str]:
    # Not `splitlines`: it also cuts at characters that JSON strings may hold.
    for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
        yield json.loads(line)["text"]


def _handbook(folder: Path) -> Iterator[str]:
    """Its sections, by file name; the package is downloaded into the folder unless it is there."""
    with locked(folder):
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".unfinished")
            unfinished.mkdir(parents=True, exist_ok=True)
            try:
                subprocess.run(["apt-get", "download", _PACKAGE], cwd=unfinished, check=True, capture_output=True)
                (package,) = unfinished.glob("*.deb")
                subprocess.run(["dpkg-deb", "--extract", package.name, "."], cwd=unfinished, check=True)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                raise SpenseError(
                    f"{HANDBOOK}: `apt-get download {_PACKAGE}` does not work here: {error}; leave it out of "
                    "--domains, or give a folder that `python -m benchmarks.texts` wrote on Debian"
                ) from None
            package.unlink()
            unfinished.rename(folder)
    for page in sorted((folder / _PAGES).glob("*.html")):
        if text := paragraphs(page.read_text(encoding="utf-8")):
            yield text


def paragraphs(page: str) -> str:
    """The text of a DocBook page's paragraphs, an empty line between them."""
    reader = _Paragraphs()
    reader.feed(page)
    return "\n\n".join(" ".join(text.split()) for text in reader.found if text.strip())


class _Paragraphs(HTMLParser):
    """Collects what stands in `<div class="para">`, but no listings inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        paragraph = tag == "div" and ("class", "para") in attrs
        if paragraph and not self._inside:
            self.found.append("")
        if paragraph or (self._inside and tag in ("div", "pre")):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and "pre" not in self._inside:
            self.found[-1] += data


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.texts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=writable_folder, help="to write into")
    parser.add_argument("--training", action="store_true")
    options = parser.parse_args()
    write(options.folder, options.training)


if __name__ == "__main__":
    run_main(main)
