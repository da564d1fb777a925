"""Writing a checkpoint: part by part into a hidden folder, moved to OUT when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors import SafetensorError
from safetensors.torch import save, save_file

from offline_prune.checkpoint import model_card
from offline_prune.checkpoint.journal import Say
from offline_prune.checkpoint.merge import read_header
from offline_prune.checkpoint.output_folder import OutputFolder
from offline_prune.methods.fp8 import SCALE_DTYPE, dequantize, to_fp8
from offline_prune.model.companions import companions
from offline_prune.model.safetensors_reader import INDEX_NAME, SINGLE_NAME
from offline_prune.runtime.pinned_buffers import Outbox
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, PERMUTATION, SIDECAR, Annotation

MAX_SHARD_BYTES = 4 * 2**30
#: In the hidden folder: the files that are finished as they are.
_STAGED = "ready"


def stored_form(weight: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A linear layer's tensors as compressed-tensors' float-quantized format names them.

    Args:
        weight: float (N, K).
        scales: float32 (N, 1), or None to store the weight itself in `dtype`.

    Returns:
        `weight` (E4M3, or `dtype`) and, with scales, `weight_scale` (BF16, (N, 1)), both new and where `weight` is.
    """
    if scales is None:
        # + 0.0 turns −0.0 into 0.0.
        return {"weight": (weight.to(dtype) + 0.0).contiguous()}
    return {
        "weight": to_fp8(weight, scales).contiguous(),
        "weight_scale": scales.to(SCALE_DTYPE).contiguous(),
    }


