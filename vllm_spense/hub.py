"""Models of the Hugging Face hub, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_spense.errors import SpenseError, first_line

#: For messages.
EXAMPLE = "Qwen/Qwen3-32B"


def is_hub_name(model: str) -> bool:
    """Whether it could be one, and is plainly no path."""
    return not model.startswith((".", "/", "~")) and model.count("/") == 1


def snapshot(model: str, missing: str, **patterns: Any) -> Path:
    """The local folder with a model's files of these patterns, from the hub or, without a network, its local cache.

    Args:
        missing: what an error begins with.
        patterns: `allow_patterns` and `ignore_patterns`, lists, of huggingface_hub's `snapshot_download`.

    Raises:
        SpenseError: neither the hub nor its local cache gives it; says why.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, **patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SpenseError(f"{missing} the Hugging Face hub did not give it: {first_line(error)}") from None
