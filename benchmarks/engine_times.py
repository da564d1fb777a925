"""Times one vLLM engine at every batch and context. A program of its own (`decode_speed.py` starts it), because a GPU
has memory for one engine at a time.

    python -m benchmarks.engine_times '{"model": …}' ANSWER_FILE

It imports everything first, starts the engine when it gets a line of input, and times it when it gets another: the GPU
may still be busy with another engine.

The engine runs in this process: all requests of a batch are there before the first step, and the time of every step is
seen. Scheduling stays asynchronous, as it is in a server, so that the GPU does not wait for it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from benchmarks import make_shape, worker_profile
from benchmarks.make_shape import SKEWED, text_config
from benchmarks.random_weights import fill_int4_before_packing, fill_random, linear_kernels, weight_bytes
from benchmarks.timings import (
    LIKELIEST,
    READY,
    TOKEN_BUDGET,
    Timing,
    output_tokens,
    require_sensible,
    summarize,
    time_steps,
)
from benchmarks.worker_profile import KernelRun
from vllm_spense.plugin.cudagraph_sizes import beyond

#: Batches whose prompts have no more tokens than this are timed several times.
REPEATED_TOKENS = 16384
REPETITIONS = 3
#: Decode steps right after a prefill, which do not count.
_SETTLING = 2
#: The batch and context, and decode steps, in which kernels are counted.
PROFILED = (32, 16)
_PROFILED_STEPS = 8
_NAME_LENGTH = 120


@dataclass(frozen=True)
class Order:
    """What to time.

    Attributes:
        model: folder that `make_shape.py` wrote; its weights are random.
        quantization: vLLM's name of it; None for BF16.
        most_tokens: batches whose prompts have more than this are left out; None for no limit.
        steps: decode steps of the whole batch.
        eager: neither compiled nor captured, for trying things out.
        capture: tokens of the largest step that is captured in a CUDA graph; at 512 Spense captures more, see
            `capture_sizes`.
        engines: that share the GPU's memory.
        gpu_time: whether to find out, too, for how much of a step the GPU is busy.
        tensor_parallel: GPUs that share every layer.
        prefills: further contexts, of one request.
        count_kernels: whether to count what runs in a decode step of `PROFILED`.
        routing: `SKEWED` for routers of mixtures that prefer some experts; else random ones are balanced.
        timelines: batches of whose decode steps every run of a kernel is written down, with a context of 16.
    """

    model: str
    quantization: str | None
    kv_cache_dtype: str
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    most_tokens: int | None
    steps: int
    eager: bool = False
    capture: int = 512
    engines: int = 1
    gpu_time: bool = False
    tensor_parallel: int = 1
    prefills: tuple[int, ...] = ()
    count_kernels: bool = True
    routing: str | None = None
    timelines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        start_s: to a ready engine: loading, searching for kernels, compiling, capturing.
        plugin_load_s: of that, what Spense does to loaded weights: checks, compression, and searches unless the plan
            cache knows already what they find. None in stock vLLM, and with several GPUs.
        weight_bytes: of all parameters, in the memory of one GPU.
        kv_tokens: tokens that the KV cache has room for; batches that need more are left out.
        working_bytes: the most GPU memory that tensors took at once beyond weights and KV cache; None with no GPU or
            several.
        linear_kernels: vLLM's names of what multiplies by the weights of linear layers.
        kernels: of a decode step of `PROFILED`; empty if that is not among what is timed, or not on a GPU.
        gpu_ms: (batch, context, ms that the GPU is busy in a decode step), if ordered.
        timelines: (batch, what ran in some decode steps), if ordered.
    """

    start_s: float
    plugin_load_s: float | None
    weight_bytes: int
    kv_tokens: int
    timings: tuple[Timing, ...]
    working_bytes: int | None = None
    linear_kernels: tuple[str, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    gpu_ms: tuple[tuple[int, int, float], ...] = ()
    timelines: tuple[tuple[int, list[KernelRun]], ...] = ()


@dataclass(frozen=True)
class Kernel:
    """How often a kernel runs in one decode step, and how long all of its runs take."""

    name: str
    runs: float
    us: float


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    order, target = Order(**json.loads(sys.argv[1])), Path(sys.argv[2])
    answer = run(order)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(answer)), encoding="utf-8")
    unfinished.rename(target)


