"""How long pruning a published shape takes, from whole blocks measured with random weights and random tokens.

    python benchmarks/prune_time.py

prunes three blocks of Qwen3-32B's shape on 128 × 16384 tokens with both methods, through the same code as
`spense prune`, reading and writing real files, and writes benchmarks/results/prune_time.json and .png. The model that
is pruned has a few more blocks than are measured: one to profile, with the first method, and the last one, which has no
next block to compute the input of. Before a shape is measured, two blocks are pruned on an eighth of the text: what the
first of them takes longer than the second is compilation and libraries that wake up, which every run pays once. The
projection is that, the first block and the last as measured, and the mean of the others for the rest.

    torchrun --nproc-per-node 2 benchmarks/prune_time.py --methods spensegpt+

does so on two GPUs and writes prune_time-2gpus.json. Other shapes and methods, with --out for another file:

    python benchmarks/prune_time.py --shapes llama-3.1-8b llama-3.3-70b --methods spensegpt+ --blocks 2 --no-profile
    python benchmarks/prune_time.py --methods spensegpt++ --blocks 2 --no-profile
    python benchmarks/prune_time.py --shapes qwen3-30b-a3b --methods spensegpt+ --no-profile

A real model is pruned whole, on the built-in calibration text:

    python benchmarks/prune_time.py --model .demo/smollm2-135m --samples 64 --length 512
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import positive, readable_folder, result_file, run_main, writable_folder
from benchmarks.envelope import RESULTS, write_result
from offline_prune.memory_plan import GIB
from offline_prune.methods.recipe import METHODS
from offline_prune.model.safetensors_reader import INDEX_NAME
from offline_prune.model.skeleton import empty_model
from offline_prune.pipeline import prune
from offline_prune.report import BlockTime, Report
from offline_prune.runtime import deterministic_reduce, distributed
from offline_prune.runtime.device import pick_device
from offline_prune.runtime.profiler import spent
from offline_prune.settings import PruneSettings
from vllm_spense.shapes import MIXTURES, SHAPES

#: Minutes for the whole model on a B200 with 128 × 16384 tokens, as the paper's Table 8 has them.
PAPER = {("qwen3-32b", "spensegpt"): 1.33 * 60, ("qwen3-32b", "spensegpt+"): 1.87 * 60}
ALL_SHAPES = {**SHAPES, **MIXTURES}
#: Embeddings are outside of what is measured.
VOCABULARY = 1024
TENSOR_CORES = re.compile(r"nvjet|xmma|tensorop|wgmma|[sh]16816|flash|fmha|sdpa", re.IGNORECASE)
ORDINARY_CORES = re.compile(r"simt|sgemm|f32f32_f32f32_f32", re.IGNORECASE)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, default=["qwen3-32b"])
    parser.add_argument("--model", type=readable_folder, help="a real model to prune whole, in place of shapes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["spensegpt+", "spensegpt"])
    parser.add_argument("--blocks", type=positive, default=3, help="blocks to measure")
    parser.add_argument("--samples", type=positive, default=128)
    parser.add_argument("--length", type=positive, default=16384)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--profile", action=argparse.BooleanOptionalAction, default=True, help="one block more, of the first method"
    )
    parser.add_argument(
        "--folder", type=writable_folder, help="for the model and its pruned form [default: a temporary one]"
    )
    parser.add_argument("--out", type=result_file, help="[default: benchmarks/results/prune_time.json]")
    options = parser.parse_args()

    device = pick_device(options.device)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with distributed.process_group(device):
        file = options.out or RESULTS / f"prune_time{suffix(options)}.json"
        rows: list[Row] = []
        for row in real_rows(options) if options.model else shape_rows(options, device):
            rows.append(row)
            if distributed.is_first():
                print(json.dumps(row, indent=2), flush=True)
                write_result(file, "prune_time", rows)
        if distributed.is_first():
            draw(rows, file.with_suffix(".png"))


def suffix(options: argparse.Namespace) -> str:
    """Of the result file's name."""
    return (f"-{options.model.name}" if options.model else "") + (
        f"-{distributed.size()}gpus" if distributed.size() > 1 else ""
    )


def real_rows(options: argparse.Namespace) -> Iterator[Row]:
    """A whole model with each method, as a user would prune it."""
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        for method in options.methods:
            out = Path(distributed.broadcast_from_first(lambda own=own: own)) / "pruned"
            report = prune(
                settings_for(options.model, out, method, options.samples, options.length, options.device), say=say
            )
            yield {
                **about(report, options.model.name, method, len(report.blocks), report.blocks),
                "projected_minutes": report.seconds / 60,
            }


