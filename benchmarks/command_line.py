"""What command lines of benchmarks may say. Paths and numbers are checked before anything expensive starts, and what a
user can mend ends in one line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.envelope import RESULTS
from offline_prune.settings import MAX_SPARSITY
from vllm_spense.errors import SpenseError

if TYPE_CHECKING:
    import torch


def run_main(main: Callable[[], None]) -> None:
    """Runs a program; a `SpenseError` ends it in one line, and so does a command that failed, which has said why."""
    try:
        main()
    except (SpenseError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))


def first_gpu() -> torch.device:
    """
    Raises:
        SpenseError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise SpenseError("this measures an NVIDIA GPU, and torch sees none")
    return torch.device("cuda", 0)


def add_out(parser: argparse.ArgumentParser, benchmark: str) -> None:
    """`--out`, a `result_file`, by default that of the benchmark."""
    # As text: argparse then checks the default too.
    parser.add_argument("--out", type=result_file, default=str(RESULTS / f"{benchmark}.json"), help="result file")


def result_file(text: str) -> Path:
    """A value of `--out`: a result file that may be replaced, or one that can be made.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    path = Path(text)
    try:
        if path.suffix == ".png":
            raise argparse.ArgumentTypeError(f"found {path}, expected a JSON file; a picture goes beside it")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: found a folder, expected a file")
        if not _is_there(path):
            _require_writable(path.parent)
        elif not os.access(path, os.W_OK):
            raise argparse.ArgumentTypeError(f"{path}: cannot be written")
        elif path.is_file() and path.stat().st_size and not _is_result(path):
            raise argparse.ArgumentTypeError(f"{path}: found a file that no benchmark wrote; expected a result file")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    return path


def writable_folder(text: str) -> Path:
    """A folder to write into, which may be still to be made.

    Raises:
        argparse.ArgumentTypeError: it is a file, or inside one, or cannot be written.
    """
    path = Path(text)
    try:
        _require_writable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    return path


def readable_folder(text: str) -> Path:
    """A folder to read.

    Raises:
        argparse.ArgumentTypeError: it is not there.
    """
    path = Path(text)
    try:
        # os.listdir, not is_dir: one that may not be read is said at once.
        os.listdir(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: cannot be read as a folder: {error.strerror}") from None
    return path


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number.

    Raises:
        argparse.ArgumentTypeError: from what it returns, for another text or a smaller number.
    """

    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {text}, expected a whole number") from None
        if found < least:
            raise argparse.ArgumentTypeError(f"found {found}, expected at least {least}")
        return found

    return number


positive = at_least(1)


def mlp_sparsity(text: str) -> float:
    """An MLP sparsity.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not 0 <= found <= MAX_SPARSITY:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number from 0 to {MAX_SPARSITY}")
    return found


def _require_writable(path: Path) -> None:
    """Writes a file that vanishes into the folder, or the nearest one above that is there.

    Raises:
        argparse.ArgumentTypeError, OSError: it cannot be.
    """
    nearest = next(each for each in (path, *path.parents) if _is_there(each))
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest}: found no folder, expected one to write into")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{nearest}: cannot be written: {error.strerror}") from None


def _is_there(path: Path) -> bool:
    """As os.path.lexists, but for names that no file can have, which raise OSError."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_result(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and isinstance(found.get("rows"), list)
