"""How exact FP32 products have to be, decided by the code that multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Lets FP32 products run on BF16 (CPU) or TF32 (GPU) units, with FP32 sums and results.

    Meant for forward passes and Hessians, whose inputs are BF16 weights and activations to begin with, and for
    losses that are only reported. Not for factorizations and column loops, which need FP32.
    """
    with _matmul_precision("bf16", "tf32"):
        yield


@contextmanager
def exact_matmul() -> Iterator[None]:
    """FP32 products in full, inside of `fast_matmul` too."""
    with _matmul_precision("ieee", "ieee"):
        yield


@contextmanager
def _matmul_precision(on_cpu: str, on_gpu: str) -> Iterator[None]:
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = on_cpu, on_gpu
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
