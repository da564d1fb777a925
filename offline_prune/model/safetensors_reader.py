"""Reading a Hugging Face checkpoint's safetensors files lazily, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_spense.errors import SpenseError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def resolve_model(model: str) -> Path:
    """The local folder of `model`: itself if it is one, else a snapshot from the Hugging Face hub.

    Raises:
        SpenseError: neither a folder nor a model that the hub, or its local cache, has.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise SpenseError(f"{model} is a file; give the folder of a Hugging Face model, the one with config.json")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise SpenseError(f"{model}: no such folder (and not a hub name such as Qwen/Qwen3-32B)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpenseError(f"{model}: no such folder, and the Hugging Face hub did not give it: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SpenseError: the file is missing or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpenseError(f"{path.parent}: no {path.name}; is this the folder of a Hugging Face model?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpenseError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise SpenseError(f"{path}: found {type(data).__name__}, expected a JSON object")
    return data


class TensorFiles:
    """The tensors of a folder of safetensors files, by name; nothing is read before it is asked for.

    Raises:
        SpenseError: at construction, when there are no safetensors files, or one that the index names is missing
            or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / INDEX_NAME
        if index.exists():
            self._file_of: dict[str, str] = read_json(index).get("weight_map", {})
            for file in sorted(set(self._file_of.values())):
                self._handle(file)
        elif (folder / SINGLE_NAME).exists():
            self._file_of = dict.fromkeys(self._handle(SINGLE_NAME).keys(), SINGLE_NAME)
        else:
            others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".gguf", ".pt", ".pth"})
            hint = f"; found {', '.join(others[:3])}, convert them to safetensors first" if others else ""
            raise SpenseError(f"{folder}: no weights ({SINGLE_NAME} or {INDEX_NAME}){hint}")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when a file of weights is replaced."""
        files = [self.folder / file for file in sorted(set(self._file_of.values()))]
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._slice(name).get_dtype()]

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, in host memory.

        Raises:
            SpenseError: no such tensor.
        """
        if name not in self._file_of:
            raise SpenseError(f"{self.folder}: no tensor {name} in its safetensors files")
        try:
            return self._handle(self._file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise SpenseError(f"{self.file_of(name)}: cannot read {name}: {error}") from None

    def _slice(self, name: str) -> Any:
        return self._handle(self._file_of[name]).get_slice(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise SpenseError(f"{path}: missing, though {INDEX_NAME} names it") from None
            except (SafetensorError, OSError) as error:
                raise SpenseError(f"{path}: truncated or not a safetensors file: {error}") from None
        return self._open[file]
