"""Spense: 2:4 sparse and dense regions in one weight, pruned in one shot and served by vLLM.

Importing this package loads neither torch nor vLLM: vLLM imports every plugin in every process it starts.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """vLLM plugin entry point (`vllm.general_plugins`): makes `--quantization spense` known. Idempotent."""
    from vllm_spense.plugin.config import register_config

    register_config()
