"""`spense evaluate`: what pruning cost, on any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from offline_prune.commands.options import Length
from offline_prune.terminal import make_console, print_evaluation, progress_of, silence_bars
from vllm_spense.errors import SpenseError


def evaluate(
    pruned: Annotated[str, typer.Argument(help="A Spense checkpoint; a plain or FP8 one will do too.")],
    against: Annotated[str, typer.Option(help="The model that it was made from: folder, or hub name.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="File or folder (.txt, .jsonl, .parquet) that calibration has not seen; give it several times for "
            "several. \\[default: docstrings, Python's reference and code of this installation]"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of each text, or as many as it has.")] = 32,
    length: Length = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
    no_card: Annotated[
        bool, typer.Option("--no-card", help="Leave PRUNED's README.md, which takes the table, alone.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that the models bring along.")
    ] = False,
) -> None:
    """Say what pruning cost: perplexity, KL divergence and agreement with the dense model, by text.

    One decoder block at a time is in memory, so a model of any size fits.
    """
    console = make_console(stderr=True)
    silence_bars(console)
    from offline_prune.checkpoint.model_card import FILE, write_measured
    from offline_prune.evaluation.evaluate import card_section
    from offline_prune.evaluation.evaluate import evaluate as run

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise SpenseError(f"--json: {json_file.parent}: no such folder")
    with progress_of(console, shown=True, verb="passed") as progress:
        result = run(pruned, against, text or (), samples, length, device, trust_remote_code, progress, say)
    print_evaluation(result)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise SpenseError(f"{json_file}: cannot be written: {error.strerror}") from None
    if not no_card and result.method is not None and Path(pruned).is_dir():
        try:
            say(f"written into {write_measured(Path(pruned), card_section(result))}")
        except (OSError, UnicodeDecodeError) as error:
            say(f"{Path(pruned) / FILE}: not written: {getattr(error, 'strerror', None) or error}")
