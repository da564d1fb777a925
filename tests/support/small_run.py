"""A run of three small parts, without a model: through the lock, the journal and the last steps of a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from offline_prune.checkpoint.output_folder import OutputFolder
from offline_prune.checkpoint.writer import CheckpointWriter
from vllm_spense.format import KEY

RUN = {"seed": 0}
ANNOTATED = json.dumps({"quantization_config": {KEY: {"version": 1}}})
TENSORS = {
    "a": {"a.weight": torch.arange(15).to(torch.float8_e4m3fn).view(3, 5), "a.scale": torch.ones(3, 1).bfloat16()},
    "b": {"b.weight": torch.arange(7.0), "b.mask": torch.ones(1, dtype=torch.bool)},
    "c": {"ü": torch.arange(3)},
}
#: Part → permutations that are kept beside it.
MOVED = {"b": {"b": torch.tensor([1, 0, 2], dtype=torch.int32)}}


def write(out: Path, overwrite: bool = False, resume: bool = False, seed: int = 0, stop: bool = False) -> list[str]:
    """A small run; what it said."""
    said: list[str] = []
    with (
        OutputFolder(out, overwrite, resume, said.append) as folder,
        CheckpointWriter(folder, {"seed": seed}, said.append) as writer,
    ):
        if not writer.complete:
            for name, tensors in TENSORS.items():
                if name not in writer.journal.finished:
                    weights = {key: changed(tensor, seed) for key, tensor in tensors.items()}
                    writer.add(name, weights, {"loss": 0.1}, MOVED.get(name))
            if stop:
                raise KeyboardInterrupt
            writer.write_permutations()
            with writer.file("config.json") as path:
                path.write_text(ANNOTATED)
            with writer.file("1_Pooling/config.json") as path:
                path.write_text("{}")
    return said


def changed(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    return (tensor.float() + seed).to(tensor.dtype)


def unfinished(out: Path, **options: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(out, stop=True, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
