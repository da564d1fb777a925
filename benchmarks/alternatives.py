"""What else makes a model smaller and faster, in the same vLLM on the same GPU: BF16, FP8, four-bit weights, Spense.

    python benchmarks/alternatives.py --together 4

times the shape of Qwen3-32B with 32 layers and random weights and writes benchmarks/results/alternatives.json: output
tokens, prefill, memory and start-up of every scheme, each compared with stock FP8. As many engines as `--together` says
start at once, and one is timed at a time. The same command goes on where it was cut off; a scheme whose engine does not
run has a row that says why, and is tried again. With few layers or a slow host a step takes as long as the host needs
for the next one, whatever the GPU does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

from benchmarks.alternatives_table import STOCK
from benchmarks.command_line import add_out, at_least, positive, run_main, writable_folder
from benchmarks.engine_runs import EngineRun, Measured, in_turn
from benchmarks.envelope import print_row, write_result
from benchmarks.make_shape import annotation, kv_token_bytes, shape_config, write_config
from offline_prune.checkpoint.writer import fp8_config
from scripts.pruned import CACHE
from vllm_spense.errors import SpenseError
from vllm_spense.estimate import MEMORY_UTILIZATION
from vllm_spense.format import KEY
from vllm_spense.shapes import SHAPES

#: Scheme → MLP sparsity. Spense's are first: its kernels are searched for while the engines import vLLM.
SPARSITIES = {"spense-25": 0.25, "spense-37.5": 0.375, "spense-50": 0.5}
SCHEMES = (*SPARSITIES, STOCK, "w4a16", "w4a8-fp8", "bf16")
#: Of four-bit weights: how many of them share a scale. CUTLASS's kernel for FP8 activations takes no other.
GROUP = 128
#: What vLLM takes of a GPU's memory by default, of a GPU with 80 GB.
ROOM_BYTES = int(MEMORY_UTILIZATION * 80e9)
BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (16, 1024)
PREFILLS = (512, 2048, 8192)
_BF16_BYTES = 2
#: As Python prints an exception, in a log that puts something before it.
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception): .+")
_REASON_LENGTH = 300

Row = dict[str, Any]


def main() -> None:
    options = parse()
    runs = {scheme: scheme_run(options, scheme) for scheme in options.schemes}
    found: dict[str, Measured | SpenseError] = {}
    with closing(in_turn(list(runs.values()), options.together)) as turns:
        for scheme, run in zip(runs, turns, strict=True):
            try:
                found[scheme] = run.measure()
            except SpenseError as error:
                found[scheme] = error
            # After each engine, so that a run that is cut short leaves what it has.
            write_result(options.out, "alternatives", rows(options, runs, found))
    failed = [scheme for scheme in found if isinstance(found[scheme], SpenseError)]
    for row in rows(options, runs, found):
        print_row(row)
    if failed:
        sys.exit(f"{options.out} says why these engines did not run: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=positive, default=32, help="fewer layers than the shape has")
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=SCHEMES, metavar="SCHEME", help=" ".join(SCHEMES)
    )
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS)
    parser.add_argument("--prefills", nargs="+", type=positive, default=PREFILLS, help="lengths of single prompts")
    parser.add_argument(
        "--most-tokens", type=positive, default=33000, help="leave out what has a larger batch × context"
    )
    parser.add_argument("--kv", choices=("auto", "fp8"), default="fp8", help="type of the KV cache")
    parser.add_argument("--steps", type=at_least(8), default=16, help="output tokens timed for each batch and context")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture: to try things out")
    parser.add_argument("--capture", type=at_least(512), default=512, help="as decode_speed.py has it")
    parser.add_argument("--together", type=positive, default=1, help="engines that share the GPU's memory")
    parser.add_argument(
        "--work", type=writable_folder, default=str(CACHE / "alternatives"), help="for logs and what engines measured"
    )
    add_out(parser, "alternatives")
    parser.set_defaults(tensor_parallel=1)
    return parser.parse_args()


def scheme_run(options: argparse.Namespace, scheme: str) -> EngineRun:
    """An engine of one of `SCHEMES`."""
    config = scheme_config(shape_config(options.shape, options.layers), scheme)
    folder = write_config(config, options.work / f"{options.shape}-{options.layers}-{scheme}")
    vllm_name = {"bf16": None, **dict.fromkeys(SPARSITIES, "spense")}.get(scheme, "compressed-tensors")
    return EngineRun(options, folder, vllm_name, options.kv, prefills=[*options.prefills], count_kernels=False)


def scheme_config(config: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """A shape's config.json with the `quantization_config` of one of `SCHEMES`."""
    if scheme == "bf16":
        return {**config}
    if scheme in ("w4a16", "w4a8-fp8"):
        return {**config, "quantization_config": int4_config(fp8_inputs=scheme == "w4a8-fp8")}
    quantization = fp8_config(ignore=["lm_head"])
    if scheme in SPARSITIES:
        quantization[KEY] = annotation({**config}, SPARSITIES[scheme]).to_dict()
    return {**config, "quantization_config": quantization}


