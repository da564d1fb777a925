"""A checkpoint's tensors under the names that the model's modules have for them.

Files and modules name things differently where a model was published before its code: a language model inside a
multimodal one, above all. transformers knows both names. The pruner uses the modules' everywhere, and what it writes
has the files' again, so that every reader of the original reads the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from offline_prune.model.conversion import Conversion, Conversions
from offline_prune.model.prequantized import Fp8Weights
from offline_prune.model.safetensors_reader import SafetensorsReader
from vllm_spense.errors import SpenseError

#: How the name of an FP8 weight's scale differs from the weight's own.
_SCALE = "_scale"


@dataclass(frozen=True)
class Part:
    """One matrix inside a tensor of three dimensions.

    Attributes:
        whole: the files' name of the tensor.
        index: of its first dimension.
        rows: of the matrix, (N, K): those that belong to this part.
        columns: K.
        transposed: whether the tensor holds (K, N).
    """

    whole: str
    index: int
    rows: range
    columns: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.columns

    def of(self, matrices: torch.Tensor) -> torch.Tensor:
        """From the tensor's matrix of this index, (1, …) and complete."""
        matrix = matrices.squeeze(0)
        return (matrix.T if self.transposed else matrix)[self.rows.start : self.rows.stop].contiguous()

    def indices(self) -> tuple[slice, ...]:
        """What of the tensor is this part alone, (1, …)."""
        rows = slice(self.rows.start, self.rows.stop)
        first = slice(self.index, self.index + 1)
        return (first, slice(None), rows) if self.transposed else (first, rows)


class ModelTensors:
    """What `SafetensorsReader` has, under the modules' names. Weights stored in FP8 come multiplied by their scales.

    A tensor that is no parameter of the model, or only in another form (experts that the model stacks), keeps the
    files' name.

    Args:
        files: the checkpoint.
        model: the module tree.
        config: the checkpoint's config.json.
        dtype: of weights that are stored in FP8; None for the one that the config names.

    Attributes:
        conversions: what becomes of a tensor of any name.
        targets: name in the files → name of the parameter or buffer that it becomes, or a part of.
        converted: names in the files of tensors that become a part of one, or are otherwise not only renamed → how.

    Raises:
        SpenseError: FP8 weights without scales, or another quantization.
    """

    def __init__(
        self,
        files: SafetensorsReader,
        model: PreTrainedModel,
        config: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._files = files
        self.folder: Path = files.folder
        self.conversions = Conversions(model)
        self._parts: dict[str, Part] = {}
        self.targets, self.converted = _targets(files, self.conversions)
        self._fp8 = Fp8Weights(files, self.targets, config, dtype)
        self._stored = {
            self.targets[name] if name in self.targets and name not in self.converted else name: name
            for name in files
            if name not in self._fp8.hidden
        }

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def fingerprint(self) -> str:
        return self._files.fingerprint()

    @property
    def read_by_transformers(self) -> bool:
        """Whether transformers has a rule for the files' name of every tensor that it has a parameter for."""
        return not any(how.foreign for how in self.converted.values())

    def take_apart(self, parts: Mapping[str, Part]) -> None:
        """From here on, parts of the files' tensors stand for these, under names of their own; nothing is read.

        Args:
            parts: by names that `conversions` knows. Together they are the whole of each tensor.
        """
        wholes = {part.whole for part in parts.values()}
        self._stored = {name: stored for name, stored in self._stored.items() if stored not in wholes}
        for name, part in parts.items():
            to, how = self.conversions(name)
            assert how is not None, name
            self._stored[name], self._parts[name] = name, part
            self.targets[name], self.converted[name] = to, how
        for whole in wholes:
            del self.targets[whole]
            self.converted.pop(whole, None)

    def stored(self, name: str) -> str:
        """The files' name of a tensor, or of the scale of one, or of a module that has tensors."""
        if name in self._stored:
            return self._stored[name]
        if name.endswith(_SCALE) and (weight := name.removesuffix(_SCALE)) in self._stored:
            return self._stored[weight] + _SCALE
        for inside in (key for key in self._stored if key.startswith(f"{name}.")):
            rest, stored = inside.removeprefix(name), self._stored[inside]
            if stored.endswith(rest):
                return stored.removesuffix(rest)
        return name

    def named(self, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the files' names → by the modules'."""
        names = {self._stored[name]: name for name in self._stored}
        names |= {f"{file}{_SCALE}": f"{name}{_SCALE}" for file, name in names.items()}
        return {names.get(name, name): tensor for name, tensor in stored.items()}

    def place(self, name: str) -> str:
        """Where in the model a tensor belongs: its name, or that of the parameter which it becomes a part of."""
        return self.targets[name] if name in self.converted else name

    def known(self, name: str) -> bool:
        """Whether a tensor is a parameter or buffer of the model, or becomes a part of one."""
        return self._stored.get(name, name) in self.targets

    def parts_of(self, module: str) -> list[str]:
        """Tensors, by the files' names, that become parameters of a module."""
        hidden = self._fp8.hidden
        return [name for name, to in self.targets.items() if to.startswith(f"{module}.") and name not in hidden]

    def parts_of_parameter(self, parameter: str) -> list[str]:
        """Tensors, by the files' names, that a parameter is made of."""
        return [name for name, to in self.targets.items() if to == parameter and name not in self._fp8.hidden]

    def file_of(self, name: str) -> Path:
        return self._files.file_of(self._whole(self._in_files(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._in_files(name)
        return self._parts[stored].shape if stored in self._parts else self._files.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        whole = self._whole(self._in_files(name))
        return self._fp8.dtype if whole in self._fp8 else self._files.dtype(whole)

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as `read` returns it."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in host memory.

        Raises:
            SpenseError: no such tensor.
        """
        return self.read_stored(self._in_files(name))

    def _in_files(self, name: str) -> str:
        if name not in self._stored:
            raise SpenseError(f"{self.folder}: no tensor {name} in its safetensors files")
        return self._stored[name]

    def _whole(self, stored: str) -> str:
        """The tensor that holds one of the files' names."""
        return self._parts[stored].whole if stored in self._parts else stored

    def read_stored(self, name: str) -> torch.Tensor:
        """The tensor of a name in the files."""
        if name not in self._parts:
            return self._fp8.read(name) if name in self._fp8 else self._files.read(name)
        part = self._parts[name]
        if part.whole in self._fp8:
            return part.of(self._fp8.read(part.whole, part.index))
        found = self._files.read(part.whole, part.indices()).squeeze(0)
        return found.T.contiguous() if part.transposed else found


def _targets(files: SafetensorsReader, conversions: Conversions) -> tuple[dict[str, str], dict[str, Conversion]]:
    """Names in the files → in the model, and how those are converted that are not only renamed on the way."""
    targets: dict[str, str] = {}
    converted: dict[str, Conversion] = {}
    for name in sorted(files, key=dot_natural_key):
        to, how = conversions(name)
        if to in conversions.places:
            targets[name] = to
            if how is not None:
                converted[name] = how
    return targets, converted
