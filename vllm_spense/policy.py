"""Which execution path runs a pruned linear layer: pure functions of the problem, testable without its device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vllm_spense.kernels.problem import Problem


class Path(StrEnum):
    """The ways to run a layer; `vllm_spense.ops.KERNELS` holds the kernel of each."""

    REFERENCE = "reference"


@dataclass(frozen=True)
class Device:
    """What a choice depends on: torch's name for the kind of device, and CUDA's compute capability."""

    kind: str
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.kind if self.capability is None else "{} {}.{}".format(self.kind, *self.capability)


def candidates(problem: Problem, device: Device) -> tuple[Path, ...]:
    """Every path that `choose` returns for some number of tokens; a layer's weight is packed for each of them."""
    return (Path.REFERENCE,)


def choose(problem: Problem, tokens: int, device: Device) -> Path:
    """The path for `tokens` rows of activations: one of the candidates."""
    return candidates(problem, device)[0]