def restored(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The weights that `stored_form` keeps, as everyone who reads them computes with them.

    Args:
        tensors: of any layers, by full name.
        device: that multiplies by the scales; a block in float32 would be most of what host memory is planned for.

    Returns:
        The same without scales; weights that had one are float32 and on the device.
    """
    suffix = "_scale"
    scaled = {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
    return {
        name: dequantize(tensor.to(device), scaled[name].to(device)) if name in scaled else tensor
        for name, tensor in tensors.items()
        if not name.endswith(suffix)
    }


def fp8_config(ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of per-channel FP8 weights and dynamic per-token FP8 activations."""
    weights = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
    inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    config = QuantizationConfig(
        quant_method="compressed-tensors",
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status="compressed",
        ignore=ignore,
    )
    return json.loads(config.model_dump_json(exclude_unset=True))


class CheckpointWriter:
    """A context in which parts are written; leaving it normally moves the checkpoint to OUT.

    Parts are written in the background, one at a time, into OUT's hidden folder with a journal. What is on a GPU goes
    through pinned host memory, enough for one part. When the context is left by an exception, whatever part is finished
    stays for a run that resumes.

    Args:
        out: entered.
        run: whatever decides the result, by name; a run that is resumed must have had the same.
        say: told when an unfinished one is kept.

    Attributes:
        journal: of what is finished.

    Raises:
        SpenseError: at construction, when the run that would be resumed is another one; and when the disk fails.
    """

    def __init__(self, out: OutputFolder, run: Mapping[str, Any], say: Say) -> None:
        self._out = out
        self._folder = out.partial
        self.journal = out.start(run)
        self._say = say
        self._background = ThreadPoolExecutor(1, "write")
        self._outbox = Outbox()
        self._last: Future[None] | None = None
        self._files: list[str] = []

    def __enter__(self) -> CheckpointWriter:
        return self

    @property
    def complete(self) -> bool:
        """Whether an earlier run wrote everything, and perhaps moved some of it to OUT."""
        return self.journal.ending is not None

    def add(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        record: Any = None,
        permutations: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes a part in the background, once the one before is written.

        Args:
            name: of the part, which all its tensors' names begin with, or none.
            tensors: on any device; those on a GPU may be overwritten by work that is queued there after this.
            permutations: pruned module → int32 (I,) in host memory, for `write_permutations`.

        Raises:
            SpenseError: that one could not be written.
        """
        self._wait()
        # Nobody reads the outbox any more.
        posted, arrived = self._outbox.post(name, tensors)
        self._last = self._background.submit(self._write, name, posted, arrived, record, permutations)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Inside, another file of the checkpoint is to be written; after that it is on the disk.

        Args:
            name: relative to OUT.
        """
        path = self._folder / _STAGED / name
        with self._out.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
            with path.open("rb") as written:
                os.fsync(written.fileno())
        self._files.append(name)

    def write_json(self, name: str, data: Any) -> None:
        with self.file(name) as path:
            path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy(self, source: Path, name: str) -> None:
        """A file of another folder, under that name."""
        with self.file(name) as path:
            shutil.copyfile(source, path)

    def copy_companions(self, source: Path) -> None:
        for name in companions(source):
            self.copy(source / name, str(name))

    def write_card(self, text: str, source: Path) -> None:
        """README.md; the source's own, if it has one, is kept beside it."""
        with self.file(model_card.FILE) as path:
            path.write_text(text, encoding="utf-8")
        if (source / model_card.FILE).is_file():
            self.copy(source / model_card.FILE, model_card.ORIGINAL)

    def write_permutations(self) -> None:
        """How all parts' pruned modules were reordered, in a file of its own."""
        self._wait()
        with self.file(PERMUTATION) as path:
            path.write_bytes(save(self.journal.beside(), metadata={"format": "pt"}))

    def write_config(
        self, config: Mapping[str, Any], annotation: Annotation, quantization: Mapping[str, Any] | None
    ) -> None:
        """config.json with the annotation in its quantization_config, or beside it where nothing is quantized.

        Args:
            quantization: what the quantization_config says beside the annotation: see `fp8_config`; None for a
                checkpoint without FP8.
        """
        if quantization is None:
            self.write_json("config.json", config)
            with self.file(SIDECAR) as path:
                path.write_text(annotation.to_json(), encoding="utf-8")
        else:
            whole = {**quantization, KEY: annotation.to_dict()}
            self.write_json("config.json", {**config, "quantization_config": whole})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = False
        try:
            if kind is None:
                self._wait()
                self._publish()
                ended = True
        finally:
            # Whatever was being written when something else went wrong is finished first.
            self._background.shutdown()
            if not ended and self.journal.begun:
                finished = f" ({len(self.journal.parts)} parts)" if self.journal.parts else ""
                self._say(f"what was saved is kept{finished}; --resume goes on from there")

    def _wait(self) -> None:
        if self._last:
            self._last.result()
            self._last = None

    def _write(
        self,
        name: str,
        tensors: dict[str, torch.Tensor],
        arrived: torch.cuda.Event | None,
        record: Any,
        permutations: Mapping[str, torch.Tensor] | None,
    ) -> None:
        number = len(self.journal.parts)
        file = self._folder / f"part-{number}"
        if arrived:
            arrived.synchronize()
        self._save(file, tensors)
        beside = []
        if permutations:
            beside.append(self._folder / f"permutations-{number}")
            self._save(beside[0], dict(permutations))
        with self._out.writing(file):
            self.journal.add(name, file, record, beside)

    def _save(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Writes a safetensors file, which is on the disk after that."""
        try:
            with self._out.writing(file):
                save_file(tensors, file, metadata={"format": "pt"})
                with file.open("rb") as written:
                    os.fsync(written.fileno())
                file.chmod(0o644)
        except SafetensorError as error:
            raise SpenseError(f"{file}: cannot be written: {error}") from None

    def _publish(self) -> None:
        if self.complete:
            self._out.publish(self.journal, {}, None)
            return
        parts = [self._folder / part.file for part in self.journal.parts]
        headers = [read_header(part) for part in parts]
        weights: dict[str, str] = {}
        merged = None
        if parts and merges(sum(header.nbytes for header in headers)):
            weights, merged = {SINGLE_NAME: SINGLE_NAME}, SINGLE_NAME
        elif parts:
            weights = {
                f"model-{number:05d}-of-{len(parts):05d}.safetensors": part.name for number, part in enumerate(parts, 1)
            }
            weight_map = {
                name: shard for header, shard in zip(headers, weights, strict=True) for name in header.tensors
            }
            total_bytes = sum(header.nbytes for header in headers)
            self.write_json(INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        staged = {name: f"{_STAGED}/{name}" for name in self._files}
        self._out.publish(self.journal, {**weights, **staged}, merged)


def merges(total_bytes: int) -> bool:
    """Whether a checkpoint of this size is one file of weights."""
    return total_bytes <= MAX_SHARD_BYTES
