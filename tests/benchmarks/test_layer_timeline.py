"""A layer's time line, from what a profiler saw of several layers and steps."""

from __future__ import annotations

import pytest

from benchmarks.layer_timeline import gpu_of, ideal_us, middle_layer, with_roles
from benchmarks.worker_profile import KernelRun
from vllm_spense.errors import SpenseError
from vllm_spense.estimate import GPUS, Model
from vllm_spense.format import Regions
from vllm_spense.shapes import SHAPES

LAYER = [
    *("rope", "flash_fwd", "flash_combine", "o_gemm", "triton_red_gemm", "gemm up", "silu", "gemm down", "gemm down"),
    *("norm", "cutlass qkv"),
]
LAYERS, STEPS = 3, 4


def steps() -> list[KernelRun]:
    """Each kernel takes one more us than the one before it in its layer, with 0.5 us between kernels."""
    events, now = [], 0.0
    for _ in range(STEPS):
        for name in ["embed", "norm", "cutlass qkv", *LAYER * (LAYERS - 1), *LAYER[:-1], "lm_head gemm"]:
            took = 1.0 + LAYER.index(name) if name in LAYER else 50.0
            events.append(KernelRun(name, now, now + took))
            now += took + 0.5
    return events


def test_a_layer_goes_from_one_attention_kernel_to_the_next() -> None:
    found = middle_layer(steps()[::-1], LAYERS)
    assert [name for name, *_ in found] == [*LAYER[3:], *LAYER[:3]]
    assert [us for _, us, _ in found] == pytest.approx([4, 5, 6, 7, 8, 8, 10, 11, 1, 2, 3])
    assert [idle for *_, idle in found] == pytest.approx([0.5] * len(LAYER))
    roles = [role for _, role, *_ in with_roles(found)]
    assert roles == ["o", "other", "gate_up", "other", "down", "down", "other", "qkv", "other", *["attention"] * 2]


def test_a_layer_that_is_not_understood_is_refused() -> None:
    with pytest.raises(SpenseError, match=r"no attention kernel that runs in each of 5 layers \(found: \{'flash_fwd'"):
        middle_layer(steps(), 5)
    with pytest.raises(SpenseError, match="a layer has 1 GEMMs, expected 4"):
        with_roles([("flash", 1.0, 0.0), ("gemm", 1.0, 0.0)])
    with pytest.raises(SpenseError, match="no data sheet of A100"):
        gpu_of("A100")


def test_ideals_are_bytes_over_bandwidth_and_products_over_the_peak() -> None:
    model = Model.from_config(SHAPES["qwen3-32b"])
    gpu = gpu_of("NVIDIA H100 80GB HBM3")
    assert gpu == GPUS["h100"]
    dense = ideal_us(model, None, 256, gpu)
    assert dense["gate_up"] == pytest.approx((51200 * 5120 / 3.35e6, 2 * 256 * 51200 * 5120 / 1979e6), abs=0.01)
    pruned = ideal_us(model, Regions(19200, 6400), 256, gpu)
    for name in ("gate_up", "down"):
        assert pruned[name][0] / dense[name][0] == pytest.approx(0.25 + 0.625 * 0.75, abs=1e-3)
        assert pruned[name][1] / dense[name][1] == pytest.approx(0.25 + 0.5 * 0.75, abs=1e-3)
    assert pruned["qkv"] == dense["qkv"]
