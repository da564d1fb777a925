"""Kernel by kernel, one decoder layer of a decode step: stock vLLM in FP8 against Spense (issue 24).

    python benchmarks/layer_timeline.py

runs both engines on Qwen3-32B's shape and writes benchmarks/results/layer_timeline.json: what runs between the
attention kernels of two layers, in its order. `us` is how much later a kernel ends than all before it, the median over
layers and steps: kernels overlap, and these times add up to the layer's. `runs_us` is from its own begin to its end.
`bytes_us` and `products_us` are what a GEMM's weights take to arrive and its products to be made by the GPU's data
sheet, so that no GEMM takes less than the larger of the two.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, mlp_sparsity, positive, run_main, writable_folder
from benchmarks.engine_runs import EngineRun, in_turn
from benchmarks.envelope import print_row, write_result
from benchmarks.make_shape import annotation, make_shape, shape_config, text_config
from benchmarks.multimodal_shapes import MULTIMODAL_SHAPES
from benchmarks.worker_profile import KernelRun
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions
from vllm_spense.model_sizes import Model
from vllm_spense.roofline import GPUS, Gpu, gpu_named
from vllm_spense.shapes import SHAPES

TOKENS = (64, 128, 256, 512)
#: A layer's GEMMs in their order from one attention kernel to the next.
GEMMS = ("o", "gate_up", "down", "qkv")
#: Names of kernels.
_ATTENTION = re.compile("flash|attention|fmha", re.IGNORECASE)
_GEMM = re.compile("gemm|cutlass|nvjet", re.IGNORECASE)
#: What a library does before its kernels.
_WITHIN_GEMM = re.compile("memset", re.IGNORECASE)
#: Those of Inductor, which are called after the operators next to them.
_INDUCTOR = "triton_"
_NAME_LENGTH = 80

Row = dict[str, Any]


def main() -> None:
    options = parse()
    gpu = this_gpu()
    rows: list[Row] = []
    with TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        runs = [engine(options, work, sparsity) for sparsity in (None, options.sparsity)]
        with closing(in_turn(runs, options.together)) as turns:
            for sparsity, run in zip((None, options.sparsity), turns, strict=True):
                for tokens, events in run.measure().timelines:
                    rows += timeline_rows(options.shape, run.layers, sparsity, tokens, gpu, events)
                write_result(options.out, "layer_timeline", rows)
    for row in rows:
        print_row(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, *MULTIMODAL_SHAPES), default="qwen3-32b")
    parser.add_argument("--layers", type=positive, default=8, help="fewer layers than the shape has")
    parser.add_argument("--sparsity", type=mlp_sparsity, default=0.375)
    parser.add_argument("--tokens", nargs="+", type=positive, default=TOKENS, help="requests that decode")
    parser.add_argument("--kv", choices=("auto", "fp8"), default="fp8", help="type of the KV cache")
    parser.add_argument("--together", type=positive, default=2, help="engines that share the GPU's memory")
    parser.add_argument(
        "--work", type=writable_folder, help="folder for configurations, logs and what engines measured"
    )
    add_out(parser, "layer_timeline")
    parser.set_defaults(contexts=[16], most_tokens=None, steps=16, eager=False, capture=512, tensor_parallel=1)
    options = parser.parse_args()
    options.batches = options.tokens
    return options


def engine(options: argparse.Namespace, work: Path, sparsity: float | None) -> EngineRun:
    folder = make_shape(options.shape, work / f"timeline-{sparsity}", sparsity, options.layers)
    quantization = "compressed-tensors" if sparsity is None else "spense"
    return EngineRun(options, folder, quantization, options.kv, count_kernels=False, timelines=options.tokens)


def timeline_rows(
    shape: str, layers: int, sparsity: float | None, tokens: int, gpu: Gpu, events: Sequence[KernelRun]
) -> list[Row]:
    """One row for each kernel of a layer, in their order."""
    config = text_config(shape_config(shape))
    regions = None if sparsity is None else annotation(config, sparsity).default
    ideals = ideal_us(Model.from_config(config), regions, tokens, gpu)
    layer = with_roles(middle_layer(events, layers))
    return [
        {
            "shape": shape,
            "tokens": tokens,
            "sparsity": sparsity,
            "place": place,
            "kernel": name[:_NAME_LENGTH],
            "role": role,
            "us": round(us, 2),
            "runs_us": round(runs_us, 2),
            "bytes_us": ideals[role][0] if role in ideals else None,
            "products_us": ideals[role][1] if role in ideals else None,
        }
        for place, (name, role, us, runs_us) in enumerate(layer)
    ]


def middle_layer(events: Sequence[KernelRun], layers: int) -> list[tuple[str, float, float]]:
    """(name, us later than all before it, us of its own) of what follows attention, up to the next layer's and with it.

    Args:
        events: of several decode steps.

    Raises:
        SpenseError: no kernel's name says attention, or none runs once in each layer.
    """
    events = sorted(events, key=lambda event: event.start)
    counts = Counter(event.name for event in events if _ATTENTION.search(event.name))
    once = [name for name, count in counts.items() if count % layers == 0]
    if not once:
        raise SpenseError(f"no attention kernel that runs in each of {layers} layers (found: {dict(counts)})")
    # The one that takes longest, where several belong to attention.
    last = max(once, key=lambda name: sum(event.end - event.start for event in events if event.name == name))
    places = [place for place, event in enumerate(events) if event.name == last]
    # Up to when something has run, before each event.
    until = [*accumulate((event.end for event in events), max, initial=events[0].start)]
    stretches = [range(a + 1, b + 1) for a, b in pairwise(places)]
    usual = Counter(tuple(events[i].name for i in stretch) for stretch in stretches).most_common(1)[0][0]
    alike = [stretch for stretch in stretches if tuple(events[i].name for i in stretch) == usual]
    found = []
    for place, name in enumerate(usual):
        runs = [stretch[place] for stretch in alike]
        us = median(until[i + 1] - until[i] for i in runs)
        found.append((name, us, median(events[i].end - events[i].start for i in runs)))
    # Attention may end with smaller kernels.
    while _ATTENTION.search(found[0][0]):
        found.append(found.pop(0))
    return found


def with_roles(layer: Sequence[tuple[str, float, float]]) -> list[tuple[str, str, float, float]]:
    """(name, role, us, own us): one of `GEMMS`, `attention` or `other`. A GEMM may take several kernels in a row.

    Raises:
        SpenseError: another number of GEMMs.
    """
    found, seen, before = [], 0, False
    for name, us, own_us in layer:
        is_gemm = bool(_GEMM.search(name)) and not _ATTENTION.search(name) and not name.startswith(_INDUCTOR)
        is_gemm |= bool(_WITHIN_GEMM.search(name))
        seen += is_gemm and not before
        before = is_gemm
        role = "attention" if _ATTENTION.search(name) else "other"
        found.append((name, GEMMS[min(seen, len(GEMMS)) - 1] if is_gemm else role, us, own_us))
    if seen != len(GEMMS):
        names = ", ".join(name[:_NAME_LENGTH] for name, *_ in layer)
        raise SpenseError(f"a layer has {seen} GEMMs, expected {len(GEMMS)} (kernels: {names})")
    return found


def this_gpu() -> Gpu:
    """
    Raises:
        SpenseError: there is none, or one whose data sheet `roofline` does not have.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no NVIDIA GPU"
    gpu = gpu_named(name)
    if gpu is None:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise SpenseError(f"nothing to compare with: found {name}, expected one of {known}")
    return gpu


def ideal_us(model: Model, regions: Regions | None, tokens: int, gpu: Gpu) -> dict[str, tuple[float, float]]:
    """(by bytes, by products) of each of `GEMMS`.

    Args:
        regions: of the MLP; None for dense.
    """
    qkv, o = model.attention_shapes
    gate_up, down = model.mlp_shapes(model.intermediate_size)
    shapes = {"o": o, "gate_up": gate_up, "down": down, "qkv": qkv}
    sparse = regions.sparse / regions.intermediate if regions else 0
    found = {}
    for name, (n, k) in shapes.items():
        share = sparse if name in ("gate_up", "down") else 0
        bytes_us = n * k * (1 - share * 0.375) / gpu.bytes_per_s * 1e6
        products_us = 2 * tokens * n * k * (1 - share / 2) / gpu.fp8_flops * 1e6
        found[name] = round(bytes_us, 2), round(products_us, 2)
    return found


if __name__ == "__main__":
    run_main(main)
