"""Which path is taken where; no device is needed to ask."""

import pytest

from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions
from vllm_spense.kernels.problem import Problem
from vllm_spense.policy import Device, Path, candidates, choose, forced_path, reason_against_library

PROBLEM = Problem(128, 64, Regions(96, 32), "output")
HOPPER = Device("cuda", (9, 0), bindings=True)


def test_a_hopper_with_the_bindings_takes_the_libraries() -> None:
    assert reason_against_library(PROBLEM, HOPPER) is None
    for tokens in (1, 16, 8192):
        assert choose(PROBLEM, tokens, HOPPER) is Path.LIBRARY


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (PROBLEM, Device("cpu"), "needs an NVIDIA GPU, and this is cpu"),
        (PROBLEM, Device("cuda", (8, 0), bindings=True), "needs compute capability 9.0, and this is 8.0"),
        (PROBLEM, Device("cuda", (9, 0)), "pip install 'nvmath-python"),
        (Problem(144, 64, Regions(112, 32), "output"), HOPPER, "not all multiples of 32"),
        (Problem(64, 144, Regions(96, 48), "input"), HOPPER, "not all multiples of 32"),
    ],
)
def test_everything_else_takes_the_reference_and_says_why(problem: Problem, device: Device, reason: str) -> None:
    assert candidates(problem, device) == (Path.REFERENCE,)
    assert reason in str(reason_against_library(problem, device))
    with pytest.raises(SpenseError, match="SPENSE_PATH=library cannot be followed"):
        candidates(problem, device, Path.LIBRARY)


def test_the_switch_wins() -> None:
    assert choose(PROBLEM, 16, HOPPER, forced_path("reference")) is Path.REFERENCE
    assert choose(PROBLEM, 16, HOPPER, forced_path("library")) is Path.LIBRARY
    assert forced_path(None) is None
    assert forced_path("") is None


def test_a_typo_in_the_switch_is_an_error() -> None:
    with pytest.raises(SpenseError, match=r"SPENSE_PATH: found libary, expected reference \| library"):
        forced_path("libary")
