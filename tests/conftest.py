"""What all tests share: the same random numbers in any order, how they share cores, real and tiny models, a text."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path

import pytest

# `python -m pytest` finds scripts/ and benchmarks/ by itself, plain `pytest` does not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before torch is imported, it says how threads wait.
from scripts.demo import SERVED
from scripts.pruned import CACHE, pruned
from scripts.smollm2 import smollm2

# Images of containers set it. What the tests start would compile all it imports anew, each time for seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # They share the cores with each other; what they start inherits this.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))


LAST_FILE = pytest.StashKey[Path]()
ENVIRONMENT = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`: two, because engines take memory, but one where all would share a GPU."""
    return 1 if shutil.which("nvidia-smi") else 2


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """What starts engines or prunes the real model comes first: it takes longest, and no worker shall end with it."""
    items.sort(key=lambda item: not (item.get_closest_marker("engine") or "smollm2_folder" in item.fixturenames))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """A file's tests leave no environment to the next file's: an engine in this process, for one, sets LD_PRELOAD."""
    if item.config.stash.get(LAST_FILE, None) != item.path:
        item.config.stash[LAST_FILE], item.config.stash[ENVIRONMENT] = item.path, dict(os.environ)
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            before = item.config.stash[ENVIRONMENT]
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test sees the same random numbers whichever tests ran before it in its process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 products in full, also where this CPU has BF16 units that `fast_matmul` would let them run on."""
    from offline_prune.runtime import matmul_precision

    monkeypatch.setattr(matmul_precision, "_matmul_precision", lambda *_: nullcontext())


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, BF16; made once and kept for later runs and the demo."""
    return smollm2(CACHE / "smollm2-135m")


@pytest.fixture(scope="session")
def pruned_folder(smollm2_folder: Path) -> Path:
    """The same model as the demo serves it; made anew when the pruner has changed."""
    return pruned(smollm2_folder, SERVED)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} sheep jump over {i * i % 97} fences." for i in range(400)))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import tiny_model

    return tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
