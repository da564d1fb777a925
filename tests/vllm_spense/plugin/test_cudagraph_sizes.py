"""Which steps are captured in CUDA graphs, and when the plugin has a say in it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode, VllmConfig

from vllm_spense.plugin import cudagraph_sizes
from vllm_spense.plugin.cudagraph_sizes import beyond, capture_prefill, capture_sizes


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraph_sizes, "current_platform", SimpleNamespace(is_cuda=lambda: True))


def engine(
    requests: int = 256,
    tokens: int = 8192,
    architecture: str = "LlamaForCausalLM",
    mode: str = "balanced",
    **changed: Any,
) -> Any:
    """As much of a configuration as vLLM's own code for these sizes reads."""
    compilation = {
        "cudagraph_capture_sizes": None,
        "max_cudagraph_capture_size": None,
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
        "post_init_cudagraph_sizes": lambda: None,
        **changed,
    }
    return SimpleNamespace(
        compilation_config=SimpleNamespace(**compilation),
        model_config=SimpleNamespace(architecture=architecture, enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=tokens),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        num_speculative_tokens=0,
        uniform_decode_query_len=1,
        performance_mode=mode,
    )


def captured(config: Any) -> list[int]:
    """What vLLM makes of it."""
    VllmConfig._set_cudagraph_sizes(config)
    return config.compilation_config.cudagraph_capture_sizes


@pytest.mark.parametrize("requests", [1, 3, 16, 100, 128, 200, 256, 1024])
@pytest.mark.parametrize("tokens", [256, 2000, 8192])
def test_what_vllm_captures_stays(requests: int, tokens: int) -> None:
    mine = engine(requests, tokens)
    capture_prefill(mine)
    theirs = captured(engine(requests, tokens))
    assert set(theirs) <= set(captured(mine))
    assert max(captured(mine)) == min(2048, max(size for size in (*theirs, *beyond(0)) if size <= tokens))


@pytest.mark.parametrize("requests", [1, 3, 24, 100, 150, 256])
def test_no_step_is_padded_by_more_than_a_third(requests: int) -> None:
    sizes = [size for size in capture_sizes(requests, 8192) if size >= 32]
    assert all(above <= below * 4 / 3 for below, above in pairwise(sizes))
    assert sizes[-1] == 2048


@pytest.mark.parametrize(
    "config",
    [
        engine(cudagraph_capture_sizes=[1, 2, 4]),
        engine(max_cudagraph_capture_size=64),
        engine(architecture="Gemma3ForCausalLM"),
        engine(mode="throughput"),
        engine(cudagraph_mode=CUDAGraphMode.FULL),
        engine(cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY),
    ],
)
def test_wishes_of_the_user_and_other_models_stay(config: Any) -> None:
    before = config.compilation_config.cudagraph_capture_sizes
    capture_prefill(config)
    assert config.compilation_config.cudagraph_capture_sizes == before
