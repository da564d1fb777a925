"""What a memory plan may count on, and what it says for published shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.prune_time import ALL_SHAPES, configure
from offline_prune import memory_plan
from offline_prune.memory_plan import GIB, MemoryPlan
from offline_prune.model.loading import SourceModel
from offline_prune.runtime.activation_store import Place
from offline_prune.runtime.pinned_buffers import pinned_bytes
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

GPU = torch.device("cuda", 0)


def test_what_an_earlier_run_left_in_torchs_cache_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one process plan alike: the second must not move its activations to the host."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 45)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1)
    assert memory_plan.free_bytes(GPU) == 74


@pytest.mark.parametrize(
    ("size", "taken"), [(1, 1), (80 << 20, 128 << 20), (1 << 30, 1 << 30), ((1 << 30) + 1, 2 << 30)]
)
def test_pinned_memory_comes_in_powers_of_two(size: int, taken: int) -> None:
    assert pinned_bytes(size) == taken


def hollow_model(folder: Path, shape: str) -> SourceModel:
    """Two blocks of a published shape in files that take no room: holes where the weights would be."""
    folder.mkdir(parents=True)
    for file, shapes in configure(folder, shape, 2).items():
        header, end = {}, 0
        for name, size in shapes.items():
            start, end = end, end + 2 * math.prod(size)
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(out.tell() + end)
    return SourceModel(str(folder))


def planned(folder: Path, shape: str, gpu_gib: float, monkeypatch: pytest.MonkeyPatch, **options: object) -> MemoryPlan:
    """The plan for 128 × 16384 tokens with so much free memory on a GPU, and 120 GiB beside it."""
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: gpu_gib * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=120 * GIB))
    given = {"method": "spensegpt+", "samples": 128, "length": 16384, "device": "cuda", **options}
    settings = PruneSettings("model", folder / "out", **given)  # type: ignore[arg-type]
    return memory_plan.memory_plan(hollow_model(folder / shape, shape), settings, GPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "on_device", "host"),
    [
        ("qwen3-32b", 34.41, 1.55),
        ("seed-oss-36b", 36.37, 2.67),
        ("llama-3.1-8b", 21.73, 0.68),
        ("llama-3.3-70b", 51.27, 2.67),
    ],
)
def test_one_h100_holds_published_shapes(
    shape: str, on_device: float, host: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(tmp_path, shape, 78.0, monkeypatch)
    assert found.place == "device"
    assert (found.on_device / GIB, found.host / GIB) == pytest.approx((on_device, host), abs=0.01)


def test_the_host_holds_what_a_gpu_reads_and_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-32B's block: q and o of 80 MiB, k and v of 10, three of 250, in pinned memory of 128, 16 and 256 MiB."""
    found = planned(tmp_path, "qwen3-32b", 78.0, monkeypatch)
    assert found.staging / 2**20 == pytest.approx(1056 + 528, rel=1e-3)


def test_activations_that_do_not_fit_on_the_gpu_go_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 GiB of them take 32 of pinned memory, and the plan says so."""
    found = planned(tmp_path, "qwen3-32b", 30.0, monkeypatch)
    assert found.place == "host"
    assert found.activations == 20 * GIB
    assert found.host / GIB == pytest.approx(32 + 1.55, abs=0.01)
    assert found.on_device / GIB == pytest.approx(14.41, abs=0.01)


def test_a_block_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpenseError, match=r"cuda:0: 14\.40 GiB of memory usable, one block needs 14\.41 GiB"):
        planned(tmp_path, "qwen3-32b", 16.0, monkeypatch)


def test_tuning_fits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams, the dense MLP and Adam's moments: the most that a 32B model asks of an H100."""
    found = planned(tmp_path, "qwen3-32b", 78.0, monkeypatch, method="spensegpt++")
    assert found.place == "device"
    assert found.activations == 40 * GIB
    assert found.on_device / GIB == pytest.approx(60.51, abs=0.1)


def test_gradients_at_a_large_head_that_do_not_fit_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file for the activations would not help."""
    monkeypatch.setattr("benchmarks.prune_time.VOCABULARY", 2**18)
    small = {"method": "spensegpt++", "samples": 4, "length": 64, "batch_tokens": 64}
    with pytest.raises(SpenseError, match=r"cuda:0: 0\.45 GiB .* output head need 0\.56 GiB .* --tune-loss relative"):
        planned(tmp_path / "fisher", "tiny", 0.5, monkeypatch, **small)
    found = planned(tmp_path / "relative", "tiny", 0.5, monkeypatch, **small, tune_loss="relative")
    assert found.place == "device"
    # No block of a mixture is tuned.
    assert planned(tmp_path / "mixture", "qwen3-30b-a3b", 78.0, monkeypatch, **small).gradients == 0


def test_rows_pruned_to_choose_among_them_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up in float32, in two orders: shown where these need most, in an MLP no wider than its input."""
    monkeypatch.setitem(ALL_SHAPES, "square", {**ALL_SHAPES["tiny"], "hidden_size": 512, "intermediate_size": 512})
    plain, scored = (
        planned(
            tmp_path / selection,
            "square",
            78.0,
            monkeypatch,
            selection=selection,
            samples=4,
            length=64,
            batch_tokens=64,
        )
        for selection in ("spensegpt+", "output-loss")
    )
    assert scored.work - plain.work == 2 * 2 * 4 * 512 * 512


def test_experts_have_room_for_their_hessians_and_for_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path / "many", "qwen3-30b-a3b", 78.0, monkeypatch)
    # Of 8 parts of the text, sums of four subtrees.
    assert plan.work >= 4 * 128 * 4 * 2048**2
    assert plan.place is Place.DEVICE
    little = {"samples": 1, "length": 64, "batch_tokens": 64}
    few = planned(tmp_path / "few", "qwen3-30b-a3b", 78.0, monkeypatch, **little)
    # One sum, and 32 experts' factors and weights.
    assert few.work >= 128 * 4 * 2048**2 + 32 * (3 * 4 * 2048**2 + 4 * 4 * 2 * 768 * 2048)
    alone = planned(tmp_path / "one", "qwen3-30b-a3b", 78.0, monkeypatch, **little, layout="none")
    assert alone.work < few.work
