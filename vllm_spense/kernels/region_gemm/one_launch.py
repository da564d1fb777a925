"""The one-launch path: what `one_launch.cu` is compiled with, its tables and its launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from importlib.resources import files
from itertools import product
from operator import itemgetter

import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.jit import nvrtc
from vllm_spense.kernels.jit.nvmath_support import current_stream
from vllm_spense.kernels.region_gemm import cusparselt, library
from vllm_spense.kernels.region_gemm.packing import TILE, TILE_BYTES, compress, metadata_shape, value_bytes
from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.kernels.region_gemm.schedule import DENSE_K, ROWS, Tiling, schedule, tiles
from vllm_spense.kernels.tuning.plan_cache import digest, environment, load_or_find
from vllm_spense.kernels.tuning.synthetic import random_2of4, random_fp8, random_weight, unit_scales
from vllm_spense.kernels.tuning.timing import cold_copies, medians_us

Packed = Mapping[str, torch.Tensor]

#: Tokens of a tile.
MIN_TILE_TOKENS, MAX_TILE_TOKENS = 8, 256
#: The largest M that is searched for. Every further tile reads the weights again, and the libraries win.
MAX_TOKENS = 512
_THREADS = 384
#: Of shared memory, per thread block on Hopper; and what it takes for alignment, the output's turn and barriers.
_SHARED_BYTES, _FIXED_SHARED_BYTES = 227 * 1024, 1024 + 8 * 16 * 48 + 256
_MIN_STAGES, _MAX_STAGES = 3, 12
#: GEMMs of every kind that `fault` tries, and what they may be off: bfloat16 alone is worth 0.002.
_TRIALS = (
    Problem(640, 320, Regions(192, 128), "output", projections=2),
    Problem(160, 1216, Regions(704, 512), "input"),
    Problem.unpruned(416, 1056),
)
_TRIAL_TILINGS = (Tiling(32, 256), Tiling(128, 128, 3), Tiling(32, 256, 2, cluster=True), Tiling(32, 128, 3))
_TRIAL_ERROR = 0.005
#: Counters that are made at once.
_ARRIVALS = 1 << 20

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
    return {"source": _digest(), **asdict(_found(problem, bucket(tokens), device))}


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
    tiling = _found(problem, bucket(tokens), device).tiling
    if tokens > MAX_TOKENS:
        # So many tiles need not be cut to occupy every multiprocessor.
        tiling = replace(tiling, parts=0, cluster=False)
    return OneLaunchPlan(problem, tokens, device, tiling)


@dataclass(frozen=True)
class Found:
    """What a search found: a `Tiling`'s fields, and its time in µs."""

    tokens: int
    sparse_k: int
    parts: int
    cluster: bool
    us: float

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.tokens, self.sparse_k, self.parts, self.cluster)


@cache
def _found(problem: Problem, tokens: int, device: torch.device) -> Found:
    """The fastest way to cut a GEMM of M = `tokens`, a power of two."""
    key = {"path": "one-launch", **environment(device), **problem.describe(), "tokens": tokens, "source": _digest()}
    return load_or_find(key, Found, lambda: search(problem, tokens, device))


