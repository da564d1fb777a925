"""What every loaded weight must hold, whichever method runs it: vLLM notices no missing tensor and no wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.logger import init_logger

from vllm_spense.errors import FormatError

logger = init_logger("vllm.spense")


@contextmanager
def said_by_workers() -> Iterator[None]:
    """Logs a FormatError before it goes on: in a worker the traceback that follows would bury it."""
    try:
        yield
    except FormatError as error:
        logger.error("%s", error)
        raise


def require_loaded(weight: torch.Tensor, layer: str) -> None:
    """Raises FormatError where an FP8 E4M3 weight of any shape holds NaN, as it does until it is loaded."""
    if (weight.view(torch.uint8) & 0x7F == 0x7F).any():
        raise FormatError("the weight is missing or holds NaN", layer=layer, key="weight")


def require_scales(scale: torch.Tensor, layer: str) -> None:
    """Raises FormatError unless all weight scales, float32 of any shape, are positive numbers."""
    wrong = scale[~(scale.isfinite() & (scale > 0))]
    if len(wrong):
        raise FormatError(
            "a weight scale is missing or wrong",
            layer=layer,
            key="weight_scale",
            found=wrong[0].item(),
            expected="a positive number for each output channel",
        )
