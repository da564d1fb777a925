"""Programs in processes that begin with vLLM and the pruner loaded, which take a new Python ten seconds on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

#: What takes long to load. A module that some release of vLLM lacks is passed over.
LOADED = (
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.llm",
    "vllm_spense.plugin.config",
    "offline_prune.pipeline",
)
#: Names the file that a program and all processes which it starts print to.
_OUTPUT = "SPENSE_TEST_OUTPUT"
_STARTING = threading.Lock()


class Process(ForkServerProcess):
    """Has the environment and output of the process that starts it, not those of the one that it is forked from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment)
        with open(os.environ[_OUTPUT], "ab", buffering=0) as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        super().run()


def run_program(program: Path, *arguments: object, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to its end; forked, unless there is a GPU: no process can use one that began in another.

    Args:
        environment: all variables. What a library reads when it is loaded is as the first call had it.

    Returns:
        With what it printed to either stream as its `stdout`.
    """
    given = list(map(str, arguments))
    if shutil.which("nvidia-smi"):
        command = [sys.executable, str(program), *given]
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    with tempfile.NamedTemporaryFile() as output:
        # Threads share the environment.
        with _STARTING, mock.patch.dict(os.environ, {**environment, _OUTPUT: output.name}, clear=True):
            process = _context().Process(target=_main, args=(str(program), given))
            process.start()
        process.join()
        said = Path(output.name).read_text(errors="replace")
    assert process.exitcode is not None
    return subprocess.CompletedProcess([str(program), *given], process.exitcode, said)


def fork_instead_of_spawn() -> None:
    """What this process would spawn is forked from one that has loaded vLLM, unless there is a GPU."""
    if shutil.which("nvidia-smi"):
        return
    contexts: Callable[..., Any] = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: _context() if method == "spawn" else contexts(method)


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LOADED])
    context.Process = Process
    return context


def _main(program: str, arguments: list[str]) -> None:
    # Further processes come from the server that this one came from: it is there as long as the tests are.
    forkserver._forkserver.ensure_running = lambda: None
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def run_ranks(program: Path, *arguments: object, count: int = 2) -> str:
    """Runs a Python program as torchrun does, in a process for each rank; all must end well.

    Returns:
        What they printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "tests"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_program(program, *arguments, environment=os.environ | shared | own)

    with ThreadPoolExecutor(count) as pool:
        ended = list(pool.map(run, range(count)))
    said = "".join(each.stdout for each in ended)
    assert not any(each.returncode for each in ended), said
    return said
