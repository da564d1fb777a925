"""`spense verify`, `spense inspect`, `spense adapt`: what a checkpoint holds, and an adapter that fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from offline_prune.terminal import make_console


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


def inspect(folder: Annotated[Path, typer.Argument(help="A Spense checkpoint.")]) -> None:
    """Show what FOLDER is: method, regions, calibration, size."""
    from offline_prune.checkpoint.model_card import facts
    from offline_prune.checkpoint.verify import open_checkpoint

    checkpoint = open_checkpoint(folder)
    size = sum(checkpoint.tensors.nbytes(name) for name in checkpoint.tensors)
    rows = {**facts(checkpoint.annotation, checkpoint.fp8), "size": f"{size / 2**30:.2f} GiB"}
    table = Table(title=str(folder), show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    make_console().print(table)


def adapt(
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT LoRA adapter, trained on the original model.")],
    pruned: Annotated[Path, typer.Argument(help="A Spense checkpoint of that model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; empty or not there yet.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python in PRUNED that says how the model is built.")
    ] = False,
) -> None:
    """Rewrite a LoRA adapter of the original model so that it fits the pruned one."""
    from offline_prune.checkpoint.adapter import adapt as run

    console = make_console(stderr=True)
    result = run(adapter, pruned, out, lambda line: console.print(line, soft_wrap=True), trust_remote_code)
    console.print(f"{out}: fits {pruned}; {result.moved} of {result.tensors} tensors were reordered", soft_wrap=True)
