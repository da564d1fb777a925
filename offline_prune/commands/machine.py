"""`spense doctor` and `spense estimate`: what a machine runs, and how fast."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from offline_prune.terminal import make_console, silence_bars
from vllm_spense.errors import SpenseError

#: Of `--batch` and `--context`: nobody has more, and times stay finite.
MOST = 2**31 - 1


def doctor() -> None:
    """Say whether this machine runs pruned layers fast, and what is missing. Exit code 1 if it does not."""
    from vllm_spense.doctor import examine, judge

    findings = judge(examine())
    table = Table(show_header=False)
    marks = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text()}
    for finding in findings:
        found = Text(finding.found)
        if finding.remedy:
            found.append("\nneeds:", style="bold").append(f" {finding.remedy}")
        table.add_row(marks[finding.good], finding.subject, found)
    make_console().print(table)
    if not findings[-1].good:
        raise typer.Exit(1)


def estimate(
    model: Annotated[
        str,
        typer.Argument(help="Folder with a config.json, hub name, or a published shape, such as qwen3-32b."),
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Of the MLPs, 0 to 0.5. \\[default: the checkpoint's, or 0.375]")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100 | h200 | b200")] = "h100",
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Requests that are decoded at once.")] = 32,
    context: Annotated[int, typer.Option(min=0, max=MOST, help="Tokens that each of them has in the KV cache.")] = 4096,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (BF16) | fp8")] = "auto",
) -> None:
    """Say what sparsity would be worth on one GPU, before anything is pruned."""
    silence_bars(make_console(stderr=True))
    from vllm_spense.estimate import estimate as run
    from vllm_spense.estimate import load, read_cache
    from vllm_spense.kernels.tuning.plan_cache import folder
    from vllm_spense.model_sizes import KV_BYTES
    from vllm_spense.roofline import GPUS, cutlass_is_slower

    for option, value, known in (("--gpu", gpu, GPUS), ("--kv-cache-dtype", kv_cache_dtype, KV_BYTES)):
        if value not in known:
            raise SpenseError(f"{option}: found {value}, expected {' | '.join(known)}")
    sizes, pruned = load(model, sparsity)
    found = run(sizes, pruned, GPUS[gpu], batch, context, kv_cache_dtype, read_cache(folder()))
    zeros = pruned.sparsity(sizes)
    kv_cache = "BF16" if kv_cache_dtype == "auto" else "FP8"
    about = f"{model} on one {GPUS[gpu].name}: batch {batch}, context {context}, KV cache in {kv_cache}"
    table = Table(title=about)
    for heading in ("", "dense FP8", f"Spense {zeros:.1%}"):
        table.add_column(heading, justify="right" if heading else "left")
    weights = (found.dense_weight_bytes, found.spense_weight_bytes)
    table.add_row("ms per output token", f"{found.dense_ms:.2f}", f"{found.spense_ms:.2f}")
    table.add_row("speed-up", "1", f"{found.speed_up:.2f}")
    table.add_row("weights, GiB", *(f"{size / 2**30:.1f}" for size in weights))
    table.add_row("KV cache, GiB", *2 * [f"{found.kv_bytes / 2**30:.1f}"])
    fit = (found.requests(GPUS[gpu], batch, size) for size in weights)
    table.add_row("requests that fit", *("any number" if each is None else f"{each:,}" for each in fit))
    output = make_console()
    output.print(table)
    source = "times in this machine's plan cache" if found.calibrated else "what was measured on an H100"
    output.print(f"A roofline, calibrated on {source}.")
    if sizes.mixture is None and cutlass_is_slower(batch, GPUS[gpu]):
        output.print(
            f"The speed-up is a lower bound: with 17 to 63 requests stock's GEMMs take longer on an {GPUS[gpu].name} "
            "than a roofline says."
        )
    if not zeros:
        output.print("No weight is sparse: what differs is what Spense's kernels gain without sparsity.")
