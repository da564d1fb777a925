"""The custom ops: `spense::region_gemm` of pruned layers, `spense::silu_mul_quant` between them, and
`spense::whole_gemm` of layers that nothing was pruned in.

Pruned layers' GEMMs take FP8 and return raw sums. Scales stay outside: in `silu_mul_quant`, or as ordinary torch that
Inductor fuses into what follows.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Protocol, cast

import torch

from vllm_spense.format import Regions
from vllm_spense.kernels import reference
from vllm_spense.kernels.problem import Problem, Scales
from vllm_spense.policy import (
    ONE_LAUNCH_CAPABILITY,
    SWITCH,
    Device,
    Path,
    candidates,
    choose,
    forced_path,
    reason_against,
    tokens_of,
    turns,
)

#: For whatever compiles the scales with what follows. They add reads to SiLU·mul·quant, and beyond a number of reads
#: Inductor would write its input out first, in a kernel of its own.
INDUCTOR_OPTIONS = {"realize_reads_threshold": 16, "realize_opcount_threshold": 100}

# A child of vLLM's logger: its handlers and level apply in every process that vLLM starts.
logger = logging.getLogger("vllm.spense")


class Kernel(Protocol):
    """What a file in kernels/ offers. Where two of them give a tensor the same name, it is the same tensor."""

    def pack(self, weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]: ...

    def prepare(self, problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None: ...

    def run(
        self, x: torch.Tensor, packed: Mapping[str, torch.Tensor], problem: Problem, scales: Scales | None = None
    ) -> torch.Tensor: ...


class Timed(Kernel, Protocol):
    """A kernel that competes with another."""

    def us(self, problem: Problem, tokens: int, device: torch.device) -> float: ...


@cache
def kernel(path: Path) -> Kernel:
    """The module of a path, imported when it is first needed: not every machine has every library."""
    return cast(Kernel, importlib.import_module(f"vllm_spense.kernels.{path.name.lower()}"))


@cache
def prepare(problem: Problem, max_tokens: int, device: torch.device) -> None:
    """Makes whatever is slow to make, for up to `max_tokens` rows of activations, and says which path runs when."""
    paths = _paths(problem, device)
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
        _describe(device),
        _turns(problem, max_tokens, device),
    )
    if device.type == "cuda" and Path.REFERENCE in paths:
        logger.warning(
            "Spense: the reference path is slow on a GPU; the library path is not taken because %s",
            reason_against(Path.LIBRARY, problem, _describe(device)) or f"{SWITCH} says so",
        )


def _turns(problem: Problem, max_tokens: int, device: torch.device) -> str:
    """In words, which path runs for how many tokens: "one-launch (to 128 tokens), then library"."""
    buckets = [1 << power for power in range((max_tokens - 1).bit_length() + 1)]
    return _in_words((_path(problem, tokens, device), tokens) for tokens in buckets)


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
    packed: dict[str, torch.Tensor] = {}
    # Paths that share their bytes share the function.
    for pack_for in dict.fromkeys(kernel(path).pack for path in _paths(problem, weight.device)):
        packed |= pack_for(weight, problem)
    return packed


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
    sizes = _describe_problem(problem)
    return torch.ops.spense.region_gemm(
        x, list(packed.values()), list(packed), sizes, problem.out_dtype, *(scales or (None, None))
    )


def _describe_problem(problem: Problem) -> list[int]:
    regions = problem.regions
    return [
        problem.n,
        problem.k,
        regions.sparse,
        regions.dense,
        problem.split == "output",
        problem.parts,
        problem.scaled,
    ]


@cache
def _problem(
    out_dtype: torch.dtype, n: int, k: int, sparse: int, dense: int, output: int, parts: int, scaled: int
) -> Problem:
    return Problem(n, k, Regions(sparse, dense), "output" if output else "input", out_dtype, parts, bool(scaled))


def _region_gemm(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    names: Sequence[str],
    sizes: Sequence[int],
    out_dtype: torch.dtype,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    problem = _problem(out_dtype, *sizes)
    # The number of tokens is symbolic in a compiled graph: only in here can it decide the path.
    # By powers of two, so that it is decided once for each.
    path = _path(problem, 1 << (x.shape[0] - 1).bit_length(), x.device)
    scales = None if x_scale is None or w_scale is None else (x_scale, w_scale)
    return kernel(path).run(x, dict(zip(names, tensors, strict=True)), problem, scales)


def _region_gemm_fake(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    names: Sequence[str],
    sizes: Sequence[int],
    out_dtype: torch.dtype,
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], sizes[0]), dtype=out_dtype)


def silu_mul_quant(
    raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up in FP8, as `kernels.reference.silu_mul_quant` computes it.

    Args:
        raw: (M, 2·I), gate_up's raw sums by region: [gate sparse | up sparse | gate dense | up dense].
        x_scale: float32 (M, 1), of gate_up's input.
        w_scale: float32 (2·I, 1), of gate_up's weight, gate's rows before up's.
        boundary: columns of a sparse region.

    Returns:
        float8_e4m3fn (M, I) and its scales, float32 (M, 1).
    """
    return torch.ops.spense.silu_mul_quant(raw, x_scale, w_scale, boundary)


