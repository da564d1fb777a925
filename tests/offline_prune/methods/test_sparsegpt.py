"""SparseGPT against a float64 implementation without a factorization, blocks or groups of updates."""

import pytest
import torch

from offline_prune.methods.fp8 import COMPENSATION_HEADROOM, channel_scales, round_to_fp8
from offline_prune.methods.sparsegpt import inverse_factor, sparsegpt
from vllm_spense.errors import SpenseError
from vllm_spense.layout import excess_groups


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs


def straightforward(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparse_rows: torch.Tensor,
    sparse_columns: torch.Tensor,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """The same equations from the dense inverse, eliminating one column at a time, in float64."""
    w, h = weight.double().clone(), hessian.double()
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h)))
    inverses = []
    for c in range(len(h)):
        inverses.append(inverse)
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    pruned = torch.zeros_like(w, dtype=torch.bool)
    for c in range(len(h)):
        if sparse_columns[c] and (int(sparse_columns[:c].sum()) % 4 == 0):
            pivots = torch.stack([inverses[j][j, j] for j in range(c, c + 4)])
            worst = (w[:, c : c + 4].square() / pivots).argsort(1)[:, :2]
            pruned[:, c : c + 4].scatter_(1, worst, True)
            pruned[~sparse_rows] = False
        final = w[:, c].masked_fill(pruned[:, c], 0)
        if scales is not None:
            final = round_to_fp8(final[:, None].float(), scales)[:, 0].double()
        error = (w[:, c] - final) / inverses[c][c, c]
        w[:, c] = final
        w[:, c + 1 :] -= torch.outer(error, inverses[c][c, c + 1 :])
    return w


def loss(weight: torch.Tensor, result: torch.Tensor, hessian: torch.Tensor) -> float:
    delta = result.double() - weight.double()
    return float(((delta @ hessian.double()) * delta).sum())


LAST = torch.arange(160) < 96
CASES = {
    "2:4": (torch.ones(64, dtype=torch.bool), torch.ones(160, dtype=torch.bool)),
    "rows": (torch.arange(64) % 32 < 20, torch.ones(160, dtype=torch.bool)),
    "back": (torch.ones(64, dtype=torch.bool), LAST),
    "front": (torch.ones(64, dtype=torch.bool), LAST.flip(0)),
    "scattered": (torch.ones(64, dtype=torch.bool), (torch.arange(160) % 10 < 4)),
}


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case: str, rounding: bool) -> None:
    sparse_rows, sparse_columns = CASES[case]
    weight, hessian = problem(64, 160)
    scales = channel_scales(weight) if rounding else None
    factor = inverse_factor(hessian, 0.01, "layer")
    result = sparsegpt(
        weight, factor, sparse_rows=sparse_rows, sparse_columns=sparse_columns, scales=scales, block_size=48
    )
    expected = straightforward(weight, hessian, sparse_rows, sparse_columns, scales)

    region, wanted = result[sparse_rows][:, sparse_columns], expected[sparse_rows][:, sparse_columns]
    assert not excess_groups(region).any()
    same = ((region == 0) == (wanted == 0)).unflatten(1, (-1, 4)).all(-1).float().mean()
    assert same >= 0.999
    assert loss(weight, result, hessian) == pytest.approx(loss(weight, expected, hessian), rel=1e-3)
    if not rounding:
        assert torch.equal(result[~sparse_rows], weight[~sparse_rows])


def test_compensation_beats_the_mask_alone() -> None:
    weight, hessian = problem(64, 160)
    everywhere = torch.ones(160, dtype=torch.bool)
    result = sparsegpt(
        weight,
        inverse_factor(hessian, 0.01, "layer"),
        sparse_rows=torch.ones(64, dtype=torch.bool),
        sparse_columns=everywhere,
    )
    masked = weight.masked_fill(result == 0, 0)
    assert loss(weight, result, hessian) < 0.7 * loss(weight, masked, hessian)


def test_rounding_inside_the_loop_adds_less_than_rounding_after_it() -> None:
    weight, hessian = problem(256, 320)
    factor = inverse_factor(hessian, 0.01, "layer")
    rows, columns = torch.ones(256, dtype=torch.bool), torch.arange(320) < 160
    pruned = sparsegpt(weight, factor, sparse_rows=rows, sparse_columns=columns)
    after = round_to_fp8(pruned, channel_scales(pruned))
    scales = channel_scales(weight, COMPENSATION_HEADROOM)
    inside = sparsegpt(weight, factor, sparse_rows=rows, sparse_columns=columns, scales=scales)
    base = loss(weight, pruned, hessian)
    assert loss(weight, inside, hessian) - base < 0.75 * (loss(weight, after, hessian) - base)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = problem(4, 96)
    factor = inverse_factor(hessian, 0.05, "layer")
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(96)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(96, dtype=torch.float64), atol=1e-3)


def test_damping_rises_until_the_factorization_succeeds() -> None:
    _, hessian = problem(4, 32)
    broken = hessian - 0.2 * hessian.diagonal().mean() * torch.eye(32)
    assert torch.linalg.eigvalsh(broken).min() < 0
    factor = inverse_factor(broken, 0.01, "layer")
    assert factor.damping > 0.01
    assert torch.isfinite(factor.upper).all()


def test_a_hopeless_hessian_stops_with_the_layers_name() -> None:
    hopeless = torch.eye(8)
    hopeless[0, 1] = hopeless[1, 0] = 100.0
    with pytest.raises(SpenseError, match=r"model\.layers\.7\.mlp.*not positive definite"):
        inverse_factor(hopeless, 0.01, "model.layers.7.mlp")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_an_unusable_hessian_stops_with_the_layers_name(value: float) -> None:
    with pytest.raises(SpenseError, match=r"model\.layers\.7\.mlp.*not usable"):
        inverse_factor(torch.eye(8) * value, 0.01, "model.layers.7.mlp")
