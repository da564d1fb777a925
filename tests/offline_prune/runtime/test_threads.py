"""Threads that wait for work sleep: what OpenMP itself says of its settings once torch has loaded it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Each loads torch, and little beside it.
PROGRAMS = {
    "spense": "from offline_prune.cli import main; main(['doctor'])",
    "scripts": "import scripts.server, torch",
    "benchmarks": "import benchmarks.texts",
}


# All call the same function, which leaves a user's choice alone.
@pytest.mark.parametrize(("name", "given"), [*((name, None) for name in PROGRAMS), ("spense", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(name: str, given: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    said = dict(re.findall(r"(OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'", done.stderr))
    assert said["OMP_WAIT_POLICY"] == (given or "PASSIVE"), done.stderr
    # The policy is called passive where none is set, too, and threads spin a little.
    assert (said["GOMP_SPINCOUNT"] == "0") == (given is None), done.stderr
