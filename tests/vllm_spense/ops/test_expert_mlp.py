"""All experts of a layer in one call, against their dense form in float64."""

from __future__ import annotations

import re

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.expert_gemm import mixture, reference
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.region_gemm.reference import quantize
from vllm_spense.kernels.tuning.synthetic import random_weight
from vllm_spense.ops import experts
from vllm_spense.ops.dispatch import Device
from vllm_spense.ops.experts import ACTIVATIONS, ExpertWeights, expert_mlp, pack, reason_against_kernel

E, H, REGIONS, TOKENS, K = 5, 64, Regions(64, 32), 12, 2
CPU = torch.device("cpu")


@pytest.fixture
def loaded() -> dict[str, torch.Tensor]:
    """As a server loads them."""
    torch.manual_seed(0)
    of_gate_up, of_down = Problem(192, H, REGIONS, "output", projections=2), Problem(H, 96, REGIONS, "input")
    gate_up, down = (torch.stack([random_weight(problem, CPU) for _ in range(E)]) for problem in (of_gate_up, of_down))
    return {
        "gate_up": gate_up,
        "gate_up_scale": torch.rand(E, 192, 1) / 128 + 1e-3,
        "down": down,
        "down_scale": torch.rand(E, H, 1) / 128 + 1e-3,
    }


def packed(loaded: dict[str, torch.Tensor]) -> ExpertWeights:
    return pack(**loaded, regions=REGIONS, dtype=torch.float32)


def routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(TOKENS)]).int()
    return ids, torch.rand(TOKENS, K, generator=generator)


def dequantized(x: torch.Tensor) -> torch.Tensor:
    values, scale = quantize(x)
    return values.double() * scale.double()


def expected(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, loaded: dict[str, torch.Tensor], activation: str = "silu"
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    gate_up, down = (loaded[part].double() * loaded[f"{part}_scale"].double() for part in ("gate_up", "down"))
    x8 = dequantized(x)
    for token in range(len(x)):
        for place, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                gate, up = (gate_up[expert] @ x8[token]).float().chunk(2)
                mid = dequantized((ACTIVATIONS[activation](gate) * up)[None])[0]
                out[token] += weights[token, place] * (down[expert] @ mid)
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_are_their_dense_form(activation: str, loaded: dict[str, torch.Tensor]) -> None:
    x, (ids, weights) = torch.randn(TOKENS, H), routing()
    found = expert_mlp(x, ids, weights, packed(loaded), activation)
    # An activation near the middle between two FP8 numbers may be rounded the other way.
    torch.testing.assert_close(found.double(), expected(x, ids, weights, loaded, activation), rtol=0.02, atol=0.05)


def test_experts_of_another_rank_and_without_tokens_add_nothing(loaded: dict[str, torch.Tensor]) -> None:
    x, (ids, weights) = torch.randn(TOKENS, H), routing()
    ids[ids == 3] = 1
    ids[::2, 0] = -1
    ids[0] = -1
    found = expert_mlp(x, ids, weights, packed(loaded))
    assert not found[0].any()
    torch.testing.assert_close(found.double(), expected(x, ids, weights, loaded), rtol=0.02, atol=0.05)


def test_one_expert_may_have_all_tokens(loaded: dict[str, torch.Tensor]) -> None:
    x, (_, weights) = torch.randn(TOKENS, H), routing()
    ids = torch.tensor([[4, -1]]).expand(TOKENS, K).contiguous()
    torch.testing.assert_close(
        expert_mlp(x, ids, weights, packed(loaded)).double(), expected(x, ids, weights, loaded), rtol=0.02, atol=0.05
    )


def test_no_tokens(loaded: dict[str, torch.Tensor]) -> None:
    none = torch.empty(0, K)
    assert expert_mlp(torch.empty(0, H), none.int(), none, packed(loaded)).shape == (0, H)


def test_each_region_has_a_tensor_of_its_own(loaded: dict[str, torch.Tensor]) -> None:
    weights = packed(loaded)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors().items()}
    assert shapes == {
        "gate_up_sparse": (E, 128, H),
        "gate_up_dense": (E, 64, H),
        "gate_up_scale": (E, 192),
        "down_sparse": (E, H, 64),
        "down_dense": (E, H, 32),
        "down_scale": (E, H),
    }
    up = loaded["gate_up"][2, 96:].float()
    assert torch.equal(weights.gate_up_sparse[2, 64:].float(), up[:64])
    assert torch.equal(weights.gate_up_dense[2, 32:].float(), up[64:])


def test_the_op_is_one_that_compilers_take(loaded: dict[str, torch.Tensor]) -> None:
    x, (ids, weights) = torch.randn(TOKENS, H), routing()
    arguments = (x, ids, weights, list(packed(loaded).tensors().values()), "silu")
    torch.library.opcheck(torch.ops.spense.expert_mlp.default, arguments)


def test_the_kernel_gets_its_own_weights(loaded: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin in its place; choices of another rank are −1, and may be strided."""
    monkeypatch.setattr(mixture, "run", reference.mixture)
    weights = pack(**loaded, regions=REGIONS, dtype=torch.bfloat16, by_kernel=True)
    assert weights.by_kernel
    assert not packed(loaded).by_kernel
    assert weights.gate_up_sparse.dtype == weights.down_sparse.dtype == torch.uint8
    x, (ids, shares) = torch.randn(TOKENS, H).bfloat16(), routing()
    ids[::2, 0] = -1
    found = expert_mlp(x, ids.t().contiguous().t(), shares, weights)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected(x, ids, shares, loaded), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"device": Device("cpu")}, "need compute capability 9.0, and this is cpu"),
        ({"device": Device("cuda", (10, 0), True)}, "this is cuda 10.0"),
        ({"device": Device("cuda", (9, 0), False)}, "nvmath-python is not installed"),
        ({"dtype": torch.float16}, "not silu in float16"),
        ({"activation": "gelu"}, "not gelu in bfloat16"),
        ({"regions": Regions(72, 24)}, r"\(2048, 72, 24\) are not all multiples of 32"),
        ({"hidden": 2000}, r"\(2000, 576, 192\)"),
        ({"count": 513}, "these are 513 and 8"),
        ({"top_k": 17}, "these are 128 and 17"),
        ({"fault": "its kernels are wrong"}, "its kernels are wrong"),
    ],
)
def test_where_the_kernel_runs(changes: dict, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {
        "hidden": 2048,
        "regions": Regions(576, 192),
        "count": 128,
        "top_k": 8,
        "dtype": torch.bfloat16,
        "activation": "silu",
        "device": Device("cuda", (9, 0), True),
        "fault": None,
        **changes,
    }
    machine, fault = case.pop("device"), case.pop("fault")
    monkeypatch.setattr(experts, "describe", lambda device: machine)
    monkeypatch.setattr(mixture, "fault", lambda experts, top_k, device: fault)
    reason = reason_against_kernel(**case, device=CPU)
    if words is None:
        assert reason is None
    else:
        assert re.search(words, reason or "")
