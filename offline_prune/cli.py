"""The `spense` command. Every command imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from offline_prune.methods.recipe import DEFAULT_METHOD, Grouping, Layout, Quantize, Rounding, Selection
from offline_prune.runtime.threads import sleep_while_waiting
from offline_prune.terminal import make_console, print_report, print_serving_class, progress_of
from vllm_spense.errors import SpenseError

#: Exit code after Ctrl-C or SIGTERM, as typer has it.
INTERRUPTED = 130
#: Packages that only pruning needs; setup.py's extra of that name has them.
PRUNE_EXTRA = {"transformers", "accelerate", "compressed_tensors", "datasets", "psutil", "matplotlib", "jinja2", "PIL"}
app = typer.Typer(
    name="spense",
    help="Prune LLMs to 2:4 sparse + dense regions in FP8, and look at the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


console = make_console(stderr=True)


@app.callback()
def _spense() -> None:
    """Keeps `prune` a subcommand, however many there are."""


#: Panels of `spense prune --help`.
_RUN, _RESEARCH = "How to run", "Research: what methods and ablations are made of"


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face language model, or its hub name.")],
    out: Annotated[
        Path, typer.Argument(help="Folder to write; empty or not there yet, unless --overwrite or --resume.")
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of zeros in the MLP weights, 0 to 0.5. \\[default: 0.375; 0.5 for sparsegpt, wanda, magnitude]"
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="spensegpt++ | spensegpt+ | spensegpt | sparsegpt | wanda | magnitude")
    ] = DEFAULT_METHOD,
    calibration: Annotated[
        str,
        typer.Option(help="Hugging Face data set, .jsonl/.txt/.parquet file or folder, or `builtin` (no download)."),
    ] = "simplescaling/s1K-1.1",
    samples: Annotated[
        int, typer.Option(help="Calibration sequences; more where the model's context is shorter than --length.")
    ] = 128,
    length: Annotated[int, typer.Option(help="Tokens in each, at most the model's context.")] = 16384,
    calibration_images: Annotated[
        str | None,
        typer.Option(
            help="For a model that sees: folder of images with captions, .jsonl file with image and text, or `random`. "
            "\\[default: text alone]"
        ),
    ] = None,
    image_share: Annotated[float, typer.Option(help="Of the sequences, those that begin with images.")] = 0.5,
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace the Spense checkpoint, or the unfinished one, in OUT.", rich_help_panel=_RUN),
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with an unfinished run to OUT, if there is one.", rich_help_panel=_RUN)
    ] = False,
    skip_unsupported: Annotated[
        bool,
        typer.Option(help="Leave blocks without a gated MLP (experts, plain MLPs) as they are.", rich_help_panel=_RUN),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the Python code that MODEL brings along.", rich_help_panel=_RUN)
    ] = False,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N", rich_help_panel=_RUN)] = "auto",
    activations: Annotated[
        str,
        typer.Option(
            help="Where hidden states are kept: auto (the first with room) | device | host | disk", rich_help_panel=_RUN
        ),
    ] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that pass through a block at once. \\[default: 2048 on a CPU, 16384]", rich_help_panel=_RUN
        ),
    ] = None,
    alignment: Annotated[
        int | None,
        typer.Option(
            help="Region sizes are multiples of this. \\[default: largest of 256 … 32 that fits]", rich_help_panel=_RUN
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration text's order.", rich_help_panel=_RUN)] = 0,
    selection: Annotated[
        Selection | None,
        typer.Option(help="Which indices stay dense. \\[default: the method's]", rich_help_panel=_RESEARCH),
    ] = None,
    dense_first: Annotated[
        bool | None,
        typer.Option(
            help="Keep the first MLP dense; the others take over its sparsity. \\[default: the method's, in models of "
            "more than ten blocks]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
    grouping: Annotated[
        Grouping | None,
        typer.Option(
            help="Which sparse indices share a group of four in down: neighbours, or two strong and two weak. "
            "\\[default: the method's]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Where dense columns stand while down is pruned.", rich_help_panel=_RESEARCH)
    ] = Layout.BACK,
    quantize: Annotated[
        Quantize, typer.Option(help="none: the model's own type, with the same zeros.", rich_help_panel=_RESEARCH)
    ] = Quantize.FP8,
    fp8_rounding: Annotated[
        Rounding | None,
        typer.Option(
            help="Round after pruning, inside the column loop that prunes, or in column loops everywhere. "
            "\\[default: everywhere for spensegpt++, else inside]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
    damping: Annotated[
        float, typer.Option(help="λ over the mean of the Hessian's diagonal.", rich_help_panel=_RESEARCH)
    ] = 0.01,
    descent_passes: Annotated[
        int | None,
        typer.Option(
            help="Passes of coordinate descent that choose masks anew. \\[default: 1 for spensegpt++, else 0]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
    true_sequential: Annotated[
        bool,
        typer.Option(help="Calibrate down on the outputs of the pruned gate and up.", rich_help_panel=_RESEARCH),
    ] = True,
    tune_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of tuning each block after it is pruned. \\[default: 128 for spensegpt++, else 0]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
    tune_rate: Annotated[
        float, typer.Option(help="Of those steps, relative to the weights.", rich_help_panel=_RESEARCH)
    ] = 0.016,
) -> None:
    """Prune MODEL in one shot and write a checkpoint that vLLM serves.

    Where vLLM is installed, the last line says which of its classes will serve it.
    """
    # Bars of libraries, which read this when they are imported, would flood a log.
    if not console.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    from offline_prune.pipeline import prune as run
    from offline_prune.runtime import distributed
    from offline_prune.settings import PruneSettings

    settings = PruneSettings(
        model=model,
        out=out,
        method=method,
        sparsity=sparsity,
        dense_first=dense_first,
        selection=selection,
        grouping=grouping,
        layout=layout,
        alignment=alignment,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        calibration_images=calibration_images,
        image_share=image_share,
        quantize=quantize,
        rounding=fp8_rounding,
        damping=damping,
        descent_passes=descent_passes,
        true_sequential=true_sequential,
        tune_steps=tune_steps,
        tune_rate=tune_rate,
        skip_unsupported=skip_unsupported,
        trust_remote_code=trust_remote_code,
        device=device,
        batch_tokens=batch_tokens,
        activations=activations,
        overwrite=overwrite,
        resume=resume,
    )
    with progress_of(console, shown=distributed.is_first()) as progress:
        report = run(settings, progress, lambda line: console.print(line, soft_wrap=True))
    if distributed.is_first():
        print_report(report, out, console)
        if quantize is Quantize.FP8:
            print_serving_class(out, console)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A Spense checkpoint.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python in FOLDER that says how the model is built.")
    ] = False,
    serving: Annotated[
        bool,
        typer.Option(
            "--serving",
            help="Also have vLLM, which must be installed, build the model without weights, and prove that Spense "
            "runs every pruned layer of it.",
        ),
    ] = False,
) -> None:
    """Prove that FOLDER holds what its annotation says: 2:4, regions, every tensor, shapes, scales."""
    from offline_prune.checkpoint.verify import verify as run

    result = run(folder, trust_remote_code)
    make_console().print(
        f"{folder}: good. {result.tensors} tensors; {result.mlps} MLPs: sparse regions 2:4 "
        f"({result.sparse_zeros:.1%} zeros), dense regions {result.dense_zeros:.2%} zeros",
        soft_wrap=True,
    )
    if also := result.also_2of4:
        make_console().print(
            f"{len(also)} dense regions are 2:4 as well, {also[0]} the first: the original model was pruned before, or "
            "the annotation counts too few sparse indices",
            soft_wrap=True,
        )
    if serving:
        from vllm_spense.plugin.serving_check import prove_serving

        proved = prove_serving(folder, trust_remote_code)
        make_console().print(
            f"vLLM serves it with {proved.vllm_class}: Spense runs all {proved.layers} pruned layers", soft_wrap=True
        )


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A Spense checkpoint.")]) -> None:
    """Show what FOLDER is: method, regions, calibration, size."""
    from offline_prune.checkpoint.verify import open_checkpoint
    from offline_prune.methods.regions import mean_sparsity

    checkpoint = open_checkpoint(folder)
    annotation = checkpoint.annotation
    calibration = annotation.calibration
    default = annotation.default
    sparsity = mean_sparsity(map(annotation.regions, annotation.modules))
    rows = {
        "weights": "FP8 E4M3, one scale per output channel" if checkpoint.fp8 else "unquantized (research only)",
        "method": annotation.method,
        "settings": ", ".join(f"{key}={value}" for key, value in annotation.settings.items()),
        "calibration": "none"
        if calibration is None
        else f"{calibration.source}, {calibration.samples} × {calibration.length} tokens, seed {calibration.seed}",
        "MLPs": f"{len(annotation.modules)}, {annotation.modules[0]} … {annotation.modules[-1]}",
        "regions": f"sparse {default.sparse} + dense {default.dense} = {default.intermediate}",
        "MLP sparsity": f"{sparsity:.2%} (dense ratio {1 - 2 * sparsity:.3g})",
        "alignment": str(annotation.alignment),
        "size": f"{sum(checkpoint.tensors.nbytes(name) for name in checkpoint.tensors) / 2**30:.2f} GiB",
    }
    if annotation.overrides:
        rows["other regions"] = "; ".join(
            f"{name}: {regions.sparse} + {regions.dense}" for name, regions in annotation.overrides.items()
        )
    table = Table(title=str(folder), show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    make_console().print(table)


@app.command()
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


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or a published shape, such as qwen3-32b.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Of the MLPs, 0 to 0.5. \\[default: the checkpoint's, or 0.375]")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100 | h200 | b200")] = "h100",
    batch: Annotated[int, typer.Option(min=1, help="Requests that are decoded at once.")] = 32,
    context: Annotated[int, typer.Option(min=0, help="Tokens that each of them has in the KV cache.")] = 4096,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto (BF16) | fp8")] = "auto",
) -> None:
    """Say what sparsity would be worth on one GPU, before anything is pruned."""
    from vllm_spense.estimate import GPUS, KV_BYTES, load, read_cache
    from vllm_spense.estimate import estimate as run

    for option, value, known in (("--gpu", gpu, GPUS), ("--kv-cache-dtype", kv_cache_dtype, KV_BYTES)):
        if value not in known:
            raise SpenseError(f"{option}: found {value}, expected {' | '.join(known)}")
    sizes, layers = load(model, sparsity)
    # Loads torch, for which a mistake above need not wait.
    from vllm_spense.kernels.tuning.plan_cache import folder

    found = run(sizes, layers, GPUS[gpu], batch, context, kv_cache_dtype, read_cache(folder()))
    zeros = sum(regions.mlp_sparsity for regions in layers) / sizes.num_hidden_layers
    about = f"{model} on one {GPUS[gpu].name}: batch {batch}, context {context}, KV cache {kv_cache_dtype}"
    table = Table(title=about)
    for heading in ("", "dense FP8", f"Spense {zeros:.1%}"):
        table.add_column(heading, justify="right" if heading else "left")
    weights = (found.dense_weight_bytes, found.spense_weight_bytes)
    table.add_row("ms per output token", f"{found.dense_ms:.2f}", f"{found.spense_ms:.2f}")
    table.add_row("speed-up", "1", f"{found.speed_up:.2f}")
    table.add_row("weights, GiB", *(f"{size / 2**30:.1f}" for size in weights))
    table.add_row("KV cache, GiB", *2 * [f"{found.kv_bytes / 2**30:.1f}"])
    table.add_row("fits the GPU", *(("no", "yes")[size + found.kv_bytes < GPUS[gpu].memory_bytes] for size in weights))
    output = make_console()
    output.print(table)
    source = "times in this machine's plan cache" if found.calibrated else "what was measured on an H100"
    output.print(f"A roofline, calibrated on {source}.")


_received: list[int] = []


def _interrupted(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point: problems a user can act on end in one message and exit code 1, never in a traceback."""
    sleep_while_waiting()
    # A terminated run cleans up like an interrupted one.
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupted)
    try:
        app(arguments)
    except SpenseError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in PRUNE_EXTRA:
            raise
        _fail(f"{error.name} is not installed; pip install 'vllm-spense[prune]' brings what this command needs")
    except Exception:
        # What a signal raises in the midst of C code may come out as an error of that code's own.
        if not _received:
            raise
        sys.exit(INTERRUPTED)


def _fail(message: str) -> NoReturn:
    console.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    sys.exit(1)
