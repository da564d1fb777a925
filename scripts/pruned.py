"""Pruned checkpoints in a cache folder, shared by the demo, the tests and the benchmarks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.lock import locked

ROOT = Path(__file__).resolve().parents[1]
#: Ignored by git; `make clean` empties it.
CACHE = ROOT / ".demo"
#: Whatever decides what `spense prune` writes.
SOURCES = ("offline_prune/**/*.py", "vllm_spense/format.py", "vllm_spense/layout.py")


@dataclass(frozen=True)
class Pruning:
    """One call of `spense prune` with the built-in calibration text; by default as little as the demo takes."""

    method: str
    sparsity: float
    quantize: str = "fp8"
    samples: int = 16
    length: int = 256
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.sparsity:g}-{self.quantize}-{self.samples}x{self.length}-seed{self.seed}"

    @property
    def options(self) -> list[str]:
        settings = {"calibration": "builtin"} | asdict(self)
        return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def pruned(model: Path, pruning: Pruning, cache: Path = CACHE) -> Path:
    """The pruned checkpoint's folder; it is made unless this code has already made it from these settings.

    Raises:
        subprocess.CalledProcessError: `spense prune` failed; it has said why.
    """
    folder = cache / f"{model.name}-{pruning.name}"
    stamp = folder.with_name(f"{folder.name}.stamp")
    wanted = sources_digest(SOURCES, ROOT)
    with locked(folder):
        if not (folder.exists() and stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            command = [sys.executable, "-m", "offline_prune", str(model), str(folder), *pruning.options, "--overwrite"]
            # The progress bar goes to stderr and stays; the summary is in report.json.
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            stamp.write_text(wanted)
    return folder


def sources_digest(patterns: Iterable[str], root: Path) -> str:
    """A name for the contents of all files that match, in hexadecimal."""
    files = sorted(file for pattern in patterns for file in root.glob(pattern))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
