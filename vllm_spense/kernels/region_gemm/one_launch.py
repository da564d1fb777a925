"""The one-launch path: how a GEMM is cut, its kernel's tables and its launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from itertools import chain, product
from operator import itemgetter

import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvmath_support import current_stream
from vllm_spense.kernels.lasting import lasting
from vllm_spense.kernels.one_launch.instances import (
    MAX_TILE_TOKENS,
    MIN_TILE_TOKENS,
    THREADS,
    Arguments,
    fits,
    machine_code,
    macros,
    stages,
)
from vllm_spense.kernels.one_launch.schedule import DENSE_K, ROWS, Tiling, schedule, tiles
from vllm_spense.kernels.one_launch.semaphores import semaphores
from vllm_spense.kernels.region_gemm import cusparselt, library
from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES, compress, metadata_shape, value_bytes
from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.kernels.tuning.plan_cache import environment, load_or_find
from vllm_spense.kernels.tuning.synthetic import random_2of4, random_fp8, random_weight, unit_scales
from vllm_spense.kernels.tuning.timing import cold_copies, medians_us, require_no_capture

Packed = Mapping[str, torch.Tensor]

#: The largest M that is searched for. Every further tile reads the weights again, and the libraries win.
MAX_TOKENS = 512
#: The same without a sparse region: beyond it, tensor cores limit a dense GEMM more than memory does.
MAX_DENSE_TOKENS = 256
#: Beyond it nothing is searched for: so many tiles need not be cut to occupy every multiprocessor.
_BEYOND = Tiling(MAX_TILE_TOKENS, 128)
#: Tiles that leave some of `MAX_TILE_TOKENS` to others are no narrower than this.
_NARROWEST = 64
#: GEMMs of every kind that `fault` tries, and what they may be off: bfloat16 alone is worth 0.002.
_TRIALS = (
    Problem(640, 320, Regions(192, 128), "output", projections=2),
    Problem(160, 1216, Regions(704, 512), "input"),
    Problem.unpruned(416, 1056),
)
_TRIAL_TILINGS = (Tiling(32, 256), Tiling(128, 128, 3), Tiling(32, 256, 2, cluster=True), Tiling(32, 128, 3))
_TRIAL_ERROR = 0.005

#: The weight as the library path packs it: both paths read the same bytes.
pack, TENSORS = library.pack, library.TENSORS


@cache
def fault(device: torch.device) -> str | None:
    """Why this path must not be used on a GPU, or None: what it takes for granted, tried out once in each process.

    It reads bytes that cuSPARSELt does not document, and its code comes from whatever compiler and driver are there.
    """
    probe = random_2of4(2 * TILE, 2 * TILE, device)
    # Zeros beyond those that 2:4 asks for, in every place.
    probe.view(torch.uint8).mul_(torch.rand(probe.shape, device=device) > 0.2)
    if not torch.equal(cusparselt.compress(probe), compress(probe)):
        return f"cuSPARSELt {cusparselt.version(device)} compresses into a layout that is not known here"
    try:
        _compile({(problem.out_dtype, problem.scaled, tiling) for problem, tiling in product(_TRIALS, _TRIAL_TILINGS)})
        errors = [_error(problem, tiling, device) for problem, tiling in product(_TRIALS, _TRIAL_TILINGS)]
    except RuntimeError as error:
        return f"its kernel failed when it was tried: {error}"
    # Not by their maximum, which may pass over a NaN.
    if not all(error < _TRIAL_ERROR for error in errors):
        return f"its kernel is wrong on this machine: relative errors {', '.join(f'{error:.1e}' for error in errors)}"
    return None


def _error(problem: Problem, tiling: Tiling, device: torch.device) -> float:
    """Of a GEMM of random numbers, relative to the norm of the exact result."""
    weight, x = random_weight(problem, device), random_fp8(tiling.tokens - 7, problem.k, device)
    out = torch.full((len(x), problem.n), torch.nan, dtype=problem.out_dtype, device=device)
    exact = x.double() @ weight.double().t()
    scales = unit_scales(problem, len(x), device)
    if scales:
        for scale in scales:
            scale.uniform_()
        exact *= scales[0].double() * scales[1].double().t()
    plan = OneLaunchPlan(problem, tiling.tokens, device, tiling)
    plan.run(x, pack(weight, problem), out, scales)
    return float((out.double() - exact).norm() / exact.norm())


def bucket(tokens: int) -> int:
    """Ways to cut are searched for by powers of two."""
    return min(max(MIN_TILE_TOKENS, 1 << (tokens - 1).bit_length()), MAX_TOKENS)


def tile_tokens(tokens: int) -> int:
    """Of the tiles that serve M = `tokens`."""
    return min(bucket(tokens), MAX_TILE_TOKENS)


def prepare(problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None:
    """Finds how to cut the GEMM, and compiles and loads its kernel, for every M in this range."""
    for tokens in _buckets(min_tokens, max_tokens):
        plan(problem, tokens, device)


def found(problem: Problem, tokens: int, device: torch.device) -> dict[str, object]:
    """What runs M = `tokens`, as JSON."""
    return asdict(_found(problem, bucket(tokens), device))


def _buckets(min_tokens: int, max_tokens: int) -> Iterator[int]:
    tokens = bucket(min_tokens)
    while tokens <= bucket(max_tokens):
        yield tokens
        tokens *= 2


def run(x: torch.Tensor, packed: Packed, problem: Problem, scales: Scales | None = None) -> torch.Tensor:
    """As `OneLaunchPlan.run`, with the best plan for these tokens; searches for it the first time.

    Raises:
        RuntimeError: a search would be needed while a CUDA graph is being captured.
    """
    tokens = len(x)
    most = bucket(tokens) if tokens <= MAX_TOKENS else -(-tokens // MAX_TILE_TOKENS) * MAX_TILE_TOKENS
    return plan(problem, most, x.device).run(x, packed, scales=scales)


@cache
def plan(problem: Problem, tokens: int, device: torch.device) -> OneLaunchPlan:
    """The plan for M up to `tokens`, a power of two or a multiple of 256."""
    tiling = _BEYOND if tokens > MAX_TOKENS else _found(problem, bucket(tokens), device).tiling
    return OneLaunchPlan(problem, tokens, device, tiling)


@dataclass(frozen=True)
class Found:
    """What a search found: a `Tiling`'s fields, and its time in µs."""

    tokens: int
    sparse_k: int
    splits: int
    cluster: bool
    us: float

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.tokens, self.sparse_k, self.splits, self.cluster)


