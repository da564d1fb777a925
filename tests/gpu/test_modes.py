"""What an engine on a GPU can be set to, each setting with the tokens of stock vLLM without it.

    pytest -m gpu --noconftest tests/gpu/test_modes.py

`SPENSE_TEST_CHECKPOINT` and `SPENSE_TEST_MODEL` as in test_serving.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("nvmath", reason="needs nvmath-python")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu_checkpoint
from engines import Completion, Run, generate, on_one_gpu, require_those_of

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

STOCK = "compressed-tensors"
#: All but FULL, which is refused.
CUDA_GRAPHS = ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
DRAFTS = 3

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"cudagraph_mode {mode}": {"compilation_config": {"cudagraph_mode": mode}} for mode in CUDA_GRAPHS},
    **{f"-O{level}": {"optimization_level": level} for level in range(4)},
    "--enforce-eager": {"enforce_eager": True},
    "prefix caching, chunked prefill": {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 32,
    },
    "n-grams": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": DRAFTS,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
    "a pruned draft model": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": DRAFTS}},
    "a dense draft model": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": DRAFTS}},
}


def run(settings: dict[str, Any], quantization: str = "spense") -> Run:
    return Run(
        gpu_checkpoint.checkpoint(),
        quantization,
        compiled=True,
        dtype="bfloat16",
        among_others=True,
        options=json.dumps(settings),
    )


@pytest.fixture(scope="module")
def completions() -> dict[str, list[Completion] | Exception]:
    """Of each setting, and of stock vLLM compiled and eager."""
    SETTINGS["a pruned draft model"]["speculative_config"]["model"] = str(gpu_checkpoint.checkpoint())
    SETTINGS["a dense draft model"]["speculative_config"]["model"] = str(gpu_checkpoint.dense())
    runs = {name: run(settings) for name, settings in SETTINGS.items()}
    runs |= {"stock": run({}, STOCK), "stock eager": run({"enforce_eager": True}, STOCK)}

    def complete(one: Run) -> list[Completion] | Exception:
        try:
            return generate([one])[one]
        except AssertionError as error:
            return error

    return on_one_gpu(lambda name: complete(runs[name]), list(runs))


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_stock(
    name: str,
    completions: dict[str, list[Completion] | Exception],
    record_property: Callable[[str, object], None],
) -> None:
    found, stock, eager = (completions[each] for each in (name, "stock", "stock eager"))
    for each in (found, stock, eager):
        if isinstance(each, Exception):
            raise each
    record_property(name, require_those_of(found, stock, (stock, eager)))