def search(problem: Problem, tokens: int, device: torch.device) -> Found:
    """Times all `candidates` on random weights that are cold in the cache.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a GEMM of {tokens} tokens was captured before it ran once: {problem}")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    tilings = list(candidates(problem, tokens, multiprocessors))
    # Of all tiles at once: the next search finds them made.
    everything = {replace(c, tokens=t) for t in _buckets(1, MAX_TILE_TOKENS) for c in tilings}
    _compile({(problem.out_dtype, problem.scaled, tiling) for tiling in filter(fits, everything)})
    weight = random_weight(problem, device)
    packs = [pack(weight, problem) for _ in range(cold_copies(problem.weight_bytes, device))]
    del weight
    x = random_fp8(tokens, problem.k, device)
    out = torch.empty(tokens, problem.n, dtype=problem.out_dtype, device=device)
    scales = unit_scales(problem, tokens, device)
    plans = [OneLaunchPlan(problem, tokens, device, tiling) for tiling in tilings]
    times = medians_us([[partial(plan.run, x, packed, out, scales) for packed in packs] for plan in plans])
    us, best = min(zip(times, tilings, strict=True), key=itemgetter(0))
    return Found(**asdict(best), us=round(us, 2))


def candidates(problem: Problem, tokens: int, multiprocessors: int) -> Iterator[Tiling]:
    """Ways to cut a GEMM that are worth timing."""
    tile = tile_tokens(tokens)
    for sparse_k in (128, 256):
        if not fits(Tiling(tile, sparse_k)):
            continue
        yield Tiling(tile, sparse_k)
        count = sum(1 for _ in tiles(problem, tokens, Tiling(tile, sparse_k)))
        # Half of the multiprocessors can keep the memory busy, and fewer parts are sooner added up.
        for parts, cluster in product((2, 3, 4, 6, 8), (False, True)):
            if 0.5 * multiprocessors <= count * parts <= multiprocessors:
                yield Tiling(tile, sparse_k, parts, cluster)


def fits(tiling: Tiling) -> bool:
    """Whether enough steps fit into shared memory to keep the memory busy."""
    return _stages(tiling)[0] >= _MIN_STAGES


def _stages(tiling: Tiling) -> tuple[int, int]:
    """(steps in flight, bytes of shared memory), from the sizes that the kernel lays out."""
    stage = ROWS * DENSE_K + tiling.tokens * tiling.sparse_k + ROWS // TILE * tiling.sparse_k // TILE * TILE_BYTES
    stages = min((_SHARED_BYTES - _FIXED_SHARED_BYTES) // stage, _MAX_STAGES)
    return stages, _FIXED_SHARED_BYTES + stages * stage


@cache
def _code() -> str:
    return files("vllm_spense.kernels").joinpath("one_launch.cu").read_text(encoding="utf-8")


@cache
def _digest() -> str:
    return digest(_code())


def _compile(kernels: Iterable[tuple[torch.dtype, bool, Tiling]]) -> None:
    """Machine code for the plan cache: threads make it in parallel."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: _machine_code(*kernel), kernels))


def _machine_code(out_dtype: torch.dtype, scaled: bool, tiling: Tiling) -> bytes:
    macros = {
        "TOKENS": tiling.tokens,
        "SPARSE_K": tiling.sparse_k,
        "CLUSTER": tiling.cluster_size,
        "SLICES": tiling.slices,
        "STAGES": _stages(tiling)[0],
        "OUT_FLOAT": int(out_dtype == torch.float32),
        "SCALED": int(scaled),
    }
    source = _instruction(tiling.tokens, sparse=True) + _instruction(tiling.tokens, sparse=False) + _code()
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    return nvrtc.compile_cubin(source, options)


def _instruction(tokens: int, sparse: bool) -> str:
    """A C++ function for one tensor core instruction: its operands depend on the number of tokens."""
    sums = tokens // 2
    registers = ", ".join(f"%{i}" for i in range(sums))
    name, kind, k = ("sparse", ".sp", 64) if sparse else ("dense", "", 32)
    metadata = f"%{sums + 2}, 0, " if sparse else ""
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    return f"""
__device__ __forceinline__ void {name}_mma(
    float (&d)[{sums}], unsigned long long w, unsigned long long x{", unsigned metadata" if sparse else ""}) {{
    asm volatile(
        "wgmma.mma_async{kind}.sync.aligned.m64n{tokens}k{k}.f32.e4m3.e4m3 "
        "{{{registers}}}, %{sums}, %{sums + 1}, {metadata}1, 1, 1;"
        : {outputs} : "l"(w), "l"(x){', "r"(metadata)' if sparse else ""});
}}
"""


@cache
def _kernel(tiling: Tiling, out_dtype: torch.dtype, scaled: bool, device: torch.device) -> nvrtc.Kernel:
    code = _machine_code(out_dtype, scaled, tiling)
    return nvrtc.load(code, "gemm", _THREADS, _stages(tiling)[1], device)


class _Arguments(ctypes.Structure):
    """`Arguments` of the kernel."""

    _fields_ = (
        *((name, nvrtc.TensorMap) for name in ("x", "values", "metadata", "dense")),
        *((name, ctypes.c_void_p) for name in ("segments", "parts", "arrivals", "out", "x_scale", "w_scale")),
        *((name, ctypes.c_int) for name in ("segments_each", "tokens", "n", "dense_column")),
    )


