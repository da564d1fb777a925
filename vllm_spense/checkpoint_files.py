"""Reads what strangers wrote into a model folder: JSON objects, the index of shards, safetensors headers.

Nothing in such a file is believed: whatever is wrong with it becomes a `FormatError`, never another exception, and
nothing is waited for. Standard library only, so that reading a header costs nothing in a process without torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_spense.errors import FormatError, SpenseError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Bits of an element, by safetensors' name of the type.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

#: The limit of the safetensors format for its headers; an index of the largest models takes a tenth of it.
MAX_JSON_BYTES = 100_000_000
#: More than any configuration has, and less than where Python's own JSON functions give up.
MAX_DEPTH = 64
#: Of an integer: `float` of them, and products of several, stay finite.
MAX_DIGITS = 40

_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file describes it.

    Attributes:
        dtype: as safetensors spells it, a key of `DTYPE_BITS`.
        nbytes: as stored.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SpenseError: there is no such file.
        FormatError: it cannot be read, or holds something else than a JSON object of sane depth and numbers.
    """
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON_BYTES:
                raise FormatError(
                    "too large to be one", file=path, found=f"{size} bytes", expected=f"at most {MAX_JSON_BYTES}"
                )
            raw = file.read(MAX_JSON_BYTES)
    except FileNotFoundError:
        if not path.parent.exists():
            raise SpenseError(f"{path.parent}: no such folder") from None
        raise SpenseError(f"{path.parent}: no {path.name}; is this the folder of a Hugging Face model?") from None
    return parse_object(raw, path)


def parse_object(raw: bytes, file: object = None) -> dict[str, Any]:
    """The JSON object in UTF-8 text.

    Raises:
        FormatError: with `file` named.
    """
    try:
        text = raw.decode("utf-8")
        data = json.loads(text, parse_int=_parse_int)
        _limit_depth(data)
        if _LONE_SURROGATE.search(text):
            # Half a character, which no terminal and no file name can take.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise FormatError("not valid JSON", file=file, found="deeper nesting", expected=f"{MAX_DEPTH} levels") from None
    except ValueError as error:
        raise FormatError("not valid JSON", file=file, found=error, expected="a JSON object") from None
    if not isinstance(data, dict):
        raise FormatError("not a JSON object", file=file, found=type(data).__name__, expected="a JSON object")
    return data


def tensor_headers(folder: Path) -> dict[str, TensorHeader]:
    """The header of every tensor of a model, by name: of the files that its index names, or of its only file.

    Returns:
        Nothing where the folder has neither.

    Raises:
        FormatError: a file is missing, damaged, or cannot be read; index and files disagree.
    """
    index = folder / INDEX_NAME
    if _is_there(index):
        weight_map = _read_weight_map(index)
        headers = read_headers([folder / file for file in sorted(set(weight_map.values()))], named_by=INDEX_NAME)
        for name, file in weight_map.items():
            if name not in headers or headers[name].file.name != file:
                raise FormatError(
                    "the index names a tensor that the file does not hold",
                    file=index,
                    layer=name,
                    key="weight_map",
                    found=headers[name].file.name if name in headers else "nothing",
                    expected=file,
                )
        return headers
    return read_headers([folder / SINGLE_NAME]) if _is_there(folder / SINGLE_NAME) else {}


def read_headers(files: list[Path], named_by: str = "the folder") -> dict[str, TensorHeader]:
    """The header of every tensor in safetensors files, by name.

    Raises:
        FormatError: a file is missing, damaged, or cannot be read; a tensor is in two of them.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            found = _read_header(file)
        except FileNotFoundError:
            raise FormatError(
                "a weight file is missing", file=file, found="nothing", expected=f"a file, because {named_by} names it"
            ) from None
        for name, header in found.items():
            if name in headers:
                raise FormatError(
                    "a tensor is in two files", file=file, layer=name, found=headers[name].file, expected="one of them"
                )
            headers[name] = header
    return headers


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(
            "an index without its map",
            file=index,
            key="weight_map",
            found="nothing" if weight_map is None else type(weight_map).__name__,
            expected="an object: tensor name → file name",
        )
    for name, file in weight_map.items():
        plain = isinstance(file, str) and not {"/", "\\", "\0"} & set(file) and file.endswith(".safetensors")
        if not plain:
            raise FormatError(
                "not the name of a safetensors file in this folder",
                file=index,
                layer=name,
                key=f"weight_map.{name}",
                found=_brief(file),
                expected="a file name without folders, ending in .safetensors",
            )
    return weight_map


def _read_header(path: Path) -> dict[str, TensorHeader]:
    """
    Raises:
        FileNotFoundError: there is no such file.
        FormatError: anything else that is wrong with it.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise _damaged(path, f"{size} bytes", f"at least 8, and the header's {length if size >= 8 else 'length'}")
        entries = parse_object(file.read(length), path)
    headers, ends = {}, []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _read_entry(path, name, entry)
        nbytes = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
        if end - begin != nbytes:
            raise _damaged(path, f"{end - begin} bytes", f"{nbytes} for {dtype} {list(shape)}", name)
        headers[name] = TensorHeader(path, dtype, shape, nbytes)
        ends.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(ends):
        if begin != place:
            raise _damaged(path, f"data from byte {begin}", f"from byte {place}, where the last tensor ends", name)
        place = end
    if place != size - 8 - length:
        raise _damaged(path, f"{size - 8 - length} bytes of data", f"{place}, as the header says")
    return headers


def _read_entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, _brief(entry), "an object of dtype, shape, data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(
            "an unknown type of tensor", file=path, layer=name, found=_brief(dtype), expected=" | ".join(DTYPE_BITS)
        )
    if not _sizes(shape):
        raise _damaged(path, f"shape {_brief(shape)}", "a list of sizes", name)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"data_offsets {_brief(offsets)}", "where its bytes begin and end", name)
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _damaged(file: Path, found: object, expected: object, layer: str | None = None) -> FormatError:
    message = "a weight file is damaged: truncated, or not a safetensors file"
    return FormatError(message, file=file, layer=layer, found=found, expected=expected)


def _is_there(path: Path) -> bool:
    """Whether there is something by that name; what may not be looked at is there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """An ordinary file, open for reading.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is a pipe, a device, a folder, or it may not be read.
    """
    try:
        # A pipe would make an ordinary open, and everyone who called it, wait.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FormatError("not an ordinary file", file=path, found="a pipe or a device", expected="a file")
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            raise SpenseError(f"{path.parent}: found a file, expected the folder of a Hugging Face model") from None
        raise FormatError(
            "a file cannot be read", file=path, found=error.strerror or error, expected="a file that you may read"
        ) from None


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _limit_depth(data: object) -> None:
    """Raises RecursionError, as the parser itself does a little later."""
    level: list[object] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def _brief(value: object) -> str:
    return json.dumps(value)[:60]
