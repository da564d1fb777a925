"""Prints, as JSON, a hash of what the pruner writes for tiny random models and fixed seeds: one for each case.

Run with `ENVIRONMENT`, so that CPUs compute the same bits as far as that can be had: one thread, no instruction beyond
SSE.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny_models import tiny_model

from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4",
}
#: Name → family of the model, settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Weights of channels come from a backward pass, whose last bits differ more from CPU to CPU.
    "spensegpt++ 37.5%": (
        "llama",
        {"method": "spensegpt++", "sparsity": 0.375, "tune_steps": 6, "tune_loss": "relative"},
    ),
    "spensegpt++ 25%, mixed groups": (
        "qwen2",
        {"method": "spensegpt++", "sparsity": 0.25, "tune_steps": 4, "tune_loss": "relative", "grouping": "mixed"},
    ),
    "spensegpt+ 37.5%": ("llama with biases", {"method": "spensegpt+", "sparsity": 0.375}),
    "spensegpt+ 25%, fused": ("phi3", {"method": "spensegpt+", "sparsity": 0.25}),
    "spensegpt 25%, dense columns in front": ("gemma3", {"method": "spensegpt", "sparsity": 0.25, "layout": "front"}),
    "spensegpt+ by output loss, descent": (
        "qwen3",
        {"method": "spensegpt+", "sparsity": 0.25, "selection": "output-loss", "descent_passes": 2},
    ),
    "sparsegpt, rounded after": ("mistral", {"method": "sparsegpt", "rounding": "after"}),
    "sparsegpt, not quantized": ("llama", {"method": "sparsegpt", "quantize": "none", "true_sequential": False}),
    "wanda": ("granite", {"method": "wanda"}),
    "magnitude": ("seed-oss", {"method": "magnitude"}),
}


def hashed(checkpoint: Path) -> str:
    """SHA-256 of all tensors' names, types, shapes and bytes, by name."""
    digest = hashlib.sha256()
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    hashes = {}
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(7))
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (family, options)) in enumerate(CASES.items()):
            model, out = Path(folder, f"model-{number}"), Path(folder, f"out-{number}")
            tiny_model(family, model)
            given = {"samples": len(tokens), "length": tokens.shape[1], "device": "cpu", "alignment": 32, **options}
            prune(PruneSettings(str(model), out, **given), tokens=tokens)
            hashes[name] = hashed(out)
    json.dump(hashes, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