class _Arrivals:
    """Counters for `Arguments.arrivals`: the kernel needs them zero and leaves them zero.

    Launches that may run at the same time must not share any. Those of one stream never do; of a captured launch
    nobody knows in which stream it will be replayed, so each gets counters of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free = torch.empty(0, dtype=torch.int64)
        self.of_stream: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, count: int, stream: int) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            return self._new(count)
        key = (count, stream)
        if key not in self.of_stream:
            self.of_stream[key] = self._new(count)
        return self.of_stream[key]

    def _new(self, count: int) -> torch.Tensor:
        if len(self.free) < count:
            self.free = torch.zeros(_ARRIVALS, dtype=torch.int64, device=self.device)
        new, self.free = self.free[:count], self.free[count:]
        return new


@cache
def _arrivals(device: torch.device) -> _Arrivals:
    return _Arrivals(device)


class OneLaunchPlan:
    """Tables and machine code for one problem and M up to `tokens`. Serves any number of layers and streams.

    Args:
        problem: the GEMM; its region sizes are multiples of `WEIGHT_MULTIPLE`.
        tokens: the largest M.
    """

    def __init__(self, problem: Problem, tokens: int, device: torch.device, tiling: Tiling) -> None:
        assert not (problem.scaled and problem.out_dtype == torch.float32)
        self.problem = problem
        self.tokens = tokens
        self.device = device
        self.tiling = tiling
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        tables = schedule(problem, tokens, tiling, multiprocessors)
        self._kernel = _kernel(tiling, problem.out_dtype, problem.scaled, device)
        self._segments = torch.from_numpy(tables.segments).to(device)
        self._counters = 0 if tiling.cluster else tables.arrivals
        self._part_floats = 0 if tiling.cluster else tables.parts * ROWS * tiling.tokens
        _arrivals(device)

    def run(
        self,
        x: torch.Tensor,
        packed: Packed,
        out: torch.Tensor | None = None,
        scales: Scales | None = None,
    ) -> torch.Tensor:
        """One launch.

        Args:
            x: (M, K) float8_e4m3fn, M ≤ tokens; rows may be strided by a multiple of 16.
            packed: what `pack` returned for this problem.
            out: (M, N) of the problem's out_dtype to write into, contiguous.
            scales: of a scaled problem's tokens and rows.

        Returns:
            (M, N), raw sums unless the problem is scaled.
        """
        problem, m = self.problem, x.shape[0]
        assert m <= self.tokens, (m, self.tokens)
        assert problem.scaled == (scales is not None), problem
        if out is None:
            out = torch.empty(m, problem.n, dtype=problem.out_dtype, device=x.device)
        stream = current_stream(self.device)
        arguments = _Arguments(
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
        if self._counters:
            # Until the launch is enqueued it must not go back to torch, which then orders its next use after it.
            parts = torch.empty(self._part_floats, dtype=torch.float32, device=x.device)
            arguments.parts = parts.data_ptr()
            arguments.arrivals = _arrivals(self.device).take(self._counters, stream).data_ptr()
        self._kernel.launch(len(self._segments), arguments, stream)
        return out


@lru_cache(maxsize=4096)
def _x_map(address: int, tokens: int, k: int, stride: int, tile_tokens: int) -> ctypes.Array[ctypes.c_uint64]:
    return nvrtc.tensor_map(address, (1, tokens, k), (stride * tokens, stride), (tile_tokens, 128), 128)


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
        maps["values"] = nvrtc.tensor_map(
            compressed, (problem.projections, sn, sk // 2), (each, sk // 2), (ROWS, half), half
        )
        # In items of 8 bytes, because a box has no more than 256 in a row.
        maps["metadata"] = nvrtc.tensor_map(
            compressed + values,
            (problem.projections, row_tiles, pitch // 8),
            (each, pitch),
            (ROWS // TILE, box // 8),
            0,
            item=8,
        )
    if dn * dk:
        maps["dense"] = nvrtc.tensor_map(dense, (problem.projections, dn, dk), (dn * dk, dk), (ROWS, DENSE_K), DENSE_K)
    return maps
