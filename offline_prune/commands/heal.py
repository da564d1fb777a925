"""`spense heal`: its options, and what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offline_prune.commands.options import RUN, Device, Length, Out, Overwrite, Resume
from offline_prune.terminal import make_console, progress_of, silence_bars


def heal(
    pruned: Annotated[Path, typer.Argument(help="A Spense checkpoint.")],
    out: Out,
    teacher: Annotated[str, typer.Option(help="The dense model that PRUNED was made from: a folder or a hub name.")],
    train: Annotated[
        str, typer.Option(help="mlp: the pruned MLPs' weights | all: every linear layer of the blocks, and norms.")
    ] = "mlp",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on: as for `spense prune`; `generated` is what the teacher writes, all of its share. "
            "\\[default: as for `spense prune`]"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Sequences; more where the model's context is shorter than --length.")
    ] = 2400,
    length: Length = 2048,
    epochs: Annotated[int, typer.Option(help="How often the text is gone through.")] = 2,
    heldout: Annotated[
        float, typer.Option(help="Share of the sequences that is not trained on and judges the weights.")
    ] = 0.02,
    rate: Annotated[
        float, typer.Option(help="AdamW's largest learning rate, relative to each weight's root mean square.")
    ] = 0.001,
    warm_up: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    step_tokens: Annotated[int, typer.Option(help="Tokens of a step, of all processes together.")] = 8192,
    overwrite: Overwrite = False,
    resume: Resume = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the Python code that the models bring along.", rich_help_panel=RUN)
    ] = False,
    device: Device = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens that pass through the model at once. \\[default: a step's, at most 2048 on a CPU, 32768]",
            rich_help_panel=RUN,
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="adamw | adamw8bit (moments in 8 bits; needs torchao)", rich_help_panel=RUN)
    ] = "adamw",
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            help="Compute activations again for the gradients: less memory, more time. \\[default: if memory lacks]",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_minutes: Annotated[
        float, typer.Option(help="Minutes between states that --resume can go on from.", rich_help_panel=RUN)
    ] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the text's order.", rich_help_panel=RUN)] = 0,
) -> None:
    """Train what pruning kept towards the dense model's predictions: distillation with fixed zeros."""
    console = make_console(stderr=True)
    silence_bars(console)
    from offline_prune.healing.pipeline import heal as run
    from offline_prune.healing.settings import HealSettings, Optimizer, Train
    from offline_prune.runtime import distributed
    from offline_prune.settings import choice

    settings = HealSettings(
        pruned=pruned,
        out=out,
        teacher=teacher,
        train=choice("train", Train, train),
        calibration=tuple(calibration) if calibration else None,
        samples=samples,
        length=length,
        seed=seed,
        heldout=heldout,
        epochs=epochs,
        rate=rate,
        warm_up=warm_up,
        step_tokens=step_tokens,
        batch_tokens=batch_tokens,
        optimizer=choice("optimizer", Optimizer, optimizer),
        checkpointing=checkpointing,
        save_minutes=save_minutes,
        trust_remote_code=trust_remote_code,
        device=device,
        overwrite=overwrite,
        resume=resume,
    )
    with progress_of(console, distributed.is_first(), "at", "steps") as progress:
        report = run(settings, progress, lambda line: console.print(line, soft_wrap=True))
    if distributed.is_first():
        make_console().print(
            f"{out}: KL(teacher ‖ student) on {report.heldout_tokens} held-out tokens: {report.before:.4f} before, "
            f"{report.after:.4f} after step {report.history.best_step} of {report.steps} "
            f"({report.tokens} tokens in all), in {report.seconds:.0f} s",
            soft_wrap=True,
        )
