"""What processes share is made by one of them at a time, whatever became of the one before."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from scripts.lock import locked

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from scripts.lock import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(99)
"""


def test_the_next_waits_until_the_holder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        entered = threading.Event()

        def enter() -> None:
            with locked(folder):
                entered.set()

        waiting = threading.Thread(target=enter)
        waiting.start()
        assert not entered.wait(0.3)
        holder.kill()
        waiting.join(timeout=60)
        assert entered.is_set()
    assert not folder.exists()
