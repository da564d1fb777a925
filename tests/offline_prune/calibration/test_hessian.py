"""Sums over the calibration text against float64, wide enough for several panels."""

import pytest
import torch

from offline_prune.calibration.hessian import Energy, Hessian

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [96, 1100])
def test_panels_and_parts_make_the_whole_matrix(width: int) -> None:
    inputs = torch.randn(300, width, generator=torch.Generator().manual_seed(0))
    hessian, energy = Hessian(width, CPU), Energy(width, CPU)
    for part, tokens in enumerate(inputs.split((70, 90, 80, 60))):
        for batch in tokens.split(40):
            hessian.add(batch, part)
            energy.add(batch, part)
    exact = inputs.double().T @ inputs.double()
    found = hessian.matrix()
    assert torch.equal(found, found.T)
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert torch.allclose(energy.diagonal().double(), exact.diagonal(), rtol=1e-5)
