"""Writing a checkpoint folder: part by part into a hidden folder, renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offline_prune.checkpoint.journal import FILE as JOURNAL
from offline_prune.checkpoint.journal import Journal, Part
from offline_prune.methods.fp8 import SCALE_DTYPE, dequantize, to_fp8
from offline_prune.model.safetensors_reader import INDEX_NAME, SINGLE_NAME
from offline_prune.runtime.activation_store import Outbox
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, SIDECAR, Annotation

MAX_SHARD_BYTES = 4 * 2**30
#: What travels along from the source folder: tokenizer, chat template, generation config, remote code, licence.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_OWN = ("config.json", INDEX_NAME, SIDECAR, "hf_quant_config.json", "adapter_config.json")

Say = Callable[[str], None]


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


class Unfinished(SpenseError):
    """The work cannot go on now; what is finished is kept for `--resume`."""


class CheckpointWriter:
    """A context in which parts are written; leaving it normally makes the checkpoint visible, all at once.

    Parts are written in the background, one at a time, into a hidden folder beside `out` with a journal. What is on a
    GPU goes through pinned host memory, enough for one part. When the context is left by anything but a mistake of the
    user's, and a part is finished, the folder stays for a run that resumes.

    Args:
        out: the folder to create.
        run: whatever decides the result, by name; a run that is resumed must have had the same.
        overwrite: replace a checkpoint, or an unfinished one, that is there.
        resume: go on with an unfinished one, if there is one.
        say: told when an unfinished one is kept.

    Attributes:
        journal: of what is finished.

    Raises:
        SpenseError: at construction, when there is something that may not be replaced or resumed.
    """

    def __init__(self, out: Path, run: Mapping[str, Any], overwrite: bool, resume: bool, say: Say) -> None:
        self.out = out
        refuse_filled(out, overwrite)
        self._hidden = out.parent / f".{out.name}.partial-{os.getpid()}"
        self.journal = Journal(self._hidden, run)
        self._resumed: Path | None = None
        self._say = say
        self._background = ThreadPoolExecutor(1, "write")
        self._outbox = Outbox()
        self._last: Future[None] | None = None
        left = unfinished(out)
        if left and resume:
            left.require(run)
            self._resumed = left.folder
            self.journal.parts = left.parts
        elif left and not overwrite:
            raise SpenseError(
                f"{left.folder}: an unfinished run ({len(left.parts)} blocks done); "
                "--resume goes on, --overwrite starts anew"
            )

    def __enter__(self) -> CheckpointWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self._resumed:
            self._resumed.rename(self._hidden)
        _remove_abandoned(self.out)
        self._hidden.mkdir(exist_ok=True)
        kept = {part.file for part in self.journal.parts}
        for file in self._hidden.iterdir():
            if file.name not in kept:
                file.unlink()
        self.journal.start()
        return self

    def add(self, name: str, tensors: Mapping[str, torch.Tensor], record: Any = None) -> None:
        """Writes a part in the background, once the one before is written.

        Args:
            name: of the part, which all its tensors' names begin with, or none.
            tensors: on any device; those on a GPU may be overwritten by work that is queued there after this.

        Raises:
            Unfinished: that one could not be written.
        """
        self._wait()
        # Nobody reads the outbox any more.
        posted, arrived = self._outbox.post(name, tensors)
        self._last = self._background.submit(self._write, name, posted, arrived, record)

    def write_json(self, file: str, data: Any) -> None:
        (self._hidden / file).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def path(self, file: str) -> Path:
        """Where to write another file of the checkpoint now."""
        return self._hidden / file

    def copy_companions(self, source: Path) -> None:
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                if file.name not in _OWN and file.is_file():
                    shutil.copyfile(file, self._hidden / file.name)

    def write_config(self, config: dict[str, Any], annotation: Annotation, ignore: list[str] | None) -> None:
        """config.json with the annotation in its quantization_config, or beside it where nothing is quantized.

        Args:
            ignore: names of unquantized linear layers; None for a checkpoint without FP8.
        """
        if ignore is None:
            self.write_json("config.json", config)
            (self._hidden / SIDECAR).write_text(annotation.to_json(), encoding="utf-8")
        else:
            quantization = {**fp8_config(ignore), KEY: annotation.to_dict()}
            self.write_json("config.json", {**config, "quantization_config": quantization})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                self._name_shards()
                (self._hidden / JOURNAL).unlink()
                self._publish()
        finally:
            # Whatever was being written when something else went wrong is finished first.
            self._background.shutdown()
            mistake = kind is not None and issubclass(kind, SpenseError) and not issubclass(kind, Unfinished)
            if mistake or not self.journal.parts:
                shutil.rmtree(self._hidden, ignore_errors=True)
            elif kind is not None:
                self._say(f"what is finished is kept ({len(self.journal.parts)} blocks); --resume goes on from there")

    def _wait(self) -> None:
        if self._last:
            self._last.result()
            self._last = None

    def _write(
        self, name: str, tensors: dict[str, torch.Tensor], arrived: torch.cuda.Event | None, record: Any
    ) -> None:
        file = self._hidden / f"part-{len(self.journal.parts)}"
        if arrived:
            arrived.synchronize()
        try:
            save_file(tensors, file, metadata={"format": "pt"})
            with file.open("rb") as written:
                os.fsync(written.fileno())
            file.chmod(0o644)
            self.journal.add(Part(name, file.name, record))
        except (OSError, SafetensorError) as error:
            raise Unfinished(f"{file}: cannot be written: {error}") from None

    def _name_shards(self) -> None:
        parts = self.journal.parts
        files = [self._hidden / part.file for part in parts]
        if sum(file.stat().st_size for file in files) <= MAX_SHARD_BYTES:
            together = {name: tensor for file in files for name, tensor in load_file(file).items()}
            save_file(together, self._hidden / SINGLE_NAME, metadata={"format": "pt"})
            (self._hidden / SINGLE_NAME).chmod(0o644)
            for file in files:
                file.unlink()
            return
        weight_map, total_bytes = {}, 0
        for number, file in enumerate(files):
            shard = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
            tensors = load_file(file)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
            weight_map.update(dict.fromkeys(tensors, shard))
            file.rename(self._hidden / shard)
        self.write_json(INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})

    def _publish(self) -> None:
        if self.out.exists():
            old = self.out.parent / f".{self.out.name}.old-{os.getpid()}"
            self.out.rename(old)
            self._hidden.rename(self.out)
            shutil.rmtree(old)
        else:
            self._hidden.rename(self.out)


def unfinished(out: Path) -> Journal | None:
    """The journal of the run to `out` that got furthest and whose process is gone, if it finished anything."""
    journals = [journal for folder in _abandoned(out) if (journal := Journal.read(folder)) and journal.parts]
    return max(journals, key=lambda journal: len(journal.parts), default=None)


def refuse_filled(out: Path, overwrite: bool) -> None:
    """Raises SpenseError when `out` holds something that may not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise SpenseError(f"{out}: found a file, expected a folder or nothing")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise SpenseError(f"{out}: the folder is not empty; --overwrite replaces a checkpoint")
    if not (out / "config.json").exists():
        raise SpenseError(f"{out}: the folder holds no checkpoint (no config.json), so --overwrite does not touch it")


def _remove_abandoned(out: Path) -> None:
    """Removes what killed runs left."""
    for folder in _abandoned(out):
        shutil.rmtree(folder)


def _abandoned(out: Path) -> list[Path]:
    """Hidden folders whose process is gone."""
    folders = out.parent.glob(f".{out.name}.partial-*")
    pids = {folder: folder.name.rpartition("-")[2] for folder in folders}
    return [folder for folder, pid in pids.items() if pid.isdigit() and not _alive(int(pid))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
