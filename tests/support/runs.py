"""One way to call the pruner from tests, and to look at what it made; and to run kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from offline_prune.checkpoint.evaluate import load_dense
from offline_prune.pipeline import prune
from offline_prune.report import Report
from offline_prune.settings import PruneSettings


def run(model: Path, out: Path, text: Path, **options: Any) -> Report:
    given = {"method": "spensegpt+", "samples": 8, "length": 64, "calibration": str(text), "device": "cpu", **options}
    return prune(PruneSettings(str(model), out, **given))


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