@cache
def _found(problem: Problem, tokens: int, device: torch.device) -> Found:
    """The fastest way to cut a GEMM of M = `tokens`, a power of two."""
    key = {"path": "one-launch", **environment(device), **problem.describe(), "tokens": tokens}
    return load_or_find(key, Found, lambda: search(problem, tokens, device))


def search(problem: Problem, tokens: int, device: torch.device) -> Found:
    """Times all `candidates` on random weights that are cold in the cache.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    require_no_capture(problem, tokens)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    tilings = list(candidates(problem, tokens, multiprocessors))
    # Those of all M at once: the next search finds them made.
    most = MAX_TOKENS if problem.regions.sparse else max(MAX_DENSE_TOKENS, tokens)
    everything = chain.from_iterable(candidates(problem, m, multiprocessors) for m in _buckets(1, most))
    _compile({(problem.out_dtype, problem.scaled, tiling) for tiling in everything})
    weight = random_weight(problem, device)
    packs = [pack(weight, problem) for _ in range(cold_copies(problem.weight_bytes, device))]
    del weight
    x = random_fp8(tokens, problem.k, device)
    out = torch.empty(tokens, problem.n, dtype=problem.out_dtype, device=device)
    scales = unit_scales(problem, tokens, device)
    plans = [OneLaunchPlan(problem, tokens, device, tiling) for tiling in tilings]
    # One workspace for all, or each of hundreds of captured calls might keep one: a small weight has as many copies.
    workspace = torch.empty(max(plan.partial_floats for plan in plans), dtype=torch.float32, device=device)
    times = medians_us([[partial(plan.run, x, packed, out, scales, workspace) for packed in packs] for plan in plans])
    us, best = min(zip(times, tilings, strict=True), key=itemgetter(0))
    return Found(**asdict(best), us=round(us, 2))


def candidates(problem: Problem, tokens: int, multiprocessors: int) -> Iterator[Tiling]:
    """Ways to cut a GEMM that are worth timing."""
    widest = tile_tokens(tokens)
    narrower = [tile for tile in (widest // 2, widest // 4) if tile >= _NARROWEST]
    for tile, sparse_k in product((widest, *narrower), (128, 256)):
        if not fits(Tiling(tile, sparse_k)):
            continue
        if tile == widest:
            yield Tiling(tile, sparse_k)
        count = sum(1 for _ in tiles(problem, tokens, Tiling(tile, sparse_k)))
        # Half of the multiprocessors can keep the memory busy, and fewer splits are sooner added up.
        for splits, cluster in ((1, False), *product((2, 3, 4, 6, 8), (False, True))):
            if 0.5 * multiprocessors <= count * splits <= multiprocessors:
                yield Tiling(tile, sparse_k, splits, cluster)


def _compile(kernels: Iterable[tuple[torch.dtype, bool, Tiling]]) -> None:
    """Machine code for the plan cache, once for all tilings that share it: threads make it in parallel."""
    different = {tuple(macros(*kernel).values()): kernel for kernel in kernels}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: machine_code(*kernel), different.values()))


@cache
def _kernel(tiling: Tiling, out_dtype: torch.dtype, scaled: bool, device: torch.device) -> driver.Kernel:
    code = machine_code(out_dtype, scaled, tiling)
    return driver.load(code, "gemm", THREADS, stages(tiling)[1], device)


class OneLaunchPlan:
    """Tables and machine code for one problem and M up to `tokens`. Serves any number of layers and streams.

    Args:
        problem: the GEMM; its region sizes are multiples of `Problem.weight_multiple`.
        tokens: the largest M.

    Attributes:
        partial_floats: float32 numbers that a launch needs room for, the partial sums of splits.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, problem: Problem, tokens: int, device: torch.device, tiling: Tiling) -> None:
        assert not (problem.scaled and problem.out_dtype == torch.float32)
        require_no_capture(problem, tokens)
        self.problem = problem
        self.tokens = tokens
        self.device = device
        self.tiling = tiling
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        tables = schedule(problem, tokens, tiling, multiprocessors)
        self._kernel = _kernel(tiling, problem.out_dtype, problem.scaled, device)
        self._segments = lasting(lambda: torch.from_numpy(tables.segments).to(device))
        self._semaphores = 0 if tiling.cluster else tables.semaphores
        self.partial_floats = 0 if tiling.cluster else tables.partials * ROWS * tiling.tokens
        semaphores(device).reserve(self._semaphores)

    def run(
        self,
        x: torch.Tensor,
        packed: Packed,
        out: torch.Tensor | None = None,
        scales: Scales | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One launch.

        Args:
            x: (M, K) float8_e4m3fn, M ≤ tokens; rows may be strided by a multiple of 16.
            packed: what `pack` returned for this problem.
            out: (M, N) of the problem's out_dtype to write into, contiguous.
            scales: of a scaled problem's tokens and rows.
            workspace: float32, `partial_floats` or more that nothing else uses meanwhile; None for memory of torch's.

        Returns:
            (M, N), raw sums unless the problem is scaled.
        """
        problem, m = self.problem, x.shape[0]
        assert m <= self.tokens, (m, self.tokens)
        assert problem.scaled == (scales is not None), problem
        if out is None:
            out = torch.empty(m, problem.n, dtype=problem.out_dtype, device=x.device)
        stream = current_stream(self.device)
        arguments = Arguments(
            x=_x_map(x.data_ptr(), m, problem.k, x.stride(0), self.tiling.tokens),
            **_weight_maps(problem, self.tiling.sparse_k, packed["compressed"].data_ptr(), packed["dense"].data_ptr()),
            segments=self._segments.data_ptr(),
            out=out.data_ptr(),
            segments_each=self._segments.shape[1],
            tokens=m,
            n=problem.n,
            dense_column=problem.regions.sparse if problem.split == "input" else 0,
        )
        if scales:
            arguments.x_scale, arguments.w_scale = (scale.data_ptr() for scale in scales)
        if self._semaphores:
            # Until the launch is enqueued it must not go back to torch, which then orders its next use after it.
            partials = (
                torch.empty(self.partial_floats, dtype=torch.float32, device=x.device)
                if workspace is None
                else workspace
            )
            arguments.partials = partials.data_ptr()
            capture = driver.capture_number(stream)
            arguments.semaphores = semaphores(self.device).take(self._semaphores, stream, capture).data_ptr()
        self._kernel.launch(len(self._segments), arguments, stream)
        return out


@lru_cache(maxsize=4096)
def _x_map(address: int, tokens: int, k: int, stride: int, tile_tokens: int) -> ctypes.Array[ctypes.c_uint64]:
    return driver.tensor_map(address, (1, tokens, k), (stride * tokens, stride), (tile_tokens, 128), 128)


@cache
def _weight_maps(
    problem: Problem, sparse_k: int, compressed: int, dense: int
) -> dict[str, ctypes.Array[ctypes.c_uint64]]:
    (sn, sk), (dn, dk) = problem.sparse_shape, problem.dense_shape
    maps = {}
    if sn * sk:
        half, box = sparse_k // 2, sparse_k // TILE * TILE_BYTES
        row_tiles, pitch = metadata_shape(sn, sk)
        values = value_bytes(sn, sk)
        each = values + row_tiles * pitch
        maps["values"] = driver.tensor_map(
            compressed, (problem.projections, sn, sk // 2), (each, sk // 2), (ROWS, half), half
        )
        # In items of 8 bytes, because a box has no more than 256 in a row.
        maps["metadata"] = driver.tensor_map(
            compressed + values,
            (problem.projections, row_tiles, pitch // 8),
            (each, pitch),
            (ROWS // TILE, box // 8),
            0,
            item=8,
        )
    if dn * dk:
        maps["dense"] = driver.tensor_map(dense, (problem.projections, dn, dk), (dn * dk, dk), (ROWS, DENSE_K), DENSE_K)
    return maps
