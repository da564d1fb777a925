"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Panel of `--help` for what does not decide the result.
RUN = "How to run"

Out = Annotated[Path, typer.Argument(help="Folder to write; empty or not there yet, unless --overwrite or --resume.")]
Length = Annotated[int, typer.Option(help="Tokens in each, at most the model's context.")]
Overwrite = Annotated[
    bool, typer.Option(help="Replace the Spense checkpoint, or the unfinished one, in OUT.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool, typer.Option(help="Go on with an unfinished run to OUT, if there is one.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N", rich_help_panel=RUN)]
