"""What this process runs on, as the policy asks for it."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

from vllm_spense.ops.dispatch import ONE_LAUNCH_CAPABILITY, SWITCH, Device, Path, forced_path

# A child of vLLM's logger: its handlers and level apply in every process that vLLM starts.
logger = logging.getLogger("vllm.spense")


@cache
def describe(device: torch.device) -> Device:
    """What the device and the installed libraries can do; on a GPU this tries the one-launch kernel out."""
    if device.type != "cuda":
        return Device(device.type)
    capability = torch.cuda.get_device_capability(device)
    bindings = importlib.util.find_spec("nvmath") is not None
    fault = None
    if bindings and capability == ONE_LAUNCH_CAPABILITY:
        from vllm_spense.kernels.region_gemm import one_launch

        fault = one_launch.fault(device)
        if fault:
            logger.warning("Spense: the one-launch path is not taken: %s", fault)
    return Device(device.type, capability, bindings, fault)


@cache
def forced() -> Path | None:
    """The path that `SPENSE_PATH` names.

    Raises:
        SpenseError: there is no such path.
    """
    return forced_path(os.environ.get(SWITCH))
