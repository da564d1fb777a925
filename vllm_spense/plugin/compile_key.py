"""Adds Spense's trace-time choices to the key of vLLM's compile cache.

Compiled graphs are kept on disk under the engine's configuration and the source files that were traced. Which tensors a
layer hands to an op, and which ops stand between the layers, depends on more: the GPU, the libraries, switches of ours.
"""

from __future__ import annotations

from vllm.config import VllmConfig

#: In the engine's `additional_config`, which is part of the key.
KEY = "spense_graph"


def record(engine: VllmConfig, layer: str, *facts: object) -> None:
    """Notes what decides how a layer is traced; before anything is compiled, but as often as weights are loaded."""
    additional = engine.additional_config
    # Platforms may have classes of their own there.
    if isinstance(additional, dict):
        additional.setdefault(KEY, {})[layer] = " ".join(map(str, facts))