def int4_config(fp8_inputs: bool) -> dict[str, Any]:
    """The `quantization_config` of weights in four bits with a scale for each `GROUP` along K.

    Args:
        fp8_inputs: whether activations are rounded to FP8, each token with a scale of its own, or stay BF16.
    """
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, dynamic=False
    )
    inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs if fp8_inputs else None)
    config = QuantizationConfig(
        quant_method="compressed-tensors",
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    return json.loads(config.model_dump_json(exclude_unset=True))


def rows(
    options: argparse.Namespace, runs: Mapping[str, EngineRun], found: Mapping[str, Measured | SpenseError]
) -> list[Row]:
    """One row for each scheme, batch and context; one alone for a scheme that failed.

    `model_weight_bytes` and `kv_tokens` are of the shape with all its layers: what tokens fit beside its weights, and
    beside what this engine took while it worked, into `ROOM_BYTES`.
    """
    result = []
    stock = found.get(STOCK)
    for scheme, measured in found.items():
        run = runs[scheme]
        about = {
            "shape": options.shape,
            "layers": run.layers,
            "scheme": scheme,
            "sparsity": SPARSITIES.get(scheme, 0.0),
            "kv_cache_dtype": options.kv,
        }
        if isinstance(measured, SpenseError):
            result.append({**about, "failed": reason(str(measured))})
            continue
        memory = model_memory(options.shape, options.kv, run.layers, measured)
        for (batch, context), timing in measured.timings.items():
            theirs = stock.timings.get((batch, context)) if isinstance(stock, Measured) else None
            result.append(
                {
                    **about,
                    "batch": batch,
                    "context": context,
                    "ms": timing.ms,
                    "spread_ms": timing.spread_ms,
                    "ratio": theirs and round(theirs.ms / timing.ms, 4),
                    "prefill_ms": timing.prefill_ms,
                    "prefill_ratio": theirs and round(theirs.prefill_ms / timing.prefill_ms, 4),
                    "linear_kernels": list(measured.linear_kernels),
                    "start_s": measured.start_s,
                    "search_s": measured.search_s,
                    "weight_bytes": measured.weight_bytes,
                    "working_bytes": measured.working_bytes,
                    **memory,
                }
            )
    return result


def model_memory(shape: str, kv: str, layers: int, measured: Measured) -> Row:
    """Weights and KV tokens of a whole model, from an engine with fewer layers."""
    config = SHAPES[shape]
    copies = 1 if config["tie_word_embeddings"] else 2
    outside = copies * config["vocab_size"] * config["hidden_size"] * _BF16_BYTES
    if measured.weight_bytes is None:
        return {"model_weight_bytes": None, "kv_tokens": None}
    weights = outside + (measured.weight_bytes - outside) * config["num_hidden_layers"] // layers
    token = kv_token_bytes({**config}, kv)
    room = None if measured.working_bytes is None else ROOM_BYTES - weights - measured.working_bytes
    return {"model_weight_bytes": weights, "kv_tokens": None if room is None else max(0, room // token)}


def reason(log: str) -> str:
    """What the end of a failed engine's log names as the error, or its last line."""
    # vLLM's own last error only points to the cause.
    errors = [error for error in _ERROR.findall(log) if "root cause" not in error]
    return (errors or log.splitlines())[-1][:_REASON_LENGTH]


if __name__ == "__main__":
    run_main(main)
