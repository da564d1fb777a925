"""A layer's time line, from what a profiler saw of several layers and steps."""

from __future__ import annotations

import sys

import pytest

from benchmarks import layer_timeline
from benchmarks.layer_timeline import ideal_us, middle_layer, with_roles
from benchmarks.worker_profile import KernelRun
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions
from vllm_spense.model_sizes import Model
from vllm_spense.roofline import GPUS, gpu_named
from vllm_spense.shapes import SHAPES

LAYER = [
    *("rope", "flash_fwd", "flash_combine", "o_gemm", "triton_red_gemm", "gemm up", "silu", "gemm down", "gemm down"),
    *("norm", "cutlass qkv"),
]
LAYERS, STEPS = 3, 4


def steps() -> list[KernelRun]:
    """Each kernel takes one more us than the one before it in its layer and begins 0.5 us after it; norms earlier."""
    events, now = [], 0.0
    for _ in range(STEPS):
        for name in ["embed", "norm", "cutlass qkv", *LAYER * (LAYERS - 1), *LAYER[:-1], "lm_head gemm"]:
            took = 1.0 + LAYER.index(name) if name in LAYER else 50.0
            early = 2.5 if name == "norm" else 0
            events.append(KernelRun(name, now - early, now + took))
            now += took + 0.5
    return events


def test_a_layer_goes_from_one_attention_kernel_to_the_next() -> None:
    found = middle_layer(steps()[::-1], LAYERS)
    assert [name for name, *_ in found] == [*LAYER[3:], *LAYER[:3]]
    own = [4, 5, 6, 7, 8, 8, 10 + 2.5, 11, 1, 2, 3]
    assert [us for *_, us in found] == pytest.approx(own)
    assert [us for _, us, _ in found] == pytest.approx([us + (0.5 if us != 12.5 else -2) for us in own])
    roles = [role for _, role, *_ in with_roles(found)]
    assert roles == ["o", "other", "gate_up", "other", "down", "down", "other", "qkv", "other", *["attention"] * 2]


def test_a_layer_that_is_not_understood_is_refused() -> None:
    with pytest.raises(SpenseError, match=r"no attention kernel that runs in each of 5 layers \(found: \{'flash_fwd'"):
        middle_layer(steps(), 5)
    with pytest.raises(SpenseError, match="a layer has 1 GEMMs, expected 4"):
        with_roles([("flash", 1.0, 0.0), ("gemm", 1.0, 0.0)])


@pytest.mark.parametrize(("name", "found"), [(None, "no NVIDIA GPU"), ("NVIDIA A100", "NVIDIA A100")])
def test_a_gpu_without_a_data_sheet_is_refused_before_an_engine_starts(
    name: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["layer_timeline.py"])
    monkeypatch.setattr(layer_timeline.torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(layer_timeline.torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(layer_timeline, "in_turn", lambda *_: pytest.fail("an engine starts"))
    with pytest.raises(SpenseError, match=f"found {found}, expected one of H100, H200, B200"):
        layer_timeline.main()


def test_ideals_are_bytes_over_bandwidth_and_products_over_the_peak() -> None:
    model = Model.from_config(SHAPES["qwen3-32b"])
    gpu = gpu_named("NVIDIA H100 80GB HBM3")
    assert gpu == GPUS["h100"]
    dense = ideal_us(model, None, 256, gpu)
    assert dense["gate_up"] == pytest.approx((51200 * 5120 / 3.35e6, 2 * 256 * 51200 * 5120 / 1979e6), abs=0.01)
    pruned = ideal_us(model, Regions(19200, 6400), 256, gpu)
    for name in ("gate_up", "down"):
        assert pruned[name][0] / dense[name][0] == pytest.approx(0.25 + 0.625 * 0.75, abs=1e-3)
        assert pruned[name][1] / dense[name][1] == pytest.approx(0.25 + 0.5 * 0.75, abs=1e-3)
    assert pruned["qkv"] == dense["qkv"]
