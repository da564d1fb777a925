"""Runs a program that a model wrote, with limits on its time, memory, files and network.

The limits keep a wrong program from doing damage. They are no wall against a hostile one: run those in a container.
"""

from __future__ import annotations

import resource
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20

#: What a program in an empty folder has no business with. Names of https://docs.python.org/3/library/audit_events.html.
_FORBIDDEN = (
    "ctypes.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.utime",
    "pty.spawn",
    "shutil.",
    "signal.pthread_kill",
    "socket.",
    "subprocess.Popen",
    "urllib.Request",
)

# What runs before the program. The program's text and a word to say at the end come by standard input.
_GUARD = f"""
import os, sys
word, program = sys.stdin.readline(), sys.stdin.read()
own, readable = os.getcwd(), [os.path.realpath(each) for each in (sys.prefix, sys.base_prefix, *sys.path) if each]

def guard(event, arguments, inside=os.path.commonpath, real=os.path.realpath, fspath=os.fspath):
    if event.startswith({_FORBIDDEN!r}):
        raise PermissionError(f"{{event}} is forbidden")
    if event == "open" and not isinstance(arguments[0], int):
        path, _, flags = arguments
        path = real(os.fsdecode(fspath(path)))
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not any(inside((path, folder)) == folder for folder in ([own] if writes else [own, *readable])):
            raise PermissionError(f"{{path}} is out of bounds")

sys.addaudithook(guard)
exec(compile(program, "program.py", "exec"), {{"__name__": "__main__"}})
print(word, end="")
"""


def failure(program: str, seconds: float = SECONDS) -> str:
    """Why a Python program did not run to its end.

    Args:
        program: sees the standard library and an empty folder.
        seconds: it may take, waiting included.

    Returns:
        "" if it did, else the last line of what it said, or which limit it met. Leaving early, by `sys.exit(0)` or
        otherwise, is a failure too.
    """
    word = secrets.token_hex()
    with tempfile.TemporaryDirectory() as folder, Path(folder, ".said").open("w+b") as said:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-B", "-c", _GUARD],
                cwd=folder,
                env={"PATH": "", "HOME": folder, "OMP_NUM_THREADS": "1"},
                input=f"{word}\n{program}".encode(),
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                preexec_fn=lambda: _limit(seconds),
            )
        except subprocess.TimeoutExpired:
            return f"took more than {seconds:g} s"
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if done.returncode == 0 and lines and lines[-1].endswith(word):
        return ""
    return lines[-1] if done.returncode and lines else f"ended early, with code {done.returncode}"


def _limit(seconds: float) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