def fuses_activation(problem: Problem, device: torch.device) -> bool:
    """Whether `silu_mul_quant` has a kernel for what a merged gate_up puts out; makes it ready if so.

    Elsewhere traced torch is faster than an op that Inductor cannot fuse with anything.
    """
    if device.type == "cpu":
        return True
    if reason_against(Path.ONE_LAUNCH, problem, _describe(device)):
        return False
    from vllm_spense.kernels import silu_mul_quant as fast

    if fault := fast.fault(device):
        logger.warning("Spense: SiLU · mul · quantize is left to the compiler: %s", fault)
        return False
    fast.prepare(problem.n // 2, problem.out_dtype, device)
    return True


def add_norm_quant(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMS norm of x + residual in FP8, as `kernels.reference.add_norm_quant` computes it.

    Args:
        x, residual: (M, K) in the model's dtype.
        weight: (K,), of the norm.
        epsilon: added to the mean square.

    Returns:
        float8_e4m3fn (M, K), its scales, float32 (M, 1), and x + residual in the model's dtype.
    """
    return torch.ops.spense.add_norm_quant(x, residual, weight, epsilon)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, K) in FP8 and its scales, float32 (M, 1)."""
    return torch.ops.spense.quantize(x)


def fuses_norm(size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `add_norm_quant` and `quantize` have a kernel for rows of `size` values; makes it ready if so."""
    if device.type == "cpu":
        return True
    described = _describe(device)
    if not described.bindings or described.capability != ONE_LAUNCH_CAPABILITY or dtype != torch.bfloat16:
        return False
    from vllm_spense.kernels import norm_quant as fast

    if size % fast.WIDTH:
        return False
    if fault := fast.fault(device):
        logger.warning("Spense: norm · quantize is left to the compiler: %s", fault)
        return False
    fast.prepare(size, device)
    return True


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
    problem = _problem(torch.bfloat16, n, k, 0, k, False, 1, True)
    if _forced() not in (None, Path.ONE_LAUNCH) or reason_against(Path.ONE_LAUNCH, problem, _describe(device)):
        return False
    from vllm_spense.kernels import whole

    faster = whole.prepare(n, k, device, _cutlass)
    by_tokens = [("one-launch" if wins else "stock", tokens) for tokens, wins in faster.items()]
    beyond = ("stock", whole.MOST_TOKENS + 1)
    logger.info("Spense: not pruned %d × %d: %s", n, k, _in_words([*by_tokens, beyond]))
    return any(faster.values())


def _cutlass(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """vLLM's kernel, for (N, K)."""
    out = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
    torch.ops._C.cutlass_scaled_mm(out, x, weight.t(), x_scale, w_scale, None)
    return out


def _whole_gemm(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    from vllm_spense.kernels import whole

    return whole.run(x, weight, x_scale, w_scale, _cutlass)


def _whole_gemm_fake(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.bfloat16)


def _silu_mul_quant(
    raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if raw.device.type == "cpu":
        return reference.silu_mul_quant(raw, x_scale, w_scale, boundary)
    from vllm_spense.kernels import silu_mul_quant as fast

    return fast.run(raw, x_scale, w_scale, boundary)


def _silu_mul_quant_fake(
    raw: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, boundary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, size = raw.shape[0], raw.shape[1] // 2
    return raw.new_empty((tokens, size), dtype=torch.float8_e4m3fn), x_scale.new_empty((tokens, 1))


def _add_norm_quant(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.device.type == "cpu":
        return reference.add_norm_quant(x, residual, weight, epsilon)
    from vllm_spense.kernels import norm_quant as fast

    return fast.add_norm_quant(x.contiguous(), residual.contiguous(), weight, epsilon)


def _add_norm_quant_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_quantize_fake(x), x.new_empty(x.shape)


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if x.device.type == "cpu":
        return reference.quantize(x)
    from vllm_spense.kernels import norm_quant as fast

    return fast.quantize(x.contiguous())


def _quantize_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@cache
def _path(problem: Problem, tokens: int, device: torch.device) -> Path:
    return choose(_paths(problem, device), tokens, lambda path: cast(Timed, kernel(path)).us(problem, tokens, device))


@cache
def _paths(problem: Problem, device: torch.device) -> tuple[Path, ...]:
    return candidates(problem, _describe(device), _forced())


@cache
def _describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(device.type)
    capability = torch.cuda.get_device_capability(device)
    bindings = importlib.util.find_spec("nvmath") is not None
    fault = None
    if bindings and capability == ONE_LAUNCH_CAPABILITY:
        from vllm_spense.kernels import one_launch

        fault = one_launch.fault(device)
        if fault:
            logger.warning("Spense: the one-launch path is not taken: %s", fault)
    return Device(device.type, capability, bindings, fault)


@cache
def _forced() -> Path | None:
    return forced_path(os.environ.get(SWITCH))


# Torch removes the ops of a library object that is collected.
_LIBRARY = torch.library.Library("spense", "FRAGMENT")
_LIBRARY.define(
    "region_gemm(Tensor x, Tensor[] tensors, str[] names, int[] sizes, ScalarType out_dtype, Tensor? x_scale=None, "
    "Tensor? w_scale=None) -> Tensor"
)
_LIBRARY.impl("region_gemm", _region_gemm, "CompositeExplicitAutograd")
torch.library.register_fake("spense::region_gemm", _region_gemm_fake, lib=_LIBRARY)
_LIBRARY.define("silu_mul_quant(Tensor raw, Tensor x_scale, Tensor w_scale, int boundary) -> (Tensor, Tensor)")
_LIBRARY.impl("silu_mul_quant", _silu_mul_quant, "CompositeExplicitAutograd")
torch.library.register_fake("spense::silu_mul_quant", _silu_mul_quant_fake, lib=_LIBRARY)
_LIBRARY.define("whole_gemm(Tensor x, Tensor weight, Tensor x_scale, Tensor w_scale) -> Tensor")
_LIBRARY.impl("whole_gemm", _whole_gemm, "CUDA")
torch.library.register_fake("spense::whole_gemm", _whole_gemm_fake, lib=_LIBRARY)
_LIBRARY.define("add_norm_quant(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("add_norm_quant", _add_norm_quant, "CompositeExplicitAutograd")
torch.library.register_fake("spense::add_norm_quant", _add_norm_quant_fake, lib=_LIBRARY)
_LIBRARY.define("quantize(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
torch.library.register_fake("spense::quantize", _quantize_fake, lib=_LIBRARY)
