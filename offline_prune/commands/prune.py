"""`spense prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from offline_prune.commands.options import RUN, Device, Length, Out, Overwrite, Resume
from offline_prune.methods.recipe import DEFAULT_METHOD, Grouping, Layout, Quantize, Rounding, Selection, TuneLoss
from offline_prune.terminal import make_console, print_report, print_serving_class, progress_of, silence_bars

_IMAGES = "Calibration with images"
_RESEARCH = "Research: what methods and ablations are made of"


def prune(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face language model, or its hub name.")],
    out: Out,
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
        list[str] | None,
        typer.Option(
            help="Hugging Face data set, .jsonl/.txt/.parquet file or folder, `builtin` or `builtin-code` (docstrings "
            "or code of installed packages), or `generated`: what the dense model writes. Several times: an equal "
            "share of each, of `generated` at most 2¹⁸ tokens. \\[default: builtin, builtin-code and generated; the "
            "first two where the dense model does not fit the device or a CPU would write for long]"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Calibration sequences; more where the model's context is shorter than --length.")
    ] = 128,
    length: Length = 16384,
    calibration_images: Annotated[
        str | None,
        typer.Option(
            help="For a model that sees: folder of images with captions, .jsonl file with image and text, or `random`. "
            "\\[default: text alone]",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    image_share: Annotated[
        float | None,
        typer.Option(help="Of the sequences, those that begin with images. \\[default: 0.5]", rich_help_panel=_IMAGES),
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    skip_unsupported: Annotated[
        bool,
        typer.Option(help="Leave blocks without a gated MLP (experts, plain MLPs) as they are.", rich_help_panel=RUN),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the Python code that MODEL brings along.", rich_help_panel=RUN)
    ] = False,
    device: Device = "auto",
    activations: Annotated[
        str,
        typer.Option(
            help="Where hidden states are kept: auto (the first with room) | device | host | disk", rich_help_panel=RUN
        ),
    ] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that pass through a block at once. \\[default: 2048 on a CPU, 16384]", rich_help_panel=RUN
        ),
    ] = None,
    alignment: Annotated[
        int | None,
        typer.Option(
            help="Region sizes are multiples of this. \\[default: largest of 256 … 32 that fits]", rich_help_panel=RUN
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration text's order.", rich_help_panel=RUN)] = 0,
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
            help="Most steps of tuning each block after it is pruned. \\[default: 512 for spensegpt++, else 0]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
    tune_rate: Annotated[
        float | None,
        typer.Option(help="Of those steps, relative to the weights. \\[default: 0.016]", rich_help_panel=_RESEARCH),
    ] = None,
    tune_loss: Annotated[
        TuneLoss | None,
        typer.Option(
            help="What those steps make small: the relative error, or that with its channels weighed by what they do "
            "to the dense model's predictions. \\[default: fisher for spensegpt++]",
            rich_help_panel=_RESEARCH,
        ),
    ] = None,
) -> None:
    """Prune MODEL in one shot and write a checkpoint that vLLM serves.

    Where vLLM is installed, the last line says which of its classes will serve it.
    """
    console = make_console(stderr=True)
    silence_bars(console)
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
        calibration=tuple(calibration) if calibration else None,
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
        tune_loss=tune_loss,
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