def run(order: Order) -> Answer:
    """Starts the engine and times it."""
    sys.stdin.readline()
    watch = plugin_watch() if order.quantization == "spense" and order.tensor_parallel == 1 else None
    fill_int4_before_packing()
    start = time.perf_counter()
    llm = start_engine(order)
    start_s = time.perf_counter() - start
    llm.apply_model(partial(fill_random, skewed=order.routing == SKEWED))
    bench = Bench(llm, order.steps)
    # With several GPUs the engine is in other processes.
    alone = torch.cuda.is_available() and order.tensor_parallel == 1
    if alone:
        torch.cuda.reset_peak_memory_stats()
    print(READY, flush=True)
    sys.stdin.readline()
    bench.require_finite()
    timings = []
    for batch, context in grid(order):
        if bench.fits(batch, context):
            timings.append(bench.time(batch, context))
            print(f"decode_speed: {timings[-1]}", flush=True)
        else:
            print(f"decode_speed: batch {batch} × context {context} does not fit the KV cache", flush=True)
    weights = llm.apply_model(weight_bytes)[0]
    working_bytes = None
    if alone:
        working_bytes = torch.cuda.max_memory_allocated() - weights - bench.kv_tokens * kv_token_bytes(order)
    kernels: tuple[Kernel, ...] = ()
    if order.count_kernels and PROFILED in grid(order) and torch.cuda.is_available():
        kernels = bench.kernels(*PROFILED)
        for kernel in kernels:
            print(f"decode_speed: {kernel}", flush=True)
    gpu_ms = tuple((t.batch, t.context, bench.gpu_ms(t.batch, t.context)) for t in timings if order.gpu_time)
    return Answer(
        round(start_s, 1),
        watch and round(watch.seconds, 1),
        weights,
        bench.kv_tokens,
        tuple(timings),
        working_bytes,
        llm.apply_model(linear_kernels)[0],
        kernels,
        gpu_ms,
        tuple((batch, bench.profiled(batch, PROFILED[1])) for batch in order.timelines),
    )


class Watch:
    """Seconds that functions took, GPU included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, owner: Any, name: str, sign: int = 1) -> None:
        """From now on counts `owner.name`, or takes it away again where something else counts it."""
        function = getattr(owner, name)

        def timed(*args: Any, **settings: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **settings)
            synchronize()
            self.seconds += sign * (time.perf_counter() - start)
            return result

        setattr(owner, name, timed)


def plugin_watch() -> Watch:
    """On everything that the plugin does to loaded weights, but for filling them with dummy values."""
    from vllm_spense.plugin import loaders
    from vllm_spense.plugin.experts import RegionExpertsMethod
    from vllm_spense.plugin.linear import RegionLinearMethod
    from vllm_spense.plugin.unpruned_linear import UnprunedKernel

    watch = Watch()
    watch.on(RegionLinearMethod, "process_weights_after_loading")
    watch.on(RegionExpertsMethod, "process_weights_after_loading")
    watch.on(UnprunedKernel, "process_weights_after_loading")
    watch.on(loaders, "fill_dummy", sign=-1)
    return watch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_engine(order: Order) -> LLM:
    """An engine that captures the batches it will be asked for, and prefill up to `order.capture` tokens."""
    longest = max(context + output_tokens(batch, context, order.steps) for batch, context in grid(order))
    special: dict[str, Any] = {}
    if order.engines > 1:
        # What the others take would be mistaken for this one's.
        special = {"gpu_memory_utilization": 0.8 / order.engines, "kv_cache_memory_bytes": needed_kv_bytes(order)}
    config = config_of(order)
    if text_config(config) is not config:
        # Then vLLM makes do without the processor that a shape lacks, and the language model is what is timed.
        special["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    if "linear_num_value_heads" in text_config(config):
        # vLLM's own choice on Hopper is in flashinfer, which it does not need otherwise.
        special["additional_config"] = {"gdn_prefill_backend": "triton"}
    return LLM(
        order.model,
        quantization=order.quantization,
        tensor_parallel_size=order.tensor_parallel,
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=order.kv_cache_dtype,
        max_model_len=longest,
        max_num_seqs=max(order.batches),
        max_num_batched_tokens=TOKEN_BUDGET,
        # Every prompt is new, and its whole prefill counts.
        enable_prefix_caching=False,
        enforce_eager=order.eager,
        compilation_config={"cudagraph_capture_sizes": capture_sizes(order)},
        seed=0,
        **special,
    )


def capture_sizes(order: Order) -> list[int]:
    """Numbers of tokens: the batches, the most that vLLM captures for them by default, and what is captured beyond it:
    steps of 256 up to `order.capture`, or, where that is 512, in Spense's engine what the plugin asks for. It has these
    for every model, not only for those that the plugin lists."""
    usual = min(2 * max(order.batches), 512)
    own = beyond(usual) if order.quantization == "spense" and order.capture <= 512 else ()
    return sorted({*order.batches, usual, *own, *range(768, order.capture + 1, 256)})


def needed_kv_bytes(order: Order) -> int:
    """Of one GPU's KV cache for the largest batch."""
    batches = [(batch, context + output_tokens(batch, context, order.steps)) for batch, context in grid(order)]
    return make_shape.kv_cache_bytes(config_of(order), order.kv_cache_dtype, batches) // order.tensor_parallel


