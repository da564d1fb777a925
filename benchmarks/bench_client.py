"""Runs `vllm bench serve` as often as it is asked to, in one process: importing vLLM takes longer than many a run.

    python -m benchmarks.bench_client

reads one JSON list of the command's arguments from each line of input, and answers each with a line `FINISHED`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.envelope import ROOT
from vllm_spense.errors import SpenseError

FINISHED = "bench_client: finished"
#: Of the log, when the process ends by itself.
_LAST_LINES = 20
#: Requests before each run, which do not count.
_WARMUPS = 16


def main() -> None:
    from vllm.benchmarks.serve import main as bench

    parser = command_parser()
    for line in sys.stdin:
        bench(parser.parse_args(json.loads(line)))
        print(FINISHED, flush=True)


def command_parser() -> Any:
    """That of `vllm bench serve`."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser


def arguments(
    url: str, model: str, tokenizer: Path, lengths: tuple[int, int], concurrency: int, prompts: int, result: Path
) -> list[str]:
    """Of `vllm bench serve`: random prompts, greedy decoding to the last token, the same in every run.

    Args:
        url: of the server, without `/v1`.
        model: as the server calls it.
        tokenizer: the folder with it.
        lengths: tokens of each prompt and of each completion.
        concurrency: requests at once.
        prompts: requests in all.
        result: file to write.
    """
    options = {
        "backend": "openai",
        "base-url": url,
        "model": model,
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": lengths[0],
        "random-output-len": lengths[1],
        "num-prompts": prompts,
        "max-concurrency": concurrency,
        "num-warmups": min(concurrency, _WARMUPS),
        "seed": 0,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot",
        "metric-percentiles": 99,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
    return [*(text for name, value in options.items() for text in (f"--{name}", str(value))), *flags]


class ClientEnded(SpenseError):
    """The process that runs `vllm bench serve` is gone: no server can be measured any more."""


class Client:
    """That process, as a context: ended on exit.

    Args:
        log: what it prints goes to this file.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> Client:
        command = [sys.executable, "-m", "benchmarks.bench_client"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def run(self, command: Sequence[str]) -> None:
        """Runs `vllm bench serve` with these arguments.

        Raises:
            ClientEnded: the process ended; shows the end of its log.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.log.open("a", encoding="utf-8") as log:
            try:
                self.process.stdin.write(json.dumps(command) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass  # what it said last is still to be read
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                if line.strip() == FINISHED:
                    return
        end = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-_LAST_LINES:])
        raise ClientEnded(
            f"{end}\nvllm bench serve ended with code {self.process.wait()}, all it said is in {self.log}"
        )


if __name__ == "__main__":
    main()
