"""The custom ops of the GEMMs: `spense::region_gemm` of pruned layers, `spense::whole_gemm` of those that nothing was
pruned in. What stands between them is in `glue.py`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol, cast

import torch

from vllm_spense.kernels.region_gemm.problem import COPY, Problem, Scales
from vllm_spense.ops.dispatch import (
    GRANT,
    ONE_LAUNCH_CAPABILITY,
    SWITCH,
    Device,
    Path,
    candidates,
    choose,
    forced_path,
    granted_bytes,
    reason_against,
    rivals_for,
    tokens_of,
    turns,
)

if TYPE_CHECKING:
    from vllm_spense.kernels.region_gemm.unpruned_gemm import Stock

#: For whatever compiles the scales with what follows. They add reads to SiLU·mul·quant, and beyond a number of reads
#: Inductor would write its input out first, in a kernel of its own.
INDUCTOR_OPTIONS = {"realize_reads_threshold": 16, "realize_opcount_threshold": 100}

#: A dense GEMM must take at most this share of the time to be worth a copy of the weight.
_WORTH_A_COPY = 0.98

# A child of vLLM's logger: its handlers and level apply in every process that vLLM starts.
logger = logging.getLogger("vllm.spense")


class Kernel(Protocol):
    """What a file in kernels/ offers. Where two of them give a tensor the same name, it is the same tensor."""

    def pack(self, weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]: ...

    def prepare(self, problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None: ...

    def run(
        self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem, scales: Scales | None = None
    ) -> torch.Tensor: ...


class Rival(Kernel, Protocol):
    """A kernel that competes with another."""

    def found(self, problem: Problem, tokens: int, device: torch.device) -> dict[str, object]: ...


@cache
def kernel(path: Path) -> Kernel:
    """The module of a path, imported when it is first needed: not every machine has every library."""
    return cast(Kernel, importlib.import_module(f"vllm_spense.kernels.region_gemm.{path.name.lower()}"))


@cache
def prepare(problem: Problem, max_tokens: int, device: torch.device, copied: bool = False) -> None:
    """Makes whatever is slow to make, for up to `max_tokens` rows of activations, and says which path runs when.

    Args:
        copied: whether there is a `dense_copy` of the weight.
    """
    paths = _paths(problem, device, copied)
    for path in paths:
        if span := tokens_of(path, paths, max_tokens):
            kernel(path).prepare(problem, *span, device)
    logger.info(
        "Spense: %s-split %d × %d, 2:4 in %d and dense in %d, runs on %s by the %s path",
        problem.split,
        problem.n,
        problem.k,
        problem.parts * problem.regions.sparse,
        problem.parts * problem.regions.dense,
        describe(device),
        _turns(problem, max_tokens, device, copied),
    )
    if device.type == "cuda" and Path.REFERENCE in paths:
        logger.warning(
            "Spense: the reference path is slow on a GPU; the library path is not taken because %s",
            reason_against(Path.LIBRARY, problem, describe(device)) or f"{SWITCH} says so",
        )


def _turns(problem: Problem, max_tokens: int, device: torch.device, copied: bool = False) -> str:
    """In words, which path runs for how many tokens: "one-launch (to 128 tokens), then library"."""
    return _in_words((_path(problem, tokens, device, copied), tokens) for tokens in _buckets(max_tokens))


def _buckets(max_tokens: int) -> list[int]:
    """Numbers of tokens for which a path is chosen."""
    return [1 << power for power in range((max_tokens - 1).bit_length() + 1)]


def _in_words(paths: Iterable[tuple[str, int]]) -> str:
    *earlier, (last, _) = turns(paths)
    return "".join(f"{path} (to {tokens} tokens), then " for path, tokens in earlier) + last


def pack(weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """The weight as every path wants it that may run on the weight's device.

    Args:
        weight: (N, K) FP8 E4M3; in each of the problem's parts the sparse region first along its split.

    Returns:
        Named tensors for `region_gemm`; none shares memory with `weight`.
    """
    return _packed(_paths(problem, weight.device), weight, problem)


def _packed(paths: Iterable[Path], weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    packed: dict[str, torch.Tensor] = {}
    # Paths that share their bytes share the function.
    for pack_for in dict.fromkeys(kernel(path).pack for path in paths):
        packed |= pack_for(weight, problem)
    return packed


def dense_copy(weight: torch.Tensor, problem: Problem, max_tokens: int, layer: str) -> dict[str, torch.Tensor]:
    """What to pack beside `pack(weight, problem)` for the dense path: the weight itself, or nothing.

    A copy is kept where a dense GEMM is faster for some number of tokens up to `max_tokens`, as long as
    `SPENSE_DENSE_COPY_GIB` has room for it. A layer that is loaded again has it again.

    Args:
        layer: its name.
    """
    granted, size = granted_bytes(os.environ.get(GRANT)), problem.n * problem.k
    if not granted or _forced() or not _dense_wins(problem, max_tokens, weight.device):
        return {}
    others = sum(taken for name, taken in _copies.items() if name != layer)
    if others + size > granted:
        logger.info("Spense: no dense copy of %s: %s=%s is used up", layer, GRANT, os.environ[GRANT])
        return {}
    _copies[layer] = size
    return {COPY: weight}


#: Layer → bytes of its dense copy, in this process.
_copies: dict[str, int] = {}


@cache
def _dense_wins(problem: Problem, max_tokens: int, device: torch.device) -> bool:
    if Path.LIBRARY not in _paths(problem, device):
        return False

    def gains(tokens: int) -> bool:
        """Whether the dense path is clearly faster than what would run without it."""
        rivals = rivals_for(tokens, _paths(problem, device, copied=True))
        if Path.DENSE not in rivals:
            return False
        times = _times(rivals, problem, tokens, device)
        return times[Path.DENSE] <= _WORTH_A_COPY * min(times[path] for path in rivals if path is not Path.DENSE)

    won = [tokens for tokens in _buckets(max_tokens) if gains(tokens)]
    if won:
        ranges = ", ".join(f"{most // 2 + 1} to {most}" for most in won)
        logger.info(
            "Spense: a dense copy of each %d × %d, %.0f MiB, is faster with %s tokens",
            problem.n, problem.k, problem.n * problem.k / 2**20, ranges,
        )  # fmt: skip
    return bool(won)


def region_gemm(
    x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem, scales: Scales | None = None
) -> torch.Tensor:
    """X·Wᵀ of both regions: raw sums, or multiplied by the scales if the problem is scaled.

    Args:
        x: (M, K) FP8 E4M3.
        packed: what `pack` returned for W.
        scales: of a scaled problem's tokens and rows.

    Returns:
        (M, N) in the problem's out_dtype, columns in the order of W's rows.
    """
    return torch.ops.spense.region_gemm(x, *spell(packed, problem), *(scales or (None, None)))


def spell(packed: Mapping[str, torch.Tensor], problem: Problem) -> tuple[list[torch.Tensor], str]:
    """A problem and its weight as ops take them."""
    return list(packed.values()), " ".join([problem.spelled, *packed])


@cache
def read(spelled: str) -> tuple[Problem, list[str]]:
    """The problem and the names of its packed tensors."""
    problem, *names = spelled.split(" ")
    return Problem.read(problem), names


def _region_gemm(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    spelled: str,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    path, packed, problem = _decided(x, tensors, spelled)
    scales = None if x_scale is None or w_scale is None else (x_scale, w_scale)
    return kernel(path).run(x, packed, problem, scales)


def region_sums(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], spelled: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`region_gemm` from inside of an op, of a problem whose sums may come apart: (M, N), and what is to be added."""
    path, packed, problem = _decided(x, tensors, spelled)
    return _sums(path, x, packed, problem)


