"""What commands show: progress, the report of a run and who will serve its result, what pruning cost."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from offline_prune.evaluation.evaluate import Evaluation
    from offline_prune.report import Report


def make_console(stderr: bool = False) -> Console:
    """Prints text as it is: names of folders, models and methods may look like markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def silence_bars(console: Console) -> None:
    """Keeps the bars of libraries, which read this when they are imported, out of a log."""
    if not console.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def progress_of(
    console: Console, shown: bool, verb: str = "pruned", unit: str = "blocks"
) -> Iterator[Callable[[int, int, str], None]]:
    """What to tell about finished work: a bar on a terminal, elsewhere a line for every tenth of it.

    Args:
        verb: before the name of a piece.
        unit: what the pieces are.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    start = time.monotonic()
    first: tuple[float, int] | None = None

    def line(done: int, total: int, name: str) -> None:
        nonlocal first
        now = time.monotonic()
        # The pace is that since the first piece: reading and writing text, or what an earlier run did, is not in it.
        first = first or (now, done)
        if shown and done * 10 // total > (done - 1) * 10 // total:
            said = f"{verb} {name}, {done} of {total} {unit}, after {timedelta(seconds=round(now - start))}"
            if first[1] < done < total:
                left = (now - first[0]) * (total - done) / (done - first[1])
                said += f", about {timedelta(seconds=round(left))} left"
            console.print(said, soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("preparing", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{verb} {name}")


def print_report(report: Report, out: Path, console: Console) -> None:
    table = Table(title=f"{out}: MLP sparsity {report.mlp_sparsity:.2%} in {report.seconds:.0f} s")
    for heading in ("projection", "zeros", "relative error, median", "largest"):
        table.add_column(heading, justify="left" if heading == "projection" else "right")
    for part in report.projections():
        table.add_row(part.name, f"{part.zeros:.2%}", f"{part.median_loss:.4f}", f"{part.largest_loss:.4f}")
    make_console().print(table)
    for name, found in report.skipped.items():
        console.print(f"left as it was: {name}: {found}")


def print_serving_class(out: Path, console: Console) -> None:
    """Says nothing where vLLM is not installed."""
    from vllm_spense.plugin.serving_check import find_class

    found = find_class(out)
    if found is None:
        return
    if found.vllm_class is None:
        said = f"vLLM has no class of its own for {found.architecture}; it may serve it by way of transformers"
    else:
        said = f"vLLM will serve it with {found.vllm_class}"
    console.print(f"{said}; `spense verify {shlex.quote(str(out))} --serving` proves it", soft_wrap=True)


def print_evaluation(evaluation: Evaluation) -> None:
    table = Table(title=f"{evaluation.pruned} against {evaluation.model}")
    for heading in ("text", "tokens", "perplexity, MODEL", "PRUNED", "KL, nats", "same top token"):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for loss in evaluation.domains:
        perplexities = (f"{value:.3f}" for value in (loss.perplexity_model, loss.perplexity_pruned))
        size = f"{loss.sequences} × {loss.length}"
        table.add_row(loss.domain, size, *perplexities, f"{loss.kl:.4f}", f"{loss.top1_agreement:.2%}")
    make_console().print(table)
