"""What is read of a GPU's clock, without one."""

from __future__ import annotations

import ctypes

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="needs NVIDIA's libraries")

from benchmarks.gpu_clock import SOURCE, Arguments, compiled, ghz


def test_the_clock_is_cycles_over_nanoseconds_of_multiprocessors_read_twice() -> None:
    first = torch.tensor([[5_000, 1_000], [0, 0], [9_000, 1_100], [7_000, 1_000], [1, 2_000]])
    second = torch.tensor([[8_000, 3_000], [4_000, 3_000], [12_800, 3_100], [11_000, 3_000], [0, 0]])
    # 1.5, 1.9 and 2.0; of the others one reading is missing.
    assert ghz(first, second) == pytest.approx(1.9)


def test_the_kernel_compiles_and_takes_these_arguments() -> None:
    assert compiled("sm_90a")
    assert "ulonglong2* readings;" in SOURCE.read_text(encoding="utf-8")
    assert ctypes.sizeof(Arguments) == 8