def shape_rows(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Some blocks of each shape with each method."""
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(dir=options.folder) as own:
            # All ranks read the first one's.
            blocks = options.blocks + 1 + options.profile
            model = distributed.broadcast_from_first(partial(write_model, Path(own) / shape, shape, blocks, device))
            once = max(warm_up(model, shape, method, options) for method in options.methods)
            for method in options.methods:
                profile = options.profile and method == options.methods[0]
                distributed.broadcast_from_first(partial(configure, model, shape, options.blocks + 1 + profile))
                yield measure(model, shape, method, profile, once, options)


def write_model(folder: Path, shape: str, blocks: int, device: torch.device, vocabulary: int | None = None) -> Path:
    """Writes a model of random BF16 weights that keep activations about as large as 1, one safetensors file a block."""
    folder.mkdir()
    generator = torch.Generator(device).manual_seed(0)
    for file, shapes in configure(folder, shape, blocks, vocabulary).items():
        tensors = {}
        for name, size in shapes.items():
            tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
            if len(size) > 1:
                tensor.normal_(std=size[1] ** -0.5, generator=generator)
            tensors[name] = tensor.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    say(f"{shape}: {blocks} blocks written")
    return folder


def configure(folder: Path, shape: str, blocks: int, vocabulary: int | None = None) -> dict[str, dict[str, torch.Size]]:
    """Makes the folder a model of so many blocks, the first of those that are written.

    Returns:
        File → its tensors' names and shapes.
    """
    config = {**ALL_SHAPES[shape], "num_hidden_layers": blocks, "vocab_size": vocabulary or VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 0, "eos_token_id": 1}))
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in empty_model(folder).named_parameters():
        block = re.match(r".*\.layers\.\d+", name)
        file = files.setdefault(f"{block[0] if block else 'rest'}.safetensors", {})
        file |= dict(stored_shapes(name, parameter.shape))
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return files


def stored_shapes(name: str, size: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """Tensors of the files that make a parameter: transformers stacks all experts of a layer, files have each of them.

    Args:
        name: ends in `gate_up_proj` or `down_proj` where experts are stacked.
    """
    if len(size) < 3:
        yield name, size
        return
    count, height, width = size
    path, _, leaf = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    for expert, part in itertools.product(range(count), parts):
        yield f"{path}.{expert}.{part}.weight", torch.Size((height // len(parts), width))


def settings_for(model: Path, out: Path, method: str, samples: int, length: int, device: str) -> PruneSettings:
    return PruneSettings(
        str(model),
        out,
        method=method,
        calibration="builtin",
        samples=samples,
        length=length,
        device=device,
        overwrite=True,
    )


def random_tokens(settings: PruneSettings) -> torch.Tensor:
    return torch.randint(VOCABULARY, (settings.samples, settings.length), generator=torch.Generator().manual_seed(0))


def warm_up(model: Path, shape: str, method: str, options: argparse.Namespace) -> float:
    """Prunes two blocks on an eighth of the text; the seconds that the first of them takes longer than the second."""
    distributed.broadcast_from_first(partial(configure, model, shape, 2))
    # As many as ranks can divide.
    samples = min(
        options.samples,
        max(options.samples // 8 // deterministic_reduce.MAX_SHARDS, 1) * deterministic_reduce.MAX_SHARDS,
    )
    settings = settings_for(model, model.with_name("pruned"), method, samples, options.length, options.device)
    first, second = prune(settings, say=lambda _: None, tokens=random_tokens(settings)).blocks
    say(f"{method}: two blocks to warm up, {first.seconds:.1f} and {second.seconds:.1f} s")
    return max(first.seconds - second.seconds, 0.0)


def measure(model: Path, shape: str, method: str, profile: bool, once: float, options: argparse.Namespace) -> Row:
    """Prunes the model and returns a row of the result; `once` is the seconds that a process pays at its beginning."""
    device = pick_device(options.device)
    settings = settings_for(model, model.with_name("pruned"), method, options.samples, options.length, options.device)
    kernels = Kernels(device if profile else None)
    before: dict[str, float] = {}
    aside = 0.0
    if device.type == "cuda":
        # The method before this one leaves nothing.
        gc.collect()
        torch.cuda.empty_cache()

    def progress(done: int, total: int, name: str) -> None:
        nonlocal before, aside
        start, now = time.perf_counter(), spent()
        block = {stage: seconds - before.get(stage, 0.0) for stage, seconds in now.items()}
        say(f"{method}: {done} of {total}: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in block.items()))
        before = now
        if done == options.blocks:
            kernels.start()
        elif done == options.blocks + 1:
            kernels.stop()
        aside += time.perf_counter() - start

    report = prune(settings, progress, say, random_tokens(settings))
    layers = ALL_SHAPES[shape]["num_hidden_layers"]
    measured, last = report.blocks[: options.blocks], report.blocks[-1]
    return {
        **about(report, shape, method, layers, measured),
        "projected_minutes": (once + projected(report, measured, last, layers, aside)) / 60,
        "paper_minutes": PAPER.get((shape, method)),
        "once_seconds": once,
        "first_block_seconds": measured[0].seconds,
        "last_block_seconds": last.seconds,
        "tensor_core_share": kernels.share,
        "kernels": kernels.slowest,
    }


def about(report: Report, shape: str, method: str, layers: int, measured: list[BlockTime]) -> Row:
    """What the rows of shapes and of real models have in common."""
    return {
        "shape": shape,
        "layers": layers,
        "method": method,
        "gpus": distributed.size() if torch.cuda.is_available() else 0,
        "samples": report.settings["samples"],
        "length": report.settings["length"],
        "blocks_measured": len(measured),
        "seconds_per_block": steady([block.seconds for block in measured]),
        "block_seconds": [block.seconds for block in report.blocks],
        "stages": {stage: steady([block.stages.get(stage, 0.0) for block in measured]) for stage in report.stages},
        "peak_gpu_gib": report.peak_device_gib,
        "planned_gpu_gib": report.planned_device_gib,
        "reserved_gpu_gib": torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else 0.0,
        "peak_host_gib": report.peak_host_gib,
        "planned_host_gib": report.planned_host_gib,
        "pinned_host_gib": report.peak_pinned_gib,
    }


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def steady(values: list[float]) -> float:
    """The mean without the first block, whose time is not that of the others."""
    return statistics.mean(values[1:] or values)


def projected(report: Report, measured: list[BlockTime], last: BlockTime, layers: int, aside: float = 0.0) -> float:
    """Seconds for a warm process and a model of so many blocks; `aside` went into profiling."""
    around = report.seconds - aside - sum(block.seconds for block in report.blocks)
    return around + measured[0].seconds + (layers - 2) * steady([block.seconds for block in measured]) + last.seconds


class Kernels:
    """What the GPU's time goes to, while it is watched.

    Args:
        device: None for nothing to watch.

    Attributes:
        share: of the time in which tensor cores multiply; None where nothing was seen.
        slowest: seconds of the kernels that take longest, by name.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.share: float | None = None
        self.slowest: dict[str, float] = {}
        self._profiler = None
        if device and device.type == "cuda":
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._since = 0.0

    def start(self) -> None:
        if self._profiler:
            self._profiler.start()
            self._since = time.perf_counter()

    def stop(self) -> None:
        if self._profiler is None:
            return
        torch.cuda.synchronize()
        wall = time.perf_counter() - self._since
        self._profiler.stop()
        spent = {event.key: event.self_device_time_total / 1e6 for event in self._profiler.key_averages()}
        slowest = sorted(spent.items(), key=lambda item: -item[1])[:16]
        self.slowest = {name[:100]: seconds for name, seconds in slowest}
        # On machines that forbid profiling the profiler reports nothing at all.
        if spent:
            self.share = sum(seconds for name, seconds in spent.items() if on_tensor_cores(name)) / wall


def on_tensor_cores(kernel: str) -> bool:
    return bool(TENSOR_CORES.search(kernel)) and not ORDINARY_CORES.search(kernel)


def processors(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "CPU"


def draw(rows: list[Row], file: Path) -> None:
    """Minutes for the whole model, a bar for each row, stacked by stage; the paper's time as a line beside it."""
    figure = Figure(figsize=(9, 1.2 + 0.7 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    labels = [f"{row['shape']}\n{row['method']}, {processors(row['gpus'])}" for row in rows]
    places = range(len(rows))
    left = [0.0] * len(rows)
    for stage in stages:
        widths = [row["stages"].get(stage, 0.0) * row["layers"] / 60 for row in rows]
        axes.barh(places, widths, left=left, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in zip(places, rows, strict=True):
        axes.text(left[place], place, f" {row['projected_minutes']:.1f} min", va="center")
        if paper := row.get("paper_minutes"):
            axes.plot([paper] * 2, [place - 0.4, place + 0.4], color="black", label="the paper, on a B200")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("minutes for the whole model")
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize="small", ncols=2)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    run_main(main)
