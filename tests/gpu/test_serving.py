"""vLLM with pruned SmolLM2 on a real GPU: the tokens of dense execution, and two minutes of 64 clients.

    pytest -m gpu --noconftest tests/gpu/test_serving.py

`SPENSE_TEST_CHECKPOINT` names a pruned checkpoint, or `SPENSE_TEST_MODEL` a model to prune; without either it is
SmolLM2 from its package. `SPENSE_TEST_SECONDS` shortens the two minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("nvmath", reason="needs nvmath-python")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import gpu_checkpoint
from engines import Completion, Run, generate, on_one_gpu, require_those_of
from openai import OpenAI

from benchmarks.clients import host_bytes, soak
from scripts.server import HOST, serving
from vllm_spense.ops.dispatch import SWITCH
from vllm_spense.ops.dispatch import Path as ExecutionPath

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

STOCK = "compressed-tensors"
CLIENTS = 64
SECONDS = float(os.environ.get("SPENSE_TEST_SECONDS", "120"))
#: In half the time every layer multiplies some ten thousand times: a few hundred bytes left by each would be more.
MAX_GROWTH_BYTES = 64 << 20
QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return gpu_checkpoint.checkpoint()


@dataclass(frozen=True)
class Engine:
    """An engine in CUDA graphs unless it is eager; `path` forces one, "" leaves the choice to the policy."""

    dtype: str
    quantization: str = "spense"
    path: str = ""
    eager: bool = False
    stages: int = 1
    ranks: int = 1

    def complete(self, checkpoint: Path) -> list[Completion]:
        run = Run(
            checkpoint,
            self.quantization,
            not self.eager,
            self.ranks,
            stages=self.stages,
            dtype=self.dtype,
            among_others=True,
        )
        return generate([run], {SWITCH: self.path})[run]


PATHS = [path.value for path in ExecutionPath if path is not ExecutionPath.REFERENCE]
OURS = [*(Engine("bfloat16", path=path) for path in ("", *PATHS)), Engine("float16")]
THEIRS = [Engine(dtype, STOCK, eager=eager) for dtype in ("bfloat16", "float16") for eager in (False, True)]


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> dict[Engine, list[Completion]]:
    """Of stock vLLM's engines in bfloat16, which every test needs."""
    return on_one_gpu(lambda engine: engine.complete(checkpoint), THEIRS[:2])


@pytest.fixture(scope="module")
def completions(checkpoint: Path, stock: dict[Engine, list[Completion]]) -> dict[Engine, list[Completion]]:
    """Of all engines."""
    engines = [engine for engine in (*OURS, *THEIRS[2:]) if takes(checkpoint, engine.dtype)]
    return stock | on_one_gpu(lambda engine: engine.complete(checkpoint), engines)


def takes(checkpoint: Path, dtype: str) -> bool:
    """vLLM refuses float16 for Gemma."""
    return dtype != "float16" or "gemma" not in json.loads((checkpoint / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("engine", OURS, ids=lambda engine: f"{engine.dtype} {engine.path or 'auto'}")
def test_tokens_are_those_of_dense_execution(
    engine: Engine,
    checkpoint: Path,
    completions: dict[Engine, list[Completion]],
    record_property: Callable[[str, object], None],
) -> None:
    """With the policy's choice and with each path alone, at every batch that twenty prompts make.

    Sums in another order round other activations to other FP8 values. How much that moves the numbers is measured on
    stock vLLM itself, as it goes from eager to compiled; by its mean, because the largest of so many differences varies
    by as much again from run to run.
    """
    if not takes(checkpoint, engine.dtype):
        pytest.skip(f"vLLM does not run this model in {engine.dtype}")
    require_those_of_stock(f"{engine.dtype} {engine.path or 'auto'}", engine, completions, record_property)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tokens_of_a_pipeline(
    checkpoint: Path, stock: dict[Engine, list[Completion]], record_property: Callable[[str, object], None]
) -> None:
    """Of two stages: what a layer returns is a tensor then."""
    engine = Engine("bfloat16", stages=2)
    found = {engine: engine.complete(checkpoint)}
    require_those_of_stock("bfloat16, two stages", engine, stock | found, record_property)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokens_of_several_ranks(
    ranks: int,
    checkpoint: Path,
    stock: dict[Engine, list[Completion]],
    record_property: Callable[[str, object], None],
) -> None:
    """Stock's own ranks are what they are compared with: each rank rounds its share of an activation."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    heads = json.loads((checkpoint / "config.json").read_text())["num_attention_heads"]
    if heads % ranks:
        pytest.skip(f"{ranks} ranks cannot share {heads} heads; SPENSE_TEST_MODEL names another model")
    engines = [Engine("bfloat16", quantization, ranks=ranks) for quantization in ("spense", STOCK)]
    with ThreadPoolExecutor(len(engines)) as pool:
        found = dict(zip(engines, pool.map(lambda engine: engine.complete(checkpoint), engines), strict=True))
    require_those_of_stock(f"bfloat16, {ranks} ranks", engines[0], stock | found, record_property)


def require_those_of_stock(
    name: str, engine: Engine, completions: dict[Engine, list[Completion]], record: Callable[[str, object], None]
) -> None:
    stock, eager = (completions[Engine(engine.dtype, STOCK, eager=eager)] for eager in (False, True))
    theirs = completions.get(Engine(engine.dtype, STOCK, ranks=engine.ranks), stock)
    record(name, require_those_of(completions[engine], theirs, (stock, eager)))


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL and log of a server as users start it."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    options = ["--served-model-name", "smollm2", "--max-model-len", "1024", "--gpu-memory-utilization", "0.5"]
    log = tmp_path_factory.mktemp("server") / "log"
    with serving([*command, *options, "--port", str(port)], port, log):
        yield f"http://{HOST}:{port}/v1", log


def test_64_clients_for_two_minutes(server: tuple[str, Path], record_property: Callable[[str, object], None]) -> None:
    """No error and no growth in the second half; before that, pools fill and new lengths of prompts need plans."""
    url, log = server
    before, started = answer(url), len(log.read_text())
    halfway: list[int] = []
    outcome = asyncio.run(soak(url, "smollm2", CLIENTS, SECONDS, lambda: halfway.extend(memory())))
    end = memory()
    growth = [late - early for late, early in zip(end, halfway, strict=True)]
    left = f"{outcome.dropped} dropped, {outcome.cancelled} cancelled"
    counts = f"{outcome.streams}, {left}, {outcome.tokens} tokens in {SECONDS:.0f} s"
    record_property("streams", counts)
    for name, used, grown in zip(("GPU", "host"), end, growth, strict=True):
        record_property(name, f"{used / 2**20:.0f} MiB at the end, {grown / 2**20:+.1f} MiB since halfway")
    assert not outcome.wrong, outcome.wrong[:5]
    assert outcome.streams >= CLIENTS
    assert all(grown <= MAX_GROWTH_BYTES for grown in growth)
    assert answer(url) == before
    said = log.read_text()
    assert "Traceback" not in said[started:]
    assert "Spense: output-split" in said
    assert "the reference path is slow on a GPU" not in said


def memory() -> tuple[int, int]:
    """Bytes in use on the GPU, by anybody, and by the server's processes on the host."""
    free, total = torch.cuda.mem_get_info()
    return total - free, host_bytes()


def answer(url: str) -> str:
    client = OpenAI(base_url=url, api_key="none")
    completion = client.completions.create(model="smollm2", prompt=QUESTION, temperature=0, max_tokens=16)
    return completion.choices[0].text
