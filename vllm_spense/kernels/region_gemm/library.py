"""The library path: a cuSPARSELt GEMM for the sparse region and a cuBLASLt GEMM for the dense one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product

import torch

from vllm_spense.kernels.elementwise import scale
from vllm_spense.kernels.jit import driver
from vllm_spense.kernels.jit.nvmath_support import Shape, current_stream
from vllm_spense.kernels.region_gemm import cublaslt, cusparselt
from vllm_spense.kernels.region_gemm.problem import Problem, Scales
from vllm_spense.kernels.tuning.plan_cache import environment, load_or_find
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight, unit_scales
from vllm_spense.kernels.tuning.timing import cold_copies, medians_us, require_no_capture

logger = logging.getLogger("vllm.spense")

Packed = Mapping[str, torch.Tensor]
#: What `pack` returns, in this order.
TENSORS = ("compressed", "dense")
#: Of a weight, for a search. A region so small that this many copies fit into the cache takes no time to speak of.
_MAX_COPIES = 8
#: Largest number of tokens that vLLM captures in a CUDA graph unless told otherwise.
_LARGEST_DECODE = 512
#: From here on more tokens are only more of the same.
_LARGEST_BUCKET = 2048
#: Of each library's kernels, how many are tried together.
_FINALISTS = 3
#: Of all that were tried, how many are timed once more and how often: the minimum of many medians is biased low.
_LAST, _LAST_REPLAYS = 4, 21
#: Shares of the multiprocessors that the dense GEMM is tried with beside the sparse one, up to `_LARGEST_DECODE`
#: tokens: there neither fills the chip, and kernels made for all of it get in each other's way.
_SHARES = (0.3, 0.4, 0.5)
#: Of the kernels for such a share, and of the sparse ones, how many are tried with it.
_SHARE_DENSE, _SHARE_SPARSE = 2, 5
#: What a second stream must gain where no CUDA graph is captured and the GPU waits for the host: it takes four calls.
_WORTH_A_STREAM = 0.97


def pack(weight: torch.Tensor, problem: Problem) -> dict[str, torch.Tensor]:
    """Weights of one GEMM as the libraries read them.

    Args:
        weight: (N, K) float8_e4m3fn on a GPU, 2:4 in its sparse regions. Not changed.

    Returns:
        `compressed`: uint8 (projections, bytes), cuSPARSELt's own; `dense`: float8_e4m3fn (projections, rows,
        columns), the dense regions. Either may be empty.
    """
    sparse, dense = zip(*problem.split_regions(weight), strict=True)
    if problem.regions.sparse:
        compressed = _with_overread([cusparselt.compress(region.contiguous()) for region in sparse])
    else:
        compressed = weight.new_empty(problem.projections, 0, dtype=torch.uint8)
    # Contiguous even within rows of a wider weight: that is worth a fifth of down's dense GEMM.
    return {"compressed": compressed, "dense": torch.stack(dense)}


def _with_overread(compressed: list[torch.Tensor]) -> torch.Tensor:
    """Compressed weights of equal size, stacked, in memory that goes on for `OVERREAD` bytes."""
    room = compressed[0].new_zeros(sum(map(len, compressed)) + cusparselt.OVERREAD)
    return torch.cat(compressed, out=room[: -cusparselt.OVERREAD]).view(len(compressed), -1)


def padded(tokens: int) -> int:
    """M as plans are made for it: the next multiple of 16, which cuSPARSELt asks for; of 64 in prefill, so that prompts
    of every length do not need plans of their own."""
    multiple = cusparselt.TOKEN_MULTIPLE if tokens <= _LARGEST_DECODE else 4 * cusparselt.TOKEN_MULTIPLE
    return -(-tokens // multiple) * multiple


def prepare(problem: Problem, min_tokens: int, max_tokens: int, device: torch.device) -> None:
    """Finds kernels for every M in this range now, rather than while somebody waits for an answer."""
    tokens = bucket(min_tokens)
    while tokens <= bucket(max_tokens):
        _choice(problem, tokens, device)
        tokens *= 2


def found(problem: Problem, tokens: int, device: torch.device) -> dict[str, object]:
    """What runs M = `tokens`, as JSON."""
    versions = {"cublaslt": cublaslt.version(), "cusparselt": cusparselt.version(device)}
    return {**versions, **asdict(_choice(problem, bucket(tokens), device))}


def bucket(tokens: int) -> int:
    """Kernels are searched for by powers of two."""
    return min(max(cusparselt.TOKEN_MULTIPLE, 1 << (tokens - 1).bit_length()), _LARGEST_BUCKET)


def run(x: torch.Tensor, packed: Packed, problem: Problem, scales: Scales | None = None) -> torch.Tensor:
    """As `LibraryPlan.run`, with the best plan for these tokens; searches for it the first time.

    Raises:
        RuntimeError: a search would be needed while a CUDA graph is being captured.
    """
    return plan(problem, padded(x.shape[0]), x.device).run(x, packed, scales=scales)


def sums(x: torch.Tensor, packed: Packed, problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `LibraryPlan.sums`, likewise."""
    return plan(problem, padded(x.shape[0]), x.device).sums(x, packed)


