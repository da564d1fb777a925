"""Spense: 2:4 sparse and dense regions in one weight, pruned in one shot and served by vLLM.

Importing this package loads neither torch nor vLLM: vLLM imports every plugin in every process it starts.
"""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """vLLM plugin entry point (`vllm.general_plugins`): makes `--quantization spense` known. Idempotent.

    Says so at ERROR where this vLLM has moved what the plugin needs; an exception would end whatever was started, for
    other models too.
    """
    from vllm_spense.plugin.versions import say_unregistered

    try:
        from vllm_spense.plugin.config import register_config

        register_config()
    except Exception as error:
        say_unregistered(error)
