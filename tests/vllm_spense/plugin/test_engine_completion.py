"""What Spense checks and asks for while vLLM completes an engine's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from test_config import quantization_config

from vllm_spense.errors import SpenseError
from vllm_spense.ops.dispatch import SWITCH
from vllm_spense.plugin.config import complete_engine


def engine_of(quant_config: Any, **settings: Any) -> Any:
    """As much of an engine's configuration as `complete_engine` reads."""
    hf_config = SimpleNamespace(quantization_config=quant_config)
    model = {"quantization": "spense", "hf_config": hf_config, "hf_text_config": hf_config}
    return SimpleNamespace(
        model_config=SimpleNamespace(**model | settings, enforce_eager=True, architecture="LlamaForCausalLM"),
        load_config=SimpleNamespace(load_format="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        lora_config=None,
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=None, cudagraph_capture_sizes=None, max_cudagraph_capture_size=None
        ),
    )


def test_an_engines_settings_are_checked_with_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = quantization_config()
    nested = SimpleNamespace(quantization_config=ours)
    complete_engine(engine_of(ours))
    monkeypatch.setenv(SWITCH, "libary")
    for engine in (engine_of(ours), engine_of(None, hf_text_config=nested)):
        with pytest.raises(SpenseError, match="SPENSE_PATH: found libary"):
            complete_engine(engine)
    # Somebody else's.
    complete_engine(engine_of(ours, quantization="compressed-tensors"))
