"""Rows of calibration data: from files, folders of files, and Hugging Face data sets, in random order.

Of a file only an index is in memory; rows are read when their turn comes.
"""

from __future__ import annotations

import array
import codecs
import json
import os
import random
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vllm_spense.errors import SpenseError, first_line

FILE_KINDS = (".jsonl", ".txt", ".parquet")
#: Endings of other files with text.
_OTHER_KINDS = (".json", ".csv", ".tsv", ".md", ".arrow", ".gz", ".zst", ".zip")

#: A passage of a text file has about as many bytes as a sequence of calibration text, at so many a token, but at least:
_BYTES_PER_TOKEN, _SHORTEST_PASSAGE = 4, 2048
#: Passages end at the first line break, else the first space, in so many bytes.
_SEAM = 1024
_CHUNK = 2**20


class Rows(Protocol):
    """Rows that can be read one by one."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[str, Any]:
        """Where a row stands, for messages, and the row."""


def shuffled_rows(source: str, seed: int, length: int) -> Iterator[tuple[str, Any]]:
    """All rows of a source, in an order drawn from the seed.

    Args:
        source: a `.jsonl`, `.txt` or `.parquet` file, a folder with such files, or the name of a Hugging Face data set.
        length: tokens of a sequence, after which text files are cut into passages.

    Yields:
        Where the row stands, such as `FILE, line 3`, and the row: a string, or what JSON or a table holds.

    Raises:
        SpenseError: no such source, or a damaged one; names file and line.
    """
    path = Path(source)
    require_source(source)
    # Not the Path's own tests: they raise where a folder above may not be entered.
    if os.path.isdir(source):
        parts = [_file(file, length) for file in _files(path)]
    elif os.path.exists(source):
        parts = [_file(path, length)]
    else:
        parts = [_HubRows(source)]
    ends = list(accumulate(len(part) for part in parts))
    order = array.array("q", range(ends[-1]))
    random.Random(seed).shuffle(order)
    for index in order:
        part = bisect_right(ends, index)
        yield parts[part].read(index - ends[part] + len(parts[part]))


def require_source(source: str) -> None:
    """Raises SpenseError for what is plainly a file or a folder, not a data set, and is not there."""
    if not source.strip():
        raise SpenseError(f"--calibration: found nothing, expected a {', '.join(FILE_KINDS)} file or a data set")
    path, ending = Path(source), source.lower()
    # A data set's name may end as files do, but a file of these kinds would not be read anyway.
    other = ending.endswith(_OTHER_KINDS) and (path == Path(path.name) or os.path.isdir(path.parent))
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or ending.endswith(FILE_KINDS) or other:
        require_path(path)


def require_path(path: Path, expected: str = "") -> None:
    """Raises SpenseError where there is nothing, or it cannot be read.

    Args:
        expected: what should be there, for the message.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise SpenseError(f"{path}: no such file or folder{expected and f'; expected {expected}'}") from None
    except OSError as error:
        raise SpenseError(f"{path}: cannot be read: {error.strerror}") from None


def _files(folder: Path) -> list[Path]:
    """The files of a folder that hold rows, at any depth; not hidden ones, as caches are."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in FILE_KINDS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise SpenseError(f"{folder}: found no {', '.join(FILE_KINDS)} file in this folder")
    return found


def _file(path: Path, length: int) -> Rows:
    kind = path.suffix.lower()
    require_path(path)
    if not path.is_file() or kind not in FILE_KINDS:
        found = f"a {kind or 'nameless'} file" if path.is_file() else "something that is no file"
        raise SpenseError(f"{path}: found {found}, expected {', '.join(FILE_KINDS)}")
    if kind == ".parquet":
        return _ParquetRows(path)
    return _JsonLines(path) if kind == ".jsonl" else _Passages(path, max(_SHORTEST_PASSAGE, _BYTES_PER_TOKEN * length))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise SpenseError(f"{path}: cannot be read: {error.strerror}") from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> SpenseError:
    return SpenseError(f"{where}: not UTF-8 text: {error.reason} 0x{error.object[error.start]:02x}")


class _JsonLines:
    """One JSON value a line; all are checked at the start. Only a line feed, not Unicode's separators, ends a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers, self._offsets = array.array("q"), array.array("q")
        offset = 0
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    self._parse(line, number)
                    self._numbers.append(number)
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> tuple[str, Any]:
        with _open(self._path) as file:
            file.seek(self._offsets[index])
            number = self._numbers[index]
            return f"{self._path}, line {number}", self._parse(file.readline(), number)

    def _parse(self, line: bytes, number: int) -> Any:
        where = f"{self._path}, line {number}"
        try:
            return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        except RecursionError:
            raise SpenseError(f"{where}: not valid JSON: nested too deep") from None
        except ValueError as error:
            raise SpenseError(f"{where}: not valid JSON: {error}") from None


class _ParquetRows:
    """A table, in Arrow's memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            self._table = pyarrow.parquet.read_table(path)
        except PermissionError as error:
            raise SpenseError(f"{path}: cannot be read: {error.strerror}") from None
        except (pyarrow.ArrowException, OSError) as error:
            raise SpenseError(f"{path}: not a parquet file, or a damaged one: {first_line(error)}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, index: int) -> tuple[str, Any]:
        where = f"{self._path}, row {index + 1}"
        try:
            return where, self._table.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None


class _HubRows:
    """The `train` split of a data set."""

    def __init__(self, name: str) -> None:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        self._name = name
        try:
            self._rows: Any = load_dataset(name, split="train")
        # RuntimeError: data sets that are a script.
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise SpenseError(
                f"calibration data {name}: neither a file nor a data set that can be loaded: {first_line(error)}\n"
                f"Without a network, give a {', '.join(FILE_KINDS)} file, or `--calibration builtin`."
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[str, Any]:
        return f"{self._name}, row {index + 1}", self._rows[index]


class _Passages:
    """A text file cut into passages of about equal size, at line breaks where there are any.

    Where passage i ends depends on the bytes around it alone, so it is read without those before it.

    Args:
        size: of a passage, in bytes; more than `_SEAM`.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._bytes = path.stat().st_size
        self._check()

    def __len__(self) -> int:
        return -(-self._bytes // self._size)

    def read(self, index: int) -> tuple[str, Any]:
        with _open(self._path) as file:
            start, end = self._seam(file, index), self._seam(file, index + 1)
            file.seek(start)
            text = file.read(end - start).decode("utf-8-sig" if index == 0 else "utf-8")
        where = f"{self._path}, bytes {start} to {end}"
        return where, text.replace("\r\n", "\n").replace("\r", "\n")

    def _seam(self, file: BinaryIO, index: int) -> int:
        """The byte at which a passage begins."""
        place = index * self._size
        if index == 0 or place >= self._bytes:
            return min(place, self._bytes)
        file.seek(place)
        window = file.read(_SEAM)
        for mark in (b"\n", b" "):
            if mark in window:
                return place + window.index(mark) + 1
        # Bytes 0b10xxxxxx continue a character.
        return place + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), len(window))

    def _check(self) -> None:
        """Raises SpenseError, which names the line, where the file is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        lines = 1
        with _open(self._path) as file:
            while True:
                chunk = file.read(_CHUNK)
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    # What it was given is the chunk after the bytes of an unfinished character, which end no line.
                    lines += error.object[: error.start].count(b"\n")
                    raise _not_utf8(f"{self._path}, line {lines}", error) from None
                if not chunk:
                    return
                lines += chunk.count(b"\n")