@cache
def plan(problem: Problem, tokens: int, device: torch.device) -> LibraryPlan:
    """The plan for M = `tokens`, a multiple of 16."""
    choice = _choice(problem, bucket(tokens), device)
    try:
        return LibraryPlan(problem, tokens, device, choice)
    except (cusparselt.Error, cublaslt.Error) as error:
        # A kernel that suits the bucket need not know every M in it.
        logger.warning("Spense: default kernels for %d tokens of %s: %s", tokens, problem, error)
        return LibraryPlan(problem, tokens, device, replace(choice, sparse=None, dense=None, sms=0))


@cache
def _choice(problem: Problem, tokens: int, device: torch.device) -> Choice:
    key = {
        "path": "library",
        **environment(device),
        "cublaslt": cublaslt.version(),
        "cusparselt": cusparselt.version(device),
        **problem.describe(),
        "tokens": tokens,
    }
    return load_or_find(key, Choice, lambda: search(problem, tokens, device))


@dataclass(frozen=True)
class Choice:
    """What was found by measurement for one problem and M.

    Attributes:
        sparse, dense: the libraries' kernels; None for their default.
        concurrent: both GEMMs at once, on two streams. An input-split problem then needs a second output and an
            addition; in sequence the dense GEMM accumulates into the sparse one's output.
        sms: multiprocessors that the dense kernel is made for; 0 for all.
        dense_first: of two that run at once the dense GEMM begins, and gets the multiprocessors that it wants.
        us: what one call took, without an addition that is left to what follows.
    """

    sparse: cusparselt.Algorithm | None = None
    dense: cublaslt.Algorithm | None = None
    concurrent: bool = False
    sms: int = 0
    dense_first: bool = False
    us: float = 0


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class LibraryPlan:
    """The two GEMMs of one problem and M. One plan serves any number of layers, on one stream at a time.

    Args:
        problem: the GEMM; its region sizes are multiples of `Problem.weight_multiple`.
        tokens: M, a multiple of 16.

    Raises:
        cusparselt.Error, cublaslt.Error: a chosen kernel does not take this shape.
    """

    def __init__(self, problem: Problem, tokens: int, device: torch.device, choice: Choice) -> None:
        self.problem = problem
        self.tokens = tokens
        self.device = device
        self.choice = choice
        both = problem.regions.sparse > 0 and problem.regions.dense > 0
        self._concurrent = both and choice.concurrent
        #: Of the output, that one projection has.
        self._columns = problem.n // problem.projections
        # Made once: this runs layer after layer while the GPU waits for the host.
        if self._concurrent:
            self._side = _side_stream(device).cuda_stream
            self._fork, self._join = driver.Event(), driver.Event()

        def shape(n: int, k: int) -> Shape:
            return Shape(n, k, tokens, problem.k, problem.n, problem.out_dtype, device)

        self.sparse = self.dense = None
        if problem.regions.sparse:
            self.sparse = cusparselt.SparsePlan(shape(*problem.sparse_shape), choice.sparse)
        if problem.regions.dense:
            accumulate = both and problem.split == "input" and not choice.concurrent
            self.dense = cublaslt.DensePlan(shape(*problem.dense_shape), accumulate, choice.dense, choice.sms)

    def run(
        self, x: torch.Tensor, packed: Packed, out: torch.Tensor | None = None, scales: Scales | None = None
    ) -> torch.Tensor:
        """At most one call of each library for each projection.

        Args:
            x: (M, K) float8_e4m3fn, contiguous. If M is less than the plan's `tokens` it is copied; quantize into a
                buffer of `tokens` rows to avoid that.
            packed: what `pack` returned for this problem.
            out: (tokens, N) of the problem's out_dtype to write into, contiguous.
            scales: of a scaled problem's tokens and rows.

        Returns:
            (M, N), raw sums unless the problem is scaled.
        """
        assert self.problem.scaled == (scales is not None), self.problem
        out, addend = self.sums(x, packed, out)
        if scales:
            scale.run(out, addend, *scales)
        elif addend is not None:
            out += addend
        return out

    def sums(
        self, x: torch.Tensor, packed: Packed, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `run`, but without the kernel that follows the libraries.

        Returns:
            (M, N) twice, to be added up; or the sums and None.
        """
        problem, m = self.problem, x.shape[0]
        if m < self.tokens:
            # Rows past M stay what they are: no row of the output depends on another row of x.
            x = torch.empty(self.tokens, problem.k, dtype=x.dtype, device=x.device)[:m].copy_(x)
        if out is None:
            out = torch.empty(self.tokens, problem.n, dtype=problem.out_dtype, device=x.device)
        stream = current_stream(self.device)
        if not self._concurrent:
            # First, because it accumulates nothing, while the dense GEMM may.
            self._run_sparse(x, packed, out, stream)
            self._run_dense(x, packed, out, stream)
            return out[:m], None
        addend = torch.empty_like(out) if problem.split == "input" else out
        self._fork.record(stream)
        self._fork.hold(self._side)
        if self.choice.dense_first:
            self._run_dense(x, packed, addend, self._side)
        self._run_sparse(x, packed, out, stream)
        if not self.choice.dense_first:
            self._run_dense(x, packed, addend, self._side)
        self._join.record(self._side)
        self._join.hold(stream)
        return out[:m], None if addend is out else addend[:m]

    def _run_sparse(self, x: torch.Tensor, packed: Packed, out: torch.Tensor, stream: int) -> None:
        if self.sparse is None:
            return
        weights, step = packed["compressed"], self._columns * out.element_size()
        for i in range(self.problem.projections):
            self.sparse.run(x.data_ptr(), weights.data_ptr() + i * weights.stride(0), out.data_ptr() + i * step, stream)

    def _run_dense(self, x: torch.Tensor, packed: Packed, out: torch.Tensor, stream: int) -> None:
        if self.dense is None:
            return
        weights, size, boundary = packed["dense"], out.element_size(), self.problem.regions.sparse
        if self.problem.split == "output":
            first, begin = x.data_ptr(), out.data_ptr() + boundary * size
        else:
            first, begin = x.data_ptr() + boundary, out.data_ptr()
        for i in range(self.problem.projections):
            weight = weights.data_ptr() + i * weights.stride(0)
            self.dense.run(first, weight, begin + i * self._columns * size, stream)


def search(problem: Problem, tokens: int, device: torch.device) -> Choice:
    """Times each library's kernels, then both orders of work, on random weights that are cold in the cache.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    require_no_capture(problem, tokens)
    smallest = min(rows * columns for rows, columns in (problem.sparse_shape, problem.dense_shape) if rows * columns)
    weight = random_weight(problem, device)
    packs = [pack(weight, problem) for _ in range(min(_MAX_COPIES, cold_copies(smallest // 2, device)))]
    del weight
    x = random_fp8(tokens, problem.k, device)
    out = torch.empty(tokens, problem.n, dtype=problem.out_dtype, device=device)
    default = LibraryPlan(problem, tokens, device, Choice())

    def run_sparse(plan: LibraryPlan, packed: Packed) -> None:
        assert plan.sparse is not None
        plan.sparse.run(x.data_ptr(), packed["compressed"].data_ptr(), out.data_ptr(), current_stream(device))

    def run_dense(plan: LibraryPlan, packed: Packed) -> None:
        assert plan.dense is not None
        plan.dense.run(x.data_ptr(), packed["dense"].data_ptr(), out.data_ptr(), current_stream(device))

    scales = unit_scales(problem, tokens, device)

    def run_both(plan: LibraryPlan, packed: Packed) -> None:
        if problem.separate_outputs:
            plan.sums(x, packed, out)
        else:
            plan.run(x, packed, out, scales)

    def fastest(
        choices: Iterable[Choice], call: Callable[[LibraryPlan, Packed], None], replays: int = 7
    ) -> list[Choice]:
        """The choices with their times, best first."""
        plans = []
        for choice in choices:
            with suppress(cusparselt.Error, cublaslt.Error):  # not a kernel for this shape
                plans.append(LibraryPlan(problem, tokens, device, choice))
        times = medians_us([[partial(call, plan, packed) for packed in packs] for plan in plans], replays)
        timed = [replace(plan.choice, us=round(us, 2)) for plan, us in zip(plans, times, strict=True)]
        return sorted(timed, key=lambda choice: choice.us)

    def sharing() -> Iterator[Choice]:
        """Both at once, the dense kernel made for a share of the chip."""
        for share in _SHARES:
            sms = round(share * torch.cuda.get_device_properties(device).multi_processor_count)
            made = LibraryPlan(problem, tokens, device, Choice(concurrent=True, sms=sms))
            assert made.dense is not None
            algorithms = made.dense.algorithms()[:_SHARE_DENSE]
            for s, algorithm, first in product(sparse[:_SHARE_SPARSE], algorithms, (False, True)):
                yield Choice(s.sparse, algorithm, concurrent=True, sms=sms, dense_first=first)

    sparse = dense = [Choice()]
    if default.sparse is not None:
        sparse = fastest((Choice(sparse=algorithm) for algorithm in default.sparse.algorithms()), run_sparse)
    if default.dense is not None:
        dense = fastest((Choice(dense=algorithm) for algorithm in default.dense.algorithms()), run_dense)
    # Side by side, kernels that leave room for each other may beat those that are fastest alone.
    finalists = [
        Choice(s.sparse, d.dense, concurrent, dense_first=first)
        for s, d in product(sparse[:_FINALISTS], dense[:_FINALISTS])
        for concurrent, first in ((False, False), (True, False), (True, True))
    ]
    if default.sparse is not None and default.dense is not None and tokens <= _LARGEST_DECODE:
        # One at a time: so many plans have no room beside a model.
        screened = [choice for candidate in sharing() for choice in fastest([candidate], run_both)]
        finalists += sorted(screened, key=lambda choice: choice.us)[:_FINALISTS]
    found = fastest(finalists, run_both)
    in_sequence = [choice for choice in found if not choice.concurrent][:1]
    return host_aware(fastest(dict.fromkeys(found[:_LAST] + in_sequence), run_both, _LAST_REPLAYS), tokens)


def host_aware(found: Sequence[Choice], tokens: int) -> Choice:
    """The best of what was timed for M = `tokens`, but no second stream for little where the host is the limit.

    Args:
        found: best first.
    """
    best = found[0]
    if _LARGEST_DECODE < tokens < _LARGEST_BUCKET:
        limit = best.us / _WORTH_A_STREAM
        return next((choice for choice in found if not choice.concurrent and choice.us <= limit), best)
    return best
