"""What strangers wrote into a model folder: read, or refused in one clear sentence, and never waited for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offline_prune.model.safetensors_reader import SafetensorsReader
from vllm_spense import checkpoint_files
from vllm_spense.checkpoint_files import (
    DTYPE_BITS,
    INDEX_NAME,
    SINGLE_NAME,
    read_headers,
    read_object,
    tensor_headers,
)
from vllm_spense.errors import FormatError, SpenseError


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A file by hand, with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "c": torch.tensor(1.5),
        "d": torch.zeros(0, 7, dtype=torch.uint16),
    }
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    files = SafetensorsReader(tmp_path)
    assert {name: (files.dtype(name), files.shape(name), files.nbytes(name)) for name in files} == {
        name: (value.dtype, tuple(value.shape), value.nbytes) for name, value in tensors.items()
    }
    for name, value in tensors.items():
        assert torch.equal(files.read(name), value)


def test_a_folder_without_weights_has_no_headers(tmp_path: Path) -> None:
    assert tensor_headers(tmp_path) == {}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "damaged.*found: 0 bytes"),
        (b"\xff" * 7, "damaged.*found: 7 bytes"),
        (b"\xff" * 64, "damaged.*header's 18446744073709551615"),
        (safetensors({"a": tensor()}, b"1234")[:-1], "damaged.*3 bytes of data; expected: 4"),
        (safetensors({"a": tensor()}, b"12345"), "damaged.*5 bytes of data; expected: 4"),
        (safetensors(b"[1]"), "not a JSON object.*found: list"),
        (safetensors(b"{"), "not valid JSON"),
        (safetensors(b"\xff\xfe"), "not valid JSON"),
        (safetensors({"a": 1}), "damaged.*layer: a; found: 1"),
        (safetensors({"a": {"dtype": "U8"}}), "damaged.*layer: a"),
        (safetensors({"a": tensor(dtype="U7")}, b"1234"), "unknown type.*layer: a; found: .U7"),
        (safetensors({"a": tensor(dtype=8)}, b"1234"), "unknown type"),
        (safetensors({"a": tensor(dtype=["U8"])}, b"1234"), "unknown type"),
        (safetensors({"a": tensor(shape=4)}, b"1234"), "damaged.*shape 4"),
        (safetensors({"a": tensor(shape=[-4])}, b"1234"), "damaged.*shape"),
        (safetensors({"a": tensor(shape=[4.0])}, b"1234"), "damaged.*shape"),
        (safetensors({"a": tensor(shape=[True])}, b"1"), "damaged.*shape"),
        (safetensors({"a": tensor(shape=[5])}, b"1234"), r"damaged.*4 bytes; expected: 5 for U8 \[5\]"),
        (safetensors({"a": tensor(shape=[10**39, 10**39])}, b"1234"), "damaged"),
        (safetensors({"a": tensor(offsets=[4, 0])}, b"1234"), "damaged.*data_offsets"),
        (safetensors({"a": tensor(offsets=[0])}, b"1234"), "damaged.*data_offsets"),
        (safetensors({"a": tensor(offsets=None)}, b"1234"), "damaged.*data_offsets"),
        (safetensors({"a": tensor(), "b": tensor()}, b"1234"), "damaged.*layer: b; found: data from byte 0"),
        (safetensors({"a": tensor(), "b": tensor(offsets=[5, 9])}, b"123456789"), "damaged.*layer: b"),
    ],
)
def test_damaged_weights(raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(raw)
    with pytest.raises(FormatError, match=words) as caught:
        tensor_headers(tmp_path)
    assert caught.value.file == str(tmp_path / SINGLE_NAME)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_type_is_read_or_refused_by_name(dtype: str, tmp_path: Path) -> None:
    raw = safetensors({"a": tensor(dtype, [8], [0, DTYPE_BITS[dtype]])}, bytes(DTYPE_BITS[dtype]))
    (tmp_path / SINGLE_NAME).write_bytes(raw)
    files = SafetensorsReader(tmp_path)
    assert files.nbytes("a") == DTYPE_BITS[dtype]
    if dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        with pytest.raises(FormatError, match=rf"cannot hold.*layer: a; found: {dtype}"):
            files.read("a")
    else:
        assert files.read("a").dtype == files.dtype("a")


def index(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "without its map.*key: weight_map; found: nothing"),
        ([], "without its map.*found: list"),
        ({"a": None}, "not the name of a safetensors file"),
        ({"a": ["a.safetensors"]}, "not the name of a safetensors file"),
        ({"a": "../a.safetensors"}, "not the name of a safetensors file.*found: .../a.safetensors"),
        ({"a": "/etc/a.safetensors"}, "not the name of a safetensors file"),
        ({"a": "a\0.safetensors"}, "not the name of a safetensors file"),
        ({"a": "config.json"}, "not the name of a safetensors file"),
        ({"a": f"{'a' * 300}.safetensors"}, "cannot be read.*too long"),
        ({"a": "b.safetensors"}, "weight file is missing.*index.json names it"),
        ({"z": "a.safetensors"}, "does not hold.*layer: z; key: weight_map; found: nothing; expected: a.safetensors"),
        ({"a": "a.safetensors", "b": "copy.safetensors"}, "in two files.*layer: a"),
        ({"a": "pipe.safetensors"}, "not an ordinary file"),
        ({"a": "folder.safetensors"}, "cannot be read.*directory"),
    ],
)
def test_bad_indexes(weight_map: Any, words: str, tmp_path: Path) -> None:
    for name in ("a", "copy"):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors({"a": tensor()}, b"1234"))
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    start = time.monotonic()
    for read in (tensor_headers, SafetensorsReader):
        with pytest.raises(FormatError, match=words):
            read(index(tmp_path, weight_map))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object.*found: list; expected: a JSON object"),
        (b"{" * 100_000, "not valid JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper nesting; expected: 64 levels"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "deeper nesting"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
        (b'{"a": ' + b"9" * 41 + b"}", "an integer of 41 digits"),
        (b'{"a": "\\ud800"}', "not valid JSON.*surrogates"),
        (b"\xef\xbb\xbf{}", "not valid JSON.*BOM"),
        (b'{"a": "\xff"}', "not valid JSON"),
    ],
)
def test_bad_json(raw: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(raw)
    with pytest.raises(FormatError, match=words) as caught:
        read_object(file)
    assert caught.value.file == str(file)


def test_unusual_json_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"limit": [0.0, Infinity], "face": "\\ud83d\\ude00", "huge": 1000000000000000019884624838656}')
    assert read_object(file) == {"limit": [0.0, float("inf")], "face": "😀", "huge": 10**30 + 19884624838656}


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(checkpoint_files.MAX_JSON_BYTES + 1)
    with pytest.raises(FormatError, match=r"too large.*found: 100000001 bytes"):
        read_object(tmp_path / "config.json")


@pytest.mark.parametrize("read", [read_object, lambda path: read_headers([path])])
def test_what_may_not_be_read_is_not_called_missing(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes do not stop the superuser, whom these tests may run as."""
    file = tmp_path / "file"
    file.write_bytes(b"{}")

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FormatError, match=r"cannot be read \(file: .*/file; found: Permission denied"):
        read(file)


def test_weights_that_may_not_be_looked_for_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    for call in ("open", "lstat"):
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(FormatError, match=r"cannot be read .*index\.json; found: Permission denied"):
        tensor_headers(tmp_path)


def test_a_dangling_link_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).symlink_to(tmp_path / "blob")
    with pytest.raises(FormatError, match="a weight file is missing"):
        tensor_headers(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_the_place_of_a_file(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(FormatError, match=r"not an ordinary file|cannot be read"):
        read_object(tmp_path / "config.json")


def test_what_is_missing_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(SpenseError, match=r"no config\.json; is this the folder"):
        read_object(tmp_path / "config.json")
    with pytest.raises(SpenseError, match=r"missing: no such folder$"):
        read_object(tmp_path / "missing/config.json")
    (tmp_path / "file").touch()
    with pytest.raises(SpenseError, match="file: found a file, expected the folder"):
        read_object(tmp_path / "file/config.json")
