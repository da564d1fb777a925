"""Which execution path runs a pruned linear layer: pure functions of the problem, testable without its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from vllm_spense.errors import SpenseError

if TYPE_CHECKING:
    from vllm_spense.kernels.region_gemm.problem import Problem

#: Names a path to take whatever the policy says.
SWITCH = "SPENSE_PATH"
#: GiB of each GPU's memory that dense copies of pruned weights may take.
GRANT = "SPENSE_DENSE_COPY_GIB"
#: Compute capability that the library path was measured on; older GPUs have no FP8 in cuSPARSELt.
LIBRARY_CAPABILITY = (9, 0)
#: The one-launch path issues this GPU's own instructions.
ONE_LAUNCH_CAPABILITY = (9, 0)
#: Up to the first number of tokens the one-launch path won on every shape that was measured, beyond the second the
#: library path did (docs/kernels.md). Between them, both are timed on the machine that serves.
ALWAYS_ONE_LAUNCH, NEVER_ONE_LAUNCH = 64, 512


class Path(StrEnum):
    """The ways to run a pruned layer; `path_kernels` knows the kernel of each."""

    REFERENCE = "reference"
    LIBRARY = "library"
    ONE_LAUNCH = "one-launch"
    DENSE = "dense"


@dataclass(frozen=True)
class Device:
    """What the choice of a path depends on; `machine.describe` fills it in.

    Attributes:
        kind: torch's name for the kind of device.
        capability: CUDA's compute capability, None on other devices.
        bindings: whether nvmath-python, the way to NVIDIA's libraries, is installed.
        one_launch_fault: why the one-launch path must not be used here, None if nothing speaks against it.
    """

    kind: str
    capability: tuple[int, int] | None = None
    bindings: bool = False
    one_launch_fault: str | None = None

    def __str__(self) -> str:
        return self.kind if self.capability is None else "{} {}.{}".format(self.kind, *self.capability)


def candidates(
    problem: Problem, device: Device, forced: Path | None = None, dense_copy: bool = False
) -> tuple[Path, ...]:
    """Every path that `choose` returns for some number of tokens; a layer's weight is packed for each of them.

    Args:
        dense_copy: whether there is a dense copy of the weight.

    Raises:
        SpenseError: the forced path cannot run this problem on this device.
    """
    if forced:
        if reason := reason_against(forced, problem, device):
            raise SpenseError(f"{SWITCH}={forced} cannot be followed: {reason}")
        return (forced,)
    paths = (Path.ONE_LAUNCH, Path.LIBRARY, *([Path.DENSE] if dense_copy else []))
    fast = tuple(path for path in paths if not reason_against(path, problem, device))
    return fast or (Path.REFERENCE,)


def tokens_of(path: Path, paths: Sequence[Path], max_tokens: int) -> tuple[int, int] | None:
    """Smallest and largest number of tokens, up to `max_tokens`, for which `path` may be chosen among `paths`."""
    one_of_them = len(paths) > 1 and Path.ONE_LAUNCH in paths
    first = ALWAYS_ONE_LAUNCH + 1 if one_of_them and path is not Path.ONE_LAUNCH else 1
    last = min(max_tokens, NEVER_ONE_LAUNCH) if one_of_them and path is Path.ONE_LAUNCH else max_tokens
    return (first, last) if first <= last else None


def candidates_at(tokens: int, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Those of the candidates `paths` that may be the fastest for `tokens` rows of activations."""
    return tuple(path for path in paths if (span := tokens_of(path, paths, tokens)) and span[1] == tokens)


def choose(paths: Sequence[Path], tokens: int, times: Callable[[tuple[Path, ...]], Mapping[str, float]]) -> Path:
    """The path for `tokens` rows of activations.

    Args:
        paths: the candidates.
        times: measures those of them that may be the fastest; asked for only where no path always wins.
    """
    contenders = candidates_at(tokens, paths)
    return min(contenders, key=times(contenders).__getitem__) if len(contenders) > 1 else contenders[0]


def buckets(max_tokens: int) -> list[int]:
    """The numbers of tokens for which a path is chosen: powers of two, the last at least `max_tokens`."""
    return [1 << power for power in range((max_tokens - 1).bit_length() + 1)]


Name = TypeVar("Name", bound=str)


def token_ranges(paths: Iterable[tuple[Name, int]]) -> list[tuple[Name, int]]:
    """From which path runs for which number of tokens, in rising order: each path and the last number of its range."""
    last: list[tuple[Name, int]] = []
    for path, tokens in paths:
        if last and last[-1][0] == path:
            last.pop()
        last.append((path, tokens))
    return last


def in_words(paths: Iterable[tuple[str, int]]) -> str:
    """The ranges as a log line has them: "one-launch (to 128 tokens), then library"."""
    *earlier, (last, _) = token_ranges(paths)
    return "".join(f"{path} (to {tokens} tokens), then " for path, tokens in earlier) + last


def reason_against(path: Path, problem: Problem, device: Device) -> str | None:
    """Why a path cannot run this problem here, or None if it can."""
    if path is Path.REFERENCE:
        return None
    if device.kind != "cuda" or device.capability is None:
        return f"it needs an NVIDIA GPU, and this is {device}"
    if device.capability < LIBRARY_CAPABILITY:
        return "it needs compute capability {}.{}, and this is {}.{}".format(*LIBRARY_CAPABILITY, *device.capability)
    if not device.bindings:
        return "nvmath-python is not installed (pip install 'nvmath-python[cu13]>=1.0')"
    sizes = (*problem.sparse_shape, *problem.dense_shape)
    if any(size % problem.weight_multiple for size in sizes):
        return f"region sizes {sizes} are not all multiples of {problem.weight_multiple}"
    if path is Path.ONE_LAUNCH:
        if device.capability != ONE_LAUNCH_CAPABILITY:
            return "it is written for compute capability {}.{}".format(*ONE_LAUNCH_CAPABILITY)
        return device.one_launch_fault
    return None


def granted_bytes(switch: str | None) -> int:
    """What a value of `SPENSE_DENSE_COPY_GIB` grants; None or nothing is none.

    Raises:
        SpenseError: it is no number, or less than 0.
    """
    try:
        gib = float(switch or 0)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise SpenseError(f"{GRANT}: found {switch}, expected a number of GiB, at least 0")
    return int(gib * 2**30)


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
