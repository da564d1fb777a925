"""CUDA graphs for prefill beyond the sizes that vLLM captures.

Up to about 1500 tokens a step outside of CUDA graphs waits for the host, which has more to do here than in stock vLLM:
each operator is Python. Captured, the same steps are faster than stock's.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Models whose MLPs run the same kernels: our GEMMs and our activation. Prefill was measured of two of them, Qwen3 and
#: Llama.
_SAME_KERNELS = frozenset(
    {
        "Exaone4ForCausalLM", "Glm4ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SeedOssForCausalLM",
    }
)  # fmt: skip
#: The largest that vLLM captures by default.
_MOST_OF_VLLM = 512
_DOUBLINGS = (32, 64, 128, 256, 512, 1024)
_LARGEST = 2048


def capture_sizes(requests: int, tokens: int) -> list[int]:
    """vLLM's default sizes, those that only newer versions have included, and those of `beyond`.

    Args:
        requests: at most at once, times the tokens of each in a decode step.
        tokens: at most in one step.
    """
    most = min(2 * requests, _MOST_OF_VLLM)
    usual = chain((1, 2, 4), range(8, min(most + 1, 256), 8), range(256, most + 1, 16))
    return sorted({size for size in (*usual, requests, most, *beyond(most)) if size <= min(tokens, _LARGEST)})


def beyond(most: int) -> list[int]:
    """Tokens of the steps that are captured beyond `most`: four for each doubling, so that the tokens of a step in
    between, which is padded to the next of them, grow by a tenth on average."""
    ladder = (size for low in _DOUBLINGS for size in range(low, 2 * low, low // 4))
    return [size for size in (*ladder, _LARGEST) if size > most]


def capture_prefill(engine: VllmConfig) -> None:
    """Asks for `capture_sizes` in the models of `_SAME_KERNELS`, unless the user has chosen sizes or a performance mode
    that does, or the engine has no CUDA graphs that leave attention out.
    """
    compilation, model = engine.compilation_config, engine.model_config
    own_wish = compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
    if own_wish or model.enforce_eager or model.architecture not in _SAME_KERNELS or not current_platform.is_cuda():
        return
    mode = compilation.cudagraph_mode
    if mode is not None and mode.mixed_mode() is not CUDAGraphMode.PIECEWISE:
        return
    if engine.performance_mode != "balanced":
        return  # has sizes of its own
    scheduler = engine.scheduler_config
    requests = scheduler.max_num_seqs * (1 + engine.num_speculative_tokens)
    compilation.cudagraph_capture_sizes = capture_sizes(requests, scheduler.max_num_batched_tokens)
