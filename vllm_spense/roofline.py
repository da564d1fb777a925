"""How long a GEMM takes on a GPU, by a roofline with efficiencies that were measured. Needs no GPU.

A region of a GEMM takes about the longer of

    bytes / (memory bandwidth · efficiency)    and    FLOPs / (tensor core peak · efficiency).

vLLM's CUTLASS kernel, which stock runs for every FP8 layer but experts, also spends what its tiles leave idle:
`cutlass_us`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """By its data sheet.

    Attributes:
        name: as part of what the driver calls it.
        memory_bytes: capacity.
        bytes_per_s: memory bandwidth.
        fp8_flops: of dense FP8 tensor cores; 2:4 doubles it, BF16 halves it.
        sms: streaming multiprocessors, which the tensor cores belong to.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    fp8_flops: float
    sms: int


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu("H100", 80e9, 3.35e12, 1979e12, 132),
    "h200": Gpu("H200", 141e9, 4.8e12, 1979e12, 132),
    "b200": Gpu("B200", 180e9, 8e12, 4500e12, 148),
}


def gpu_named(name: str) -> Gpu | None:
    """That of which a driver's name speaks; None without its data sheet."""
    return next((gpu for gpu in GPUS.values() if gpu.name in name), None)


@dataclass(frozen=True)
class Efficiency:
    """Share of the data sheet's figures that kernels reach."""

    memory: float
    tensor_cores: float


#: Of FP8 GEMMs in MLPs and, smaller, in attention: stock's and Spense's; of the last layer in BF16; and of reading the
#: KV cache. Where tensor cores limit attention's, Spense leaves them to the CUTLASS kernel too.
STOCK = Efficiency(0.81, 0.68)
STOCK_ATTENTION = Efficiency(0.6, 0.68)
DENSE_REGION = Efficiency(0.79, 0.66)
SPARSE_REGION = Efficiency(0.77, 0.46)
SPENSE_ATTENTION = Efficiency(0.74, 0.68)
LM_HEAD = Efficiency(0.83, 0.68)
KV_CACHE = 0.74
#: Of experts' GEMMs.
STOCK_EXPERTS = Efficiency(0.82, 0.5)
SPARSE_EXPERTS = DENSE_EXPERTS = Efficiency(0.88, 0.4)
#: Of vLLM's CUTLASS kernel for FP8 on Hopper: up to how many tokens a tile has how many rows of the weight × tokens.
_TILES = ((16, (64, 16)), (64, (64, 64)), (128, (128, 64)), (math.inf, (128, 128)))
#: On this GPU it takes longer with so many tokens than with 64, which nothing here explains: with 32 1.1 to 1.3 times
#: as long (gemm_sweep-h200.json).
_SLOW_CUTLASS = ("H200", range(17, 64))
#: Near the knee of the roofline both limits add to the time: its sum is that of powers with this exponent.
_KNEE = 4


@dataclass(frozen=True)
class Gemm:
    """A GEMM (N, K) of two regions, as the plan cache spells it."""

    n: int
    k: int
    split: str
    sparse: int
    dense: int

    def us(self, tokens: int, gpu: Gpu) -> float:
        """Time for M = `tokens`, by the roofline."""
        share = self.dense / (self.sparse + self.dense)
        dense = region_us(self.n * self.k * share, tokens, gpu, DENSE_REGION)
        return dense + region_us(
            self.n * self.k * (1 - share), tokens, gpu, SPARSE_REGION, weight_bytes=0.625, flops=0.5
        )


def cutlass_us(n: int, k: int, tokens: int, gpu: Gpu, efficiency: Efficiency) -> float:
    """Time of a GEMM (N, K) by vLLM's CUTLASS kernel, which takes as long as the SM with the most tiles.

    Idle SMs and the empty rows of tiles count as products: 80 tiles take as long as 132 do.
    """
    rows, columns = next(tile for most, tile in _TILES if tokens <= most)
    tiles = -(-n // rows) * -(-tokens // columns)
    computed = -(-tiles // gpu.sms) * gpu.sms * rows * columns / n
    return region_us(n * k, computed, gpu, efficiency)


def cutlass_is_slower(tokens: int, gpu: Gpu) -> bool:
    """Whether vLLM's CUTLASS kernel is slower there than `cutlass_us` says, and stock with it."""
    name, slow = _SLOW_CUTLASS
    return gpu.name == name and tokens in slow


def region_us(
    weights: float, tokens: float, gpu: Gpu, efficiency: Efficiency, weight_bytes: float = 1, flops: float = 1
) -> float:
    """Time of one region of a GEMM.

    Args:
        weights: how many, N · K.
        tokens: that each weight is multiplied by.
        weight_bytes: of each; 0.625 where they are 2:4.
        flops: relative to dense FP8; 0.5 where weights are 2:4.
    """
    memory = weights * weight_bytes / (gpu.bytes_per_s * efficiency.memory)
    tensor_cores = 2 * tokens * weights * flops / (gpu.fp8_flops * efficiency.tensor_cores)
    return (memory**_KNEE + tensor_cores**_KNEE) ** (1 / _KNEE) * 1e6
