"""Reading a Hugging Face checkpoint's safetensors files lazily, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from offline_prune.model.companions import DOWNLOADED, NOT_DOWNLOADED
from vllm_spense import hub
from vllm_spense.checkpoint_files import INDEX_NAME, SINGLE_NAME, TensorHeader, tensor_headers
from vllm_spense.errors import FormatError, SpenseError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
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
    if not hub.is_hub_name(model):
        raise SpenseError(f"{model}: no such folder (and not a hub name such as {hub.EXAMPLE})")
    missing = f"{model}: no such folder, and"
    return hub.snapshot(model, missing, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED))


class SafetensorsReader:
    """The tensors of a folder of safetensors files, by name; no tensor is read before it is asked for.

    Attributes:
        headers: of all tensors.

    Raises:
        SpenseError: at construction, when there are no safetensors files, or what `tensor_headers` raises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self.headers: Mapping[str, TensorHeader] = tensor_headers(folder)
        if not self.headers:
            others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".gguf", ".pt", ".pth"})
            hint = f"; found {', '.join(others[:3])}, convert them to safetensors first" if others else ""
            raise SpenseError(f"{folder}: no weights ({SINGLE_NAME} or {INDEX_NAME}){hint}")

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when a file of weights is replaced."""
        files = sorted({header.file for header in self.headers.values()})
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self.headers[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        return self.headers[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """
        Raises:
            FormatError: PyTorch has no such type.
        """
        header = self.headers[name]
        if header.dtype not in _DTYPES:
            raise FormatError(
                "PyTorch cannot hold this type of tensor",
                file=header.file,
                layer=name,
                found=header.dtype,
                expected=" | ".join(_DTYPES),
            )
        return _DTYPES[header.dtype]

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored."""
        return self.headers[name].nbytes

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor as stored, in host memory.

        Args:
            part: of its dimensions, from the first on; nothing else of the file is read.

        Raises:
            SpenseError: no such tensor.
        """
        if name not in self.headers:
            raise SpenseError(f"{self.folder}: no tensor {name} in its safetensors files")
        self.dtype(name)
        file = self.file_of(name)
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            opened = self._open[file]
            return opened.get_tensor(name) if part is None else opened.get_slice(name)[part]
        except (SafetensorError, OSError) as error:
            raise SpenseError(f"{file}: cannot read {name}: {error}") from None
