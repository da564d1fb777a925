"""Which versions a result came from."""

from __future__ import annotations

from importlib.metadata import version

import vllm_spense


def versions() -> dict[str, str]:
    """Of Spense, and of what computes with it."""
    return {"spense": vllm_spense.__version__, **{name: version(name) for name in ("torch", "transformers")}}
