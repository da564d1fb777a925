"""What a GEMM of two regions is, as every path sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch

from vllm_spense.format import Regions

#: "output": the regions split N, each GEMM writes its own columns of the output (gate and up).
#: "input": the regions split K, both GEMMs add to the same output (down).
Split = Literal["output", "input"]

#: float32, of M tokens and of the N rows of W.
Scales = tuple[torch.Tensor, torch.Tensor]

#: What a dense copy of a weight is called among its packed tensors: float8_e4m3fn (N, K), as it runs.
DENSE_COPY = "dense_copy"

#: Raw sums reach 448² · K: far beyond float16.
OUT_DTYPES = (torch.bfloat16, torch.float32)


def sum_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """What raw sums are kept in: they are too large for float16, and bfloat16 is coarser than it."""
    return torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True)
class Problem:
    """out[m, n] = Σ_k x[m, k] · W[n, k].

    Attributes:
        n, k: of W. Input-split: its columns are [sparse | dense].
        regions: along the split, of each projection.
        projections: how many projections an output-split W merges. Its rows are those of one after the other, each
            [sparse | dense]: the order that the model wants the output's columns in.
        scaled: outputs are multiplied by the scales of tokens and rows; else they are raw sums.
        separate_outputs: an input-split GEMM may leave each region's raw sums in an output of its own: what follows
            adds them up.
        op_key: all of this in one word, which a custom op takes; `from_op_key` reads it.
        weight_multiple: cuSPARSELt takes FP8 weights whose sizes are multiples of this.
    """

    weight_multiple: ClassVar[int] = 32

    n: int
    k: int
    regions: Regions
    split: Split
    out_dtype: torch.dtype = torch.bfloat16
    projections: int = 1
    scaled: bool = False
    separate_outputs: bool = False
    op_key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        extent = self.n if self.split == "output" else self.k
        assert self.projections * self.regions.intermediate == extent, (
            f"{self.projections} × {self.regions} do not make up {extent}"
        )
        assert self.split == "output" or self.projections == 1, "input-split weights are not merged"
        assert self.out_dtype in OUT_DTYPES, self.out_dtype
        assert not self.separate_outputs or (self.split == "input" and not self.scaled), (
            "only raw sums of input-split GEMMs"
        )
        # Now, because the compiler cannot trace this.
        object.__setattr__(self, "op_key", "/".join(map(str, self.describe().values())))

    @classmethod
    def unpruned(cls, n: int, k: int) -> Problem:
        """The GEMM of a layer that nothing was pruned in."""
        return cls(n, k, Regions(0, k), "input", scaled=True)

    @property
    def sparse_shape(self) -> tuple[int, int]:
        """(rows, columns) of one projection's sparse region."""
        return self._shape(self.regions.sparse)

    @property
    def dense_shape(self) -> tuple[int, int]:
        """(rows, columns) of one projection's dense region."""
        return self._shape(self.regions.dense)

    def _shape(self, extent: int) -> tuple[int, int]:
        return (extent, self.k) if self.split == "output" else (self.n, extent)

    def split_regions(self, weight: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of (sparse, dense) of W (N, K), or of anything with W's rows, for each projection."""
        sizes, dim = (self.regions.sparse, self.regions.dense), 0 if self.split == "output" else 1
        return [
            (sparse, dense) for sparse, dense in (rows.split(sizes, dim) for rows in weight.chunk(self.projections))
        ]

    def region_major(self) -> Problem:
        """The GEMM of `by_region(W)`, as of one projection: one library call for each region."""
        regions = Regions(self.projections * self.regions.sparse, self.projections * self.regions.dense)
        return replace(self, regions=regions, projections=1)

    def by_region(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of an output-split W: sparse regions of all projections first, then the dense ones."""
        return torch.cat([region for regions in zip(*self.split_regions(weight), strict=True) for region in regions])

    @property
    def weight_bytes(self) -> int:
        """Bytes of W as every path stores it: 0.625 for each weight of the sparse region, 1 for each dense one."""
        (sn, sk), (dn, dk) = self.sparse_shape, self.dense_shape
        return self.projections * (sn * sk * 5 // 8 + dn * dk)

    @property
    def ideal(self) -> float:
        """Speed-up over dense when only weight bytes take time: 1 / (ρ + 0.625 (1 − ρ))."""
        return self.n * self.k / self.weight_bytes

    def describe(self) -> dict[str, object]:
        """As JSON, for the plan cache and the log."""
        return {
            "n": self.n,
            "k": self.k,
            "split": self.split,
            "projections": self.projections,
            "scaled": self.scaled,
            "separate_outputs": self.separate_outputs,
            **self.regions.to_dict(),
            "out_dtype": str(self.out_dtype).removeprefix("torch."),
        }

    @classmethod
    def from_op_key(cls, key: str) -> Problem:
        """The problem whose `op_key` this is."""
        n, k, split, projections, scaled, separate, sparse, dense, dtype = key.split("/")
        return cls(
            n=int(n),
            k=int(k),
            regions=Regions(int(sparse), int(dense)),
            split=cast(Split, split),
            out_dtype=getattr(torch, dtype),
            projections=int(projections),
            scaled=scaled == str(True),
            separate_outputs=separate == str(True),
        )
