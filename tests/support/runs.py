"""One way to call the pruner from tests, and to look at what it made; and to run kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.pipeline import prune
from offline_prune.report import Report
from offline_prune.settings import PruneSettings


class Cut(Exception):
    """Stands for whatever ends a run."""


def _settings(model: Path, out: Path, text: Path, **options: Any) -> PruneSettings:
    given = {"method": "spensegpt+", "samples": 8, "length": 64, "calibration": str(text), "device": "cpu", **options}
    return PruneSettings(str(model), out, **given)


def run(model: Path, out: Path, text: Path, **options: Any) -> Report:
    return prune(_settings(model, out, text, **options))


def cut_off(
    model: Path, out: Path, text: Path, blocks: int, error: BaseException | None = None, **options: Any
) -> None:
    """Prunes so many blocks and leaves an unfinished run."""

    def stop(done: int, total: int, name: str) -> None:
        if done == blocks:
            raise error or Cut

    with pytest.raises(type(error) if error else Cut):
        prune(_settings(model, out, text, **options), stop)


def contents(out: Path) -> dict[str, bytes]:
    """All files but the report, which tells how long it took."""
    files = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith("report.")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def logits(folder: Path) -> torch.Tensor:
    """Of a checkpoint on text like, but not of, the fixture `text`."""
    model, tokenizer = load_dense(folder)
    unseen = " ".join(f"{i} sheep jump over {i * i % 89} fences." for i in range(700, 720))
    with torch.inference_mode():
        return model(**tokenizer(unseen, return_tensors="pt", return_token_type_ids=False)).logits


def interpret(code: str, *arguments: object) -> None:
    """Python that runs Triton's kernels in its interpreter, and must end well.

    In a process of its own: Triton decides when it is imported whether it will interpret.
    """
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert process.returncode == 0, process.stderr