def kv_token_bytes(order: Order) -> int:
    """Of the keys and values of one token in all layers."""
    return make_shape.kv_token_bytes(config_of(order), order.kv_cache_dtype)


def config_of(order: Order) -> dict[str, Any]:
    """The model's config.json."""
    found: dict[str, Any] = json.loads(Path(order.model, "config.json").read_text(encoding="utf-8"))
    return found


def grid(order: Order) -> list[tuple[int, int]]:
    """Every batch and context to time, but for what has too many tokens; then what is timed for its prefill."""
    most = order.most_tokens or math.inf
    cells = [(b, context) for context in order.contexts for b in order.batches if b * context <= most]
    return [*cells, *((1, context) for context in order.prefills if (1, context) not in cells)]


class Bench:
    """Times batches on a running engine."""

    def __init__(self, llm: LLM, steps: int) -> None:
        self.llm = llm
        self.engine = engine = llm.llm_engine
        config = engine.vllm_config
        self.steps = steps
        self.vocabulary = engine.model_config.get_vocab_size()
        self.block = config.cache_config.block_size
        self.kv_tokens = (config.cache_config.num_gpu_blocks or 0) * self.block

    def fits(self, batch: int, context: int) -> bool:
        """Whether the KV cache holds the whole batch, so that no request is put off."""
        tokens = context + output_tokens(batch, context, self.steps)
        # vLLM keeps one block for itself.
        return (batch * math.ceil(tokens / self.block) + 1) * self.block <= self.kv_tokens

    def time(self, batch: int, context: int) -> Timing:
        """Random prompts, generated until the whole batch has decoded for `steps` steps."""
        repetitions = REPETITIONS if batch * context <= REPEATED_TOKENS else 1
        tokens = output_tokens(batch, context, self.steps)
        prefills, steps = [], []
        for _ in range(repetitions):
            prefill, decode = time_steps(self._results(self._prompts(batch, context), tokens), batch)
            prefills.append(prefill)
            steps += decode[_SETTLING:]
        return summarize(batch, context, prefills, steps)

    def kernels(self, batch: int, context: int) -> tuple[Kernel, ...]:
        """What runs on the GPU in a decode step, most time first."""
        runs: Counter[str] = Counter()
        us: Counter[str] = Counter()
        for event in self.profiled(batch, context):
            # Some are templates spelled out over hundreds of characters.
            name = event.name[:_NAME_LENGTH]
            runs[name] += 1
            us[name] += event.end - event.start
        each = _PROFILED_STEPS
        return tuple(Kernel(name, runs[name] / each, round(total / each, 2)) for name, total in us.most_common())

    def gpu_ms(self, batch: int, context: int) -> float:
        """Time of a decode step in which anything runs on the GPU: in the rest it waits for the host."""
        busy, until = 0.0, 0.0
        for event in sorted(self.profiled(batch, context), key=lambda event: event.start):
            # Kernels overlap where one begins before the one before it has ended.
            busy += max(event.end - max(event.start, until), 0)
            until = max(until, event.end)
        return round(busy / _PROFILED_STEPS / 1e3, 4)

    def profiled(self, batch: int, context: int) -> list[KernelRun]:
        """What ran on the first GPU in `_PROFILED_STEPS` decode steps."""
        results = self._results(self._prompts(batch, context), output_tokens(batch, context, 2 * _PROFILED_STEPS))
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= next(results)
        self.llm.collective_rpc(worker_profile.begin)
        for _ in range(_PROFILED_STEPS):
            next(results)
        found = self.llm.collective_rpc(worker_profile.end)[0]
        for _ in results:
            pass
        return found

    def require_finite(self) -> None:
        """Runs one request, which also warms up, and looks at what the model makes of it.

        Raises:
            SpenseError: logits that are not numbers, or all the same.
        """
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False, logprobs=LIKELIEST)
        self.engine.add_request("finite", tokens_input(self._prompts(1, 16)[0]), params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                for likeliest in output.outputs[0].logprobs:
                    require_sensible(entry.logprob for entry in likeliest.values())

    def _prompts(self, batch: int, context: int) -> list[list[int]]:
        return torch.randint(self.vocabulary, (batch, context)).tolist()

    def _results(self, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[set[str]]:
        """First nothing, once all requests are there; then after each step the requests that got a token."""
        params = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), tokens_input(list(prompt)), params)
        yield set()
        while self.engine.has_unfinished_requests():
            yield {output.request_id for output in self.engine.step()}


if __name__ == "__main__":
    main()
