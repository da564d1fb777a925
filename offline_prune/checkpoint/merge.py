"""Many safetensors files into one, in room for one more part: each vanishes when its bytes are in the whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

#: The order in which safetensors lays tensors out: larger elements first, so that all are aligned.
_ORDER = (
    *("U64", "I64", "F64", "C64"),
    *("F32", "U32", "I32"),
    *("BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Header:
    """Of a safetensors file.

    Attributes:
        tensors: name → `dtype`, `shape` and `data_offsets`, from the end of the header.
        start: of the data, in bytes from the start of the file.
    """

    tensors: dict[str, dict[str, Any]]
    start: int

    @property
    def nbytes(self) -> int:
        """Of the data."""
        return max((tensor["data_offsets"][1] for tensor in self.tensors.values()), default=0)


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        ValueError: the file is not one, or not whole.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size - 8:
            raise ValueError(f"its header should have {length} bytes, the file has {size}")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    header = Header(tensors, 8 + length)
    if size != header.start + header.nbytes:
        raise ValueError(f"found {size} bytes, expected {header.start + header.nbytes}")
    return header


def merge(parts: Sequence[Path], whole: Path) -> None:
    """Moves the tensors of all parts into one file, the same to the byte as safetensors itself would write.

    May be called again after it was interrupted anywhere: a part that is not there any more is in `whole`.

    Raises:
        ValueError: a part is not a whole safetensors file.
    """
    left = [part for part in parts if part.exists()]
    if not left:
        return
    if len(left) == len(parts):
        _write_header(whole, [read_header(part) for part in parts])
    to = read_header(whole)
    with whole.open("r+b") as out:
        for part in left:
            header = read_header(part)
            with part.open("rb") as file:
                for name, tensor in header.tensors.items():
                    begin, end = tensor["data_offsets"]
                    file.seek(header.start + begin)
                    out.seek(to.start + to.tensors[name]["data_offsets"][0])
                    _copy(file, out, end - begin)
            out.flush()
            os.fsync(out.fileno())
            part.unlink()


def _write_header(whole: Path, headers: Sequence[Header]) -> None:
    """Creates the file with room for the data: a hole, which takes no room on the disk yet."""
    tensors = [item for header in headers for item in header.tensors.items()]
    merged: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors, key=lambda item: (_ORDER.index(item[1]["dtype"]), item[0])):
        begin, end = tensor["data_offsets"]
        merged[name] = {**tensor, "data_offsets": [offset, offset + end - begin]}
        offset += end - begin
    text = json.dumps(merged, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + offset)
        os.fsync(file.fileno())


def _copy(file: BinaryIO, out: BinaryIO, count: int) -> None:
    while count:
        chunk = file.read(min(count, _CHUNK))
        out.write(chunk)
        count -= len(chunk)
