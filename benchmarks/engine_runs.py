"""Engines that are timed in processes of their own: started together where a GPU has room, measured one at a time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.envelope import ROOT, circumstances
from benchmarks.make_shape import text_config
from benchmarks.timings import READY, TOKEN_BUDGET, Timing
from benchmarks.worker_profile import KernelRun
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, Annotation

#: Of a failed engine's output.
_LAST_LINES = 40


@dataclass(frozen=True)
class Measured:
    """One engine or server.

    Attributes:
        timings: by (batch, context).
        start_s, weight_bytes: of an engine.
        load_s: what Spense adds to loading, with what `search_s` found; None in stock vLLM.
        search_s: that a search of kernels took before the engines began; None where the engine itself searched.
        saved_bytes: what the format says its regions save over dense weights.
        layer_kernels: how many kernels run in each layer in a decode step; None where nobody counted.
        gpu_ms: by (batch, context), for how much of a step the GPU is busy, where that was asked for.
        working_bytes, linear_kernels, timelines: as `engine_times.Answer` has them; of an engine.
    """

    timings: Mapping[tuple[int, int], Timing]
    start_s: float | None = None
    load_s: float | None = None
    search_s: float | None = None
    weight_bytes: int | None = None
    saved_bytes: int = 0
    layer_kernels: int | None = None
    gpu_ms: Mapping[tuple[int, int], float] = field(default_factory=dict)
    working_bytes: int | None = None
    linear_kernels: tuple[str, ...] = ()
    timelines: tuple[tuple[int, list[KernelRun]], ...] = ()


class Turn(Protocol):
    """What `in_turn` asks of a process that measures or serves: methods and attributes are as `EngineRun` has them."""

    folder: Path
    search_s: float | None

    @property
    def process(self) -> subprocess.Popen[Any] | None: ...
    def start(self) -> None: ...
    def begin(self) -> None: ...
    def wait_until_ready(self) -> None: ...
    def stop(self) -> None: ...


Run = TypeVar("Run", bound=Turn)


def in_turn(runs: Sequence[Run], together: int) -> Iterator[Run]:
    """Engines in their order, each when it may be measured; closed, it ends what still runs.

    Args:
        together: how many are started before the first of them is measured.
    """
    groups = [runs[i : i + together] for i in range(0, len(runs), together)]
    try:
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            begin(group)
            for run in following:
                run.start()
            yield from group
    finally:
        for run in runs:
            run.stop()


def begin(group: Sequence[Turn]) -> None:
    """Starts engines; several of them, which share the GPU, until all are ready."""
    for run in group:
        run.start()
    if len(group) > 1:
        search_first(group)
        for run in group:
            run.begin()
        for run in group:
            run.wait_until_ready()


class EngineRun:
    """A process that measures one engine, or what an equal one of the same code left beside the folder.

    Args:
        folder: of the configuration; log and answer go beside it.
        quantization: as vLLM calls it; None for BF16.
        kv: type of the KV cache.
        order: more of `engine_times.Order`.
    """

    def __init__(
        self, options: argparse.Namespace, folder: Path, quantization: str | None, kv: str, **order: Any
    ) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.layers: int = text_config(config)["num_hidden_layers"]
        self.ranks: int = options.tensor_parallel
        self.order = json.dumps(
            {
                "model": str(folder.resolve()),
                "quantization": quantization,
                "kv_cache_dtype": kv,
                "batches": options.batches,
                "contexts": options.contexts,
                "most_tokens": options.most_tokens,
                "steps": options.steps,
                "eager": options.eager,
                "capture": options.capture,
                "engines": options.together,
                "tensor_parallel": options.tensor_parallel,
                **order,
            }
        )
        decisive = self.order, json.dumps(config), json.dumps(circumstances())
        digest = sha256("".join(decisive).encode()).hexdigest()[:8]
        self.stem = f"{folder.name}-kv-{kv}-{digest}"
        self.answer, self.log = folder.with_name(f"{self.stem}.json"), folder.with_name(f"{self.stem}.log")
        self.process: subprocess.Popen[str] | None = None
        self.search_s: float | None = None

    def start(self) -> None:
        """Lets the process import vLLM, which takes long, while another engine still has the GPU."""
        if self.process:
            return
        if self.answer.exists():
            print(f"{self.stem}: measured before", flush=True)
            return
        command = [sys.executable, "-m", "benchmarks.engine_times", self.order, str(self.answer.resolve())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def begin(self) -> None:
        """Lets the process start its engine beside others."""
        if self.process and self.process.stdin:
            # One that has ended already is reported when it is to be measured.
            with suppress(BrokenPipeError):
                self.process.stdin.write("\n")
                self.process.stdin.flush()

    def wait_until_ready(self) -> None:
        while self.process and self.process.poll() is None and READY not in self.log.read_text(errors="replace"):
            time.sleep(0.2)

    def measure(self) -> Measured:
        """Lets the process have the GPU, and waits for its answer.

        Raises:
            SpenseError: the process failed; shows the end of its log.
        """
        if self.process:
            print(f"{self.stem}: measuring", flush=True)
            self.process.communicate("\n\n")
            if self.process.returncode:
                end = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
                raise SpenseError(f"{end}\nthe engine of {self.stem} ended with code {self.process.returncode}")
        found = json.loads(self.answer.read_text(encoding="utf-8"))
        timings = [Timing(**timing) for timing in found["timings"]]
        return Measured(
            {(timing.batch, timing.context): timing for timing in timings},
            found["start_s"],
            found["plugin_load_s"],
            self.search_s,
            found["weight_bytes"],
            saved_bytes(json.loads((self.folder / "config.json").read_text(encoding="utf-8"))) // self.ranks,
            layer_kernels([kernel["runs"] for kernel in found.get("kernels", ())], self.layers),
            {(batch, context): ms for batch, context, ms in found["gpu_ms"]},
            found.get("working_bytes"),
            tuple(found.get("linear_kernels", ())),
            tuple((batch, [KernelRun(**run) for run in runs]) for batch, runs in found.get("timelines", ())),
        )

    def stop(self) -> None:
        if self.process:
            self.process.kill()


def search_first(runs: Sequence[Turn]) -> None:
    """Fills the plan cache while nobody else uses the GPU: engines that start together would disturb each other."""
    import torch
    import vllm._custom_ops  # noqa: F401 - the kernels that ours compete with

    from vllm_spense.kernels.region_gemm.problem import Problem
    from vllm_spense.ops.layer_plan import plan_of
    from vllm_spense.ops.unpruned_ops import prepare_unpruned
    from vllm_spense.plugin.vllm_internals import stock_gemm

    if not torch.cuda.is_available():
        return
    device = torch.device("cuda", 0)
    for run in runs:
        config = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
        if run.process and KEY in config.get("quantization_config", {}):
            start = time.perf_counter()
            text = text_config(config)
            hidden, heads = text["hidden_size"], text["num_attention_heads"] * text["head_dim"]
            keys_and_values = 2 * text["num_key_value_heads"] * text["head_dim"]
            prepare_unpruned(heads + keys_and_values, hidden, device, stock_gemm())
            prepare_unpruned(hidden, heads, device, stock_gemm())
            annotation = Annotation.from_dict(config["quantization_config"][KEY])
            for regions in {annotation.regions(module) for module in annotation.modules}:
                i = regions.intermediate
                for problem in (
                    Problem(2 * i, hidden, regions, "output", projections=2).region_major(),
                    Problem(hidden, i, regions, "input", separate_outputs=True),
                ):
                    plan_of(problem.op_key, device).prepare(TOKEN_BUDGET)
            run.search_s = round(time.perf_counter() - start, 1)
    torch.cuda.empty_cache()


def layer_kernels(runs: Sequence[float], layers: int) -> int | None:
    """Kernels in each layer, from how often each kernel runs in a step; what runs once in a step is in none."""
    # Some run once less: before the first layer or after the last, something else does their work.
    return sum(round(count / layers) for count in runs) if runs else None


def saved_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of dense FP8 weights that the sparse regions of a config.json do without: 0.375 of each."""
    if KEY not in config.get("quantization_config", {}):
        return 0
    annotation = Annotation.from_dict(config["quantization_config"][KEY])
    sparse = sum(annotation.regions(module).sparse for module in annotation.mlps())
    return 3 * sparse * text_config(config)["hidden_size"] * 3 // 8
