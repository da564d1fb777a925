"""The demo's server: no process outlives it, and every way to fail is said."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import server
from scripts.server import HOST, check_port, serving

ROOT = Path(__file__).resolve().parents[2]
#: Answers /health, and keeps a child that ignores SIGTERM: the worst engine process there could be.
FAKE_SERVER = """
import http.server, subprocess, sys

child = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 99"])
print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def command(port: int) -> list[str]:
    return [sys.executable, "-c", FAKE_SERVER, str(port)]


@pytest.fixture(autouse=True)
def _short_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STOP_SECONDS", 1)


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    """Whether the process is gone soon: a kill takes effect when the system gets round to it."""
    deadline = time.monotonic() + 5
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not runs(pid)


def test_server_and_children_end_with_the_context(command: list[str], port: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(command, port, log):
        child = child_of(log)
        assert runs(child)
    assert ends(child)
    check_port(port)


def test_server_and_children_end_after_an_error(command: list[str], port: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), serving(command, port, log):
        raise KeyboardInterrupt
    assert ends(child_of(log))


#: Serves like the demo does, says so, and then waits.
OWNER = """
import signal, sys, time
from pathlib import Path
from scripts import server

# A shell lets its background jobs ignore it, and what those start.
signal.signal(signal.SIGINT, signal.default_int_handler)
server.STOP_SECONDS = 1
server.exit_on_signals()
with server.serving(sys.argv[3:], int(sys.argv[1]), Path(sys.argv[2])):
    print("ready", flush=True)
    time.sleep(99)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_server_and_children_end_with_their_owner(
    number: signal.Signals, command: list[str], port: int, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    owner_command = [sys.executable, "-c", OWNER, str(port), str(log), *command]
    with subprocess.Popen(owner_command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        owner.send_signal(number)
        assert owner.wait(timeout=20) != 0
    assert ends(child_of(log))


def test_a_server_that_ends_shows_its_last_lines(port: int, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop, serving(["sh", "-c", "seq 100; exit 3"], port, tmp_path / "log"):
        pytest.fail("a server that ended was called ready")
    lines = str(stop.value).splitlines()
    assert lines[:-1] == [str(n) for n in range(101 - server.LAST_LINES, 101)]
    assert lines[-1] == f"The server ended with code 3; its last lines are above, all of them in {tmp_path / 'log'}"


def test_an_engine_process_gives_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reason = "vllm_spense.errors.FormatError: unknown key (file: config.json; key: spense.spase)"
    traceback = [
        "(EngineCore pid=7) ERROR 11-22 15:54:17 [core.py:1510]   File core.py, in raise ValueError: no",
        f"(EngineCore pid=7) ERROR 11-22 15:54:17 [core.py:1510] {reason}",
        reason,
    ]
    log.write_text("\n".join([*traceback, *map(str, range(100))]))
    assert server.last_lines(log).splitlines() == [reason, *(str(n) for n in range(100 - server.LAST_LINES, 100))]


def test_a_server_that_never_answers_is_given_up(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "START_SECONDS", 0.1)
    with (
        pytest.raises(SystemExit, match="The server did not become ready"),
        serving(["sleep", "99"], port, tmp_path / "x"),
    ):
        pytest.fail("a silent server was called ready")


def test_a_port_in_use_is_one_line_before_any_work() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "scripts.demo", "--port", str(port)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Port {port} cannot be used")
    assert result.stderr.endswith("choose another, make demo PORT=8001\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_exist(port: int) -> None:
    with pytest.raises(SystemExit, match=f"^Port {port} cannot be used"):
        check_port(port)
