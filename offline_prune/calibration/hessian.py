"""Statistics of what a linear layer sees on all ranks: H = Σ x·xᵀ, or only its diagonal."""

from __future__ import annotations

import torch

from offline_prune.runtime.deterministic_reduce import ShardSums
from offline_prune.runtime.profiler import stage


class Hessian:
    """H = Σ x·xᵀ of one linear layer's inputs, float32 (K, K).

    Only panels from the diagonal rightwards are accumulated; the rest follows by symmetry.

    Args:
        few: that inputs come few at a time, so that on a GPU one product takes less time than several smaller ones.
    """

    #: Narrower panels save more of the half that is not needed, wider ones multiply faster.
    _PANELS = 8
    _NARROWEST = 512

    def __init__(self, size: int, device: torch.device, few: bool = False) -> None:
        self._sums = ShardSums((size, size), device)
        width = size if few and device.type == "cuda" else max(self._NARROWEST, -(-size // self._PANELS))
        self._panels = [(start, min(start + width, size)) for start in range(0, size, width)]

    def add(self, inputs: torch.Tensor, shard: int = 0) -> None:
        """Adds (tokens, K), any float type, of a shard of the text. Products of BF16 values are exact in FP32."""
        with stage("Hessian"):
            self.add_untimed(inputs, shard)

    def add_untimed(self, inputs: torch.Tensor, shard: int = 0) -> None:
        """As `add`, in whatever stage the caller is: a stage waits for the GPU, too long for the little that one of
        many experts sees."""
        whole = self._sums.of(shard)
        native = inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16)
        x = inputs if native else inputs.float()
        for start, stop in self._panels:
            total, left, right = whole[start:stop, start:], x[:, start:stop].T, x[:, start:]
            if native:
                torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
            else:
                total.addmm_(left, right)

    def skip_to(self, shard: int) -> None:
        """Shards before this one that were given nothing are empty."""
        self._sums.skip_to(shard)

    def result(self) -> torch.Tensor:
        """As `matrix`."""
        return self.matrix()

    def matrix(self) -> torch.Tensor:
        """float32 (K, K), symmetric. Nothing can be added after this, and it cannot be asked for twice."""
        with stage("Hessian"):
            whole = self._sums.total()
            for start, stop in self._panels:
                corner = whole[start:stop, start:stop]
                corner.copy_(corner.triu() + corner.triu(1).T)
                whole[stop:, start:stop] = whole[start:stop, stop:].T
            return whole


class Energy:
    """diag(H) = Σ x_j² of one linear layer's inputs, float32 (K,). Made as `Hessian` is; `few` changes nothing here."""

    def __init__(self, size: int, device: torch.device, few: bool = False) -> None:
        self._sums = ShardSums((size,), device)

    def add(self, inputs: torch.Tensor, shard: int = 0) -> None:
        """Adds (tokens, K), any float type, of a shard of the text."""
        with stage("Hessian"):
            self.add_untimed(inputs, shard)

    def add_untimed(self, inputs: torch.Tensor, shard: int = 0) -> None:
        """See `Hessian.add_untimed`."""
        self._sums.of(shard).add_(torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_())

    def skip_to(self, shard: int) -> None:
        """Shards before this one that were given nothing are empty."""
        self._sums.skip_to(shard)

    def result(self) -> torch.Tensor:
        """As `diagonal`."""
        return self.diagonal()

    def diagonal(self) -> torch.Tensor:
        """float32 (K,). Nothing can be added after this, and it cannot be asked for twice."""
        return self._sums.total()
