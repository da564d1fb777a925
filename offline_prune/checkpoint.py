"""Writing a checkpoint folder: shard by shard into a hidden folder, renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file

from offline_prune.quantize import SCALE_DTYPE, to_fp8
from offline_prune.source import INDEX_NAME, SINGLE_NAME
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, SIDECAR, Annotation

MAX_SHARD_BYTES = 4 * 2**30
#: What travels along from the source folder: tokenizer, chat template, generation config, remote code, licence.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_OWN = ("config.json", INDEX_NAME, SIDECAR)


def stored_form(weight: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A linear layer's tensors as compressed-tensors' float-quantized format names them.

    Args:
        weight: float (N, K).
        scales: float32 (N, 1), or None to store the weight itself in `dtype`.

    Returns:
        `weight` (E4M3, or `dtype`) and, with scales, `weight_scale` (BF16, (N, 1)), both in host memory.
    """
    if scales is None:
        # + 0.0 turns −0.0 into 0.0.
        return {"weight": (weight.to(dtype) + 0.0).cpu().contiguous()}
    return {
        "weight": to_fp8(weight, scales).cpu().contiguous(),
        "weight_scale": scales.to(SCALE_DTYPE).cpu().contiguous(),
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
    """A context in which tensors are added; leaving it normally makes the checkpoint visible, all at once.

    Args:
        out: the folder to create.
        overwrite: replace a checkpoint that is there.

    Raises:
        SpenseError: at construction, when `out` is filled and may not be replaced.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = out
        refuse_filled(out, overwrite)
        self._hidden = out.parent / f".{out.name}.partial-{os.getpid()}"
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self.total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.out)
        self._hidden.mkdir()
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes one tensor; writes a shard when enough have come."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > MAX_SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self.total_bytes += size

    def add_layer(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            self.add(f"{name}.{key}", tensor)

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
        if kind is None:
            self._flush()
            self._name_shards()
            self._publish()
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _flush(self) -> None:
        if self._pending:
            number = len(self._shards)
            shard = self._hidden / f"shard-{number}"
            save_file(self._pending, shard, metadata={"format": "pt"})
            shard.chmod(0o644)
            self._shards.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        total = len(self._shards)
        if total == 1:
            (self._hidden / "shard-0").rename(self._hidden / SINGLE_NAME)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            (self._hidden / f"shard-{number}").rename(self._hidden / file)
            weight_map.update(dict.fromkeys(names, file))
        self.write_json(INDEX_NAME, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})

    def _publish(self) -> None:
        if self.out.exists():
            old = self.out.parent / f".{self.out.name}.old-{os.getpid()}"
            self.out.rename(old)
            self._hidden.rename(self.out)
            shutil.rmtree(old)
        else:
            self._hidden.rename(self.out)


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
    """Removes what killed runs left: hidden folders whose process is gone."""
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
