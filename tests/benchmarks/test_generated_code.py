"""Programs that models write run with limits."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from benchmarks.generated_code import failure


@pytest.mark.parametrize(
    "program",
    [
        "import collections, heapq, math, re, typing\nassert math.gcd(12, 18) == 6",
        "print('no line end', end='')",
        "open('note', 'w').write('x'); assert open('note').read() == 'x'",
    ],
)
def test_a_right_program_runs_to_its_end(program: str) -> None:
    assert failure(program) == ""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "ended early, with code 0"),
        ("import os; os._exit(0)", "ended early, with code 0"),
        ("bytearray(1 << 31)", "MemoryError"),
        ("open('large', 'wb').write(bytes(1 << 22))", "OSError: [Errno 27] File too large"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: subprocess.Popen is forbidden"),
        ("import os; os.system('true')", "PermissionError: os.system is forbidden"),
        ("import ctypes", "PermissionError: ctypes."),
    ],
)
def test_a_wrong_one_is_told(program: str, reason: str) -> None:
    assert failure(program).startswith(reason)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(99)"])
def test_a_slow_one_is_stopped(program: str) -> None:
    assert failure(program, seconds=1) == "took more than 1 s"


def test_files_of_others_are_out_of_bounds(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert failure(f"print(open({str(secret)!r}).read())") == f"PermissionError: {secret} is out of bounds"
    assert failure(f"open({str(secret)!r}, 'a')") == f"PermissionError: {secret} is out of bounds"
    assert failure(f"import os; os.remove({str(secret)!r})") == "PermissionError: os.remove is forbidden"
    assert secret.read_text() == "secret"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = failure(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        assert found.startswith("PermissionError: socket.")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
