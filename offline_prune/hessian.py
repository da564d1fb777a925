"""Statistics of what a linear layer sees: H = Σ x·xᵀ, or only its diagonal."""

from __future__ import annotations

import torch

from offline_prune.meter import stage


class Hessian:
    """H = Σ x·xᵀ of one linear layer's inputs, float32 (K, K).

    Only panels from the diagonal rightwards are accumulated; the rest follows by symmetry.
    """

    #: Narrower panels save more of the half that is not needed, wider ones multiply faster.
    _PANELS = 8
    _NARROWEST = 512

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, size, device=device)
        width = max(self._NARROWEST, -(-size // self._PANELS))
        self._panels = [(start, min(start + width, size)) for start in range(0, size, width)]

    def add(self, inputs: torch.Tensor) -> None:
        """Adds (tokens, K), any float type. Products of BF16 values are exact in the FP32 sums."""
        with stage("Hessian"):
            native = inputs.is_cuda and inputs.dtype in (torch.bfloat16, torch.float16)
            x = inputs if native else inputs.float()
            for start, stop in self._panels:
                total, left, right = self._sum[start:stop, start:], x[:, start:stop].T, x[:, start:]
                if native:
                    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
                else:
                    total.addmm_(left, right)

    def matrix(self) -> torch.Tensor:
        """float32 (K, K), symmetric; the sum's own memory, so nothing can be added after this."""
        with stage("Hessian"):
            for start, stop in self._panels:
                corner = self._sum[start:stop, start:stop]
                corner.copy_(corner.triu() + corner.triu(1).T)
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            return self._sum


class Energy:
    """diag(H) = Σ x_j² of one linear layer's inputs, float32 (K,)."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.diagonal = torch.zeros(size, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Adds (tokens, K), any float type."""
        with stage("Hessian"):
            self.diagonal += torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32).square_()
