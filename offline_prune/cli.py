"""The `spense` command. Every command imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import typer
from rich.text import Text

from offline_prune.commands.checkpoint import adapt, inspect, verify
from offline_prune.commands.evaluate import evaluate
from offline_prune.commands.heal import heal
from offline_prune.commands.machine import doctor, estimate
from offline_prune.commands.prune import prune
from offline_prune.runtime.threads import sleep_while_waiting
from offline_prune.terminal import make_console
from vllm_spense.errors import SpenseError

#: Exit code after Ctrl-C or SIGTERM, as typer has it.
INTERRUPTED = 130
#: Packages that only pruning needs; setup.py's extra of that name has them.
PRUNE_EXTRA = {"transformers", "accelerate", "compressed_tensors", "datasets", "psutil", "matplotlib", "jinja2", "PIL"}
#: Comes with transformers.
_HUB = "huggingface_hub"
app = typer.Typer(
    name="spense",
    help="Prune LLMs to 2:4 sparse + dense regions in FP8, and look at the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
COMMANDS = (prune, heal, verify, inspect, evaluate, adapt, doctor, estimate)
for _command in COMMANDS:
    app.command()(_command)

console = make_console(stderr=True)

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
        if error.name not in {*PRUNE_EXTRA, _HUB}:
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
