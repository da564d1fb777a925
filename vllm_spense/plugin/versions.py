"""The releases of vLLM that this plugin is for, and what it says where it cannot register with the installed one.

Imports nothing of vLLM: that may be what fails.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("vllm.spense")

#: Releases whose sources were read for what is in `vllm_internals.py`.
CHECKED = ("0.26.0", "0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")


def say_unregistered(error: Exception) -> None:
    """One line at ERROR. vLLM goes on without the plugin, for whom it may have nothing to do."""
    from vllm_spense import __version__

    vllm = getattr(sys.modules.get("vllm"), "__version__", "of an unknown version")
    logger.error(
        "Spense %s cannot register with vLLM %s, so --quantization spense is unknown here: %s: %s. It is for vLLM "
        "%s to %s: install one of these, or a newer Spense",
        __version__, vllm, type(error).__name__, error, CHECKED[0], CHECKED[-1],
    )  # fmt: skip
