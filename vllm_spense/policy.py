"""Which execution path runs a pruned linear layer: pure functions of the problem, testable without its device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vllm_spense.errors import SpenseError
from vllm_spense.kernels.problem import WEIGHT_MULTIPLE, Problem

#: Names a path to take whatever the policy says.
SWITCH = "SPENSE_PATH"
#: Compute capability that the library path was measured on; older GPUs have no FP8 in cuSPARSELt.
LIBRARY_CAPABILITY = (9, 0)


class Path(StrEnum):
    """The ways to run a layer; `vllm_spense.ops` knows the kernel of each."""

    REFERENCE = "reference"
    LIBRARY = "library"


@dataclass(frozen=True)
class Device:
    """What a choice depends on.

    Attributes:
        kind: torch's name for the kind of device.
        capability: CUDA's compute capability, None on other devices.
        bindings: whether nvmath-python, the way to NVIDIA's libraries, is installed.
    """

    kind: str
    capability: tuple[int, int] | None = None
    bindings: bool = False

    def __str__(self) -> str:
        return self.kind if self.capability is None else "{} {}.{}".format(self.kind, *self.capability)


def candidates(problem: Problem, device: Device, forced: Path | None = None) -> tuple[Path, ...]:
    """Every path that `choose` returns for some number of tokens; a layer's weight is packed for each of them.

    Raises:
        SpenseError: the forced path cannot run this problem on this device.
    """
    reason = reason_against_library(problem, device)
    if forced is Path.LIBRARY and reason:
        raise SpenseError(f"{SWITCH}={forced} cannot be followed: {reason}")
    return (forced or (Path.REFERENCE if reason else Path.LIBRARY),)


def choose(problem: Problem, tokens: int, device: Device, forced: Path | None = None) -> Path:
    """The path for `tokens` rows of activations: one of the candidates."""
    return candidates(problem, device, forced)[0]


def reason_against_library(problem: Problem, device: Device) -> str | None:
    """Why cuSPARSELt and cuBLASLt cannot run this problem here, or None if they can."""
    if device.kind != "cuda" or device.capability is None:
        return f"it needs an NVIDIA GPU, and this is {device}"
    if device.capability < LIBRARY_CAPABILITY:
        return "it needs compute capability {}.{}, and this is {}.{}".format(*LIBRARY_CAPABILITY, *device.capability)
    if not device.bindings:
        return "nvmath-python is not installed (pip install 'nvmath-python>=1.0')"
    sizes = (*problem.sparse_shape, *problem.dense_shape)
    if any(size % WEIGHT_MULTIPLE for size in sizes):
        return f"region sizes {sizes} are not all multiples of {WEIGHT_MULTIPLE}"
    return None


def forced_path(switch: str | None) -> Path | None:
    """The path that a value of `SPENSE_PATH` names; None or nothing leaves the choice to the policy.

    Raises:
        SpenseError: there is no such path.
    """
    if not switch:
        return None
    if switch not in tuple(Path):
        raise SpenseError(f"{SWITCH}: found {switch}, expected {' | '.join(Path)}")
    return Path(switch)
