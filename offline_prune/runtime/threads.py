"""How OpenMP's threads wait. Needs no torch, and must be called before torch loads OpenMP."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Lets threads that wait for work sleep instead of spin, unless the user has set `OMP_WAIT_POLICY`.

    A spinning thread holds the core that the thread it waits for needs, as soon as anything else runs: two processes
    on two cores then take several times as long. OpenMP reads the variable once, when torch loads it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
