"""Which path is taken where; no device is needed to ask."""

from collections.abc import Callable

import pytest

from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.ops.dispatch import (
    ALWAYS_ONE_LAUNCH,
    NEVER_ONE_LAUNCH,
    Device,
    Path,
    candidates,
    choose,
    forced_path,
    granted_bytes,
    reason_against,
    tokens_of,
)

PROBLEM = Problem(128, 64, Regions(96, 32), "output")
HOPPER = Device("cuda", (9, 0), bindings=True)
BLACKWELL = Device("cuda", (10, 0), bindings=True)
BOTH = (Path.ONE_LAUNCH, Path.LIBRARY)
ALL = (*BOTH, Path.DENSE)


def never(paths: tuple[Path, ...]) -> dict[str, float]:
    raise AssertionError("measured where nothing is in doubt")


def won_by(faster: Path) -> Callable[[tuple[Path, ...]], dict[str, float]]:
    """Times of whatever is asked for."""
    return lambda paths: {path: 10.0 if path is faster else 11.0 for path in paths}


def test_a_hopper_with_the_bindings_has_both_fast_paths() -> None:
    assert candidates(PROBLEM, HOPPER) == BOTH
    for tokens in (1, 16, ALWAYS_ONE_LAUNCH):
        assert choose(BOTH, tokens, never) is Path.ONE_LAUNCH
    for tokens in (NEVER_ONE_LAUNCH + 1, 16384):
        assert choose(BOTH, tokens, never) is Path.LIBRARY


@pytest.mark.parametrize("faster", BOTH)
@pytest.mark.parametrize("tokens", [ALWAYS_ONE_LAUNCH + 1, NEVER_ONE_LAUNCH])
def test_between_them_the_clock_decides(tokens: int, faster: Path) -> None:
    assert choose(BOTH, tokens, won_by(faster)) is faster


def test_a_dense_copy_competes_with_both() -> None:
    assert candidates(PROBLEM, HOPPER, dense_copy=True) == ALL
    for tokens, measured in ((ALWAYS_ONE_LAUNCH, ()), (100, ALL), (1000, ALL[1:])):
        for faster in measured:
            asked = []

            def times(of: tuple[Path, ...], asked=asked, faster=faster) -> dict[str, float]:
                asked.append(of)
                return won_by(faster)(of)

            assert choose(ALL, tokens, times) is faster
            assert asked == [measured]
    assert choose(ALL, ALWAYS_ONE_LAUNCH, never) is Path.ONE_LAUNCH
    # Without the one-launch path the other two compete for any number of tokens.
    assert choose(ALL[1:], 1, won_by(Path.DENSE)) is Path.DENSE
    assert candidates(PROBLEM, Device("cpu"), dense_copy=True) == (Path.REFERENCE,)


@pytest.mark.parametrize("paths", [BOTH, ALL, ALL[1:]], ids=len)
@pytest.mark.parametrize("max_tokens", [1, 64, 65, 300, 8192])
def test_whatever_may_be_chosen_is_prepared(max_tokens: int, paths: tuple[Path, ...]) -> None:
    for tokens in range(1, max_tokens + 1):
        for faster in paths:
            chosen = choose(paths, tokens, won_by(faster))
            span = tokens_of(chosen, paths, max_tokens)
            assert span is not None
            assert span[0] <= tokens <= span[1]
    assert tokens_of(Path.LIBRARY, BOTH, ALWAYS_ONE_LAUNCH) is None
    assert tokens_of(Path.LIBRARY, (Path.LIBRARY,), 8) == (1, 8)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (BLACKWELL, "it is written for compute capability 9.0"),
        (
            Device("cuda", (9, 0), bindings=True, one_launch_fault="a layout that is not known"),
            "layout that is not known",
        ),
    ],
)
def test_the_libraries_run_alone_where_the_kernel_cannot(device: Device, reason: str) -> None:
    assert candidates(PROBLEM, device) == (Path.LIBRARY,)
    assert choose((Path.LIBRARY,), 1, never) is Path.LIBRARY
    with pytest.raises(SpenseError, match=f"SPENSE_PATH=one-launch cannot be followed: .*{reason}"):
        candidates(PROBLEM, device, Path.ONE_LAUNCH)


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
    for path in BOTH:
        assert reason in str(reason_against(path, problem, device))
        with pytest.raises(SpenseError, match=f"SPENSE_PATH={path} cannot be followed"):
            candidates(problem, device, path)


def test_the_switch_wins() -> None:
    for path in Path:
        assert candidates(PROBLEM, HOPPER, forced_path(path.value)) == (path,)
    assert forced_path(None) is None
    assert forced_path("") is None


def test_a_typo_in_the_switch_is_an_error() -> None:
    with pytest.raises(
        SpenseError, match=r"SPENSE_PATH: found libary, expected reference \| library \| one-launch \| dense"
    ):
        forced_path("libary")


@pytest.mark.parametrize("switch", ["8 GiB", "-1", "nan", "inf"])
def test_a_grant_that_is_no_size(switch: str) -> None:
    with pytest.raises(SpenseError, match=f"SPENSE_DENSE_COPY_GIB: found {switch}, expected a number of GiB"):
        granted_bytes(switch)


def test_a_grant_is_in_gib() -> None:
    assert granted_bytes("1.5") == 3 << 29
    assert granted_bytes(None) == granted_bytes("") == 0