def _sums(
    path: Path, x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem, scales: Scales | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if path is Path.LIBRARY and problem.apart:
        from vllm_spense.kernels.region_gemm import library

        return library.sums(x, packed, problem)
    return kernel(path).run(x, packed, problem, scales), None


def _decided(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], spelled: str
) -> tuple[Path, Mapping[str, torch.Tensor], Problem]:
    problem, names = read(spelled)
    # The number of tokens is symbolic in a compiled graph: only in an op can it decide the path.
    # By powers of two, so that it is decided once for each.
    path = _path(problem, 1 << (x.shape[0] - 1).bit_length(), x.device, COPY in names)
    return path, dict(zip(names, tensors, strict=True)), problem


def _region_gemm_fake(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    spelled: str,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    problem, _ = read(spelled)
    return x.new_empty((x.shape[0], problem.n), dtype=problem.out_dtype)


def whole_gemm(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """x · Wᵀ · s_x · s_w, for a layer that `prepare_whole` knows.

    Args:
        x: (M, K) FP8 E4M3.
        weight: (N, K) FP8 E4M3, contiguous.
        x_scale, w_scale: float32 (M, 1) and (N, 1).

    Returns:
        (M, N) bfloat16.
    """
    return torch.ops.spense.whole_gemm(x, weight, x_scale, w_scale)


@cache
def prepare_whole(n: int, k: int, device: torch.device) -> bool:
    """Whether `whole_gemm` is to run layers of this size: makes whatever is slow to make, and says in the log if so."""
    problem = Problem.whole(n, k)
    if _forced() not in (None, Path.ONE_LAUNCH) or reason_against(Path.ONE_LAUNCH, problem, describe(device)):
        return False
    from vllm_spense.kernels.region_gemm import unpruned_gemm

    faster = unpruned_gemm.prepare(n, k, device, _stock())
    by_tokens = [("one-launch" if wins else "stock", tokens) for tokens, wins in faster.items()]
    beyond = ("stock", unpruned_gemm.MOST_TOKENS + 1)
    logger.info("Spense: not pruned %d × %d: %s", n, k, _in_words([*by_tokens, beyond]))
    return any(faster.values())


@cache
def _stock() -> Stock:
    from vllm import __version__

    from vllm_spense.kernels.region_gemm.unpruned_gemm import Stock

    return Stock(_cutlass, __version__)


def _cutlass(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """vLLM's kernel, for (N, K)."""
    out = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
    torch.ops._C.cutlass_scaled_mm(out, x, weight.t(), x_scale, w_scale, None)
    return out


def _whole_gemm(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    from vllm_spense.kernels.region_gemm import unpruned_gemm

    return unpruned_gemm.run(x, weight, x_scale, w_scale, _stock())


def _whole_gemm_fake(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


@cache
def _path(problem: Problem, tokens: int, device: torch.device, copied: bool = False) -> Path:
    return choose(_paths(problem, device, copied), tokens, lambda rivals: _times(rivals, problem, tokens, device))


@cache
def _times(paths: tuple[Path, ...], problem: Problem, tokens: int, device: torch.device) -> Mapping[str, float]:
    """µs of each path."""
    from vllm_spense.kernels.tuning import autotune
    from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight, unit_scales
    from vllm_spense.kernels.tuning.timing import cold_copies

    def calls() -> autotune.Rivals:
        weight = random_weight(problem, device)
        packs = [_packed(paths, weight, problem) for _ in range(cold_copies(problem.weight_bytes, device))]
        x, scales = random_fp8(tokens, problem.k, device), unit_scales(problem, tokens, device)
        return {path: [partial(_sums, path, x, packed, problem, scales) for packed in packs] for path in paths}

    found: dict[str, object] = {path: cast(Rival, kernel(path)).found(problem, tokens, device) for path in paths}
    return autotune.times(problem, tokens, device, found, calls)


@cache
def _paths(problem: Problem, device: torch.device, copied: bool = False) -> tuple[Path, ...]:
    return candidates(problem, describe(device), _forced(), copied)


@cache
def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(device.type)
    capability = torch.cuda.get_device_capability(device)
    bindings = importlib.util.find_spec("nvmath") is not None
    fault = None
    if bindings and capability == ONE_LAUNCH_CAPABILITY:
        from vllm_spense.kernels.region_gemm import one_launch

        fault = one_launch.fault(device)
        if fault:
            logger.warning("Spense: the one-launch path is not taken: %s", fault)
    return Device(device.type, capability, bindings, fault)


@cache
def _forced() -> Path | None:
    return forced_path(os.environ.get(SWITCH))


# Torch removes the ops of a library object that is collected.
LIBRARY = torch.library.Library("spense", "FRAGMENT")
LIBRARY.define(
    # Of what an op may take beside tensors, one string costs the host least.
    "region_gemm(Tensor x, Tensor[] tensors, str spelled, Tensor? x_scale=None, Tensor? w_scale=None) -> Tensor"
)
LIBRARY.impl("region_gemm", _region_gemm, "CompositeExplicitAutograd")
torch.library.register_fake("spense::region_gemm", _region_gemm_fake, lib=LIBRARY)
LIBRARY.define("whole_gemm(Tensor x, Tensor weight, Tensor x_scale, Tensor w_scale) -> Tensor")
LIBRARY.impl("whole_gemm", _whole_gemm, "CUDA")
torch.library.register_fake("spense::whole_gemm", _whole_gemm_fake, lib=LIBRARY)
