"""The pruner on a real GPU: its kernel and its sums against their twins, and whole runs wherever activations are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import elementwise_parts
from column_problems import batches, compare, every_problem, ties
from descent_problems import every_problem as every_problem_of_descent
from runs import contents, cut_off
from tiny_models import tiny_model

from offline_prune.calibration.hessian import Energy, Hessian
from offline_prune.calibration.hidden_states import Stream
from offline_prune.calibration.sensitivity import weights_of_channels
from offline_prune.checkpoint.verify import verify
from offline_prune.methods import coordinate_descent, coordinate_descent_triton, sparsegpt
from offline_prune.methods.fp8 import channel_scales
from offline_prune.methods.sparsegpt_triton import solve_block
from offline_prune.model import fused_ops_triton
from offline_prune.model.fused_ops import TOLERANCE
from offline_prune.model.loading import SourceModel
from offline_prune.pipeline import prune
from offline_prune.report import Report
from offline_prune.runtime.pinned_buffers import Outbox
from offline_prune.settings import PruneSettings

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


def test_the_kernel_against_its_twin() -> None:
    for problem in every_problem(1000, DEVICE):
        compare(solve_block, problem)
    ties(solve_block, DEVICE)
    batches(solve_block, DEVICE)


def test_the_descent_kernel_against_its_twin() -> None:
    every_problem_of_descent(coordinate_descent_triton.solve_block, 1000, DEVICE)


def correlated(tokens: int, width: int) -> torch.Tensor:
    """BF16 (tokens, width), as unevenly spread as real activations."""
    torch.manual_seed(0)
    mix = torch.randn(width, width, device=DEVICE) / width**0.5
    spread = torch.logspace(-1, 1, width, device=DEVICE)
    return (torch.randn(tokens, width, device=DEVICE) @ mix * spread).bfloat16()


def test_sums_of_bf16_inputs_are_exact_to_float32() -> None:
    tokens = 1000
    inputs = correlated(4096, 1600)
    hessian, energy = Hessian(1600, DEVICE), Energy(1600, DEVICE)
    for part in inputs.split(tokens):
        hessian.add(part)
        energy.add(part)
    exact = inputs.double().T @ inputs.double()
    found = hessian.matrix()
    assert torch.equal(found, found.T)
    # Tensor cores take sixteen products at a time and cut the sum off, by less than a unit in its last place, where
    # others round: in a sum of squares that is an error of one sign, which adds up instead of averaging out.
    assert (found - exact).norm() <= tokens / 16 * torch.finfo(torch.float32).eps * exact.norm()
    assert torch.allclose(energy.diagonal().double(), exact.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("rounding", [False, True], ids=["plain", "fp8"])
def test_the_whole_loop_against_the_plain_one(rounding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to FP8 amplifies the order of sums: a tie that falls the other way changes the rest of its row."""
    inputs = correlated(16384, 4096)
    hessian = Hessian(4096, DEVICE)
    hessian.add(inputs)
    weight = 0.02 * torch.randn(2048, 4096, device=DEVICE)
    matrix = hessian.matrix()
    factor = sparsegpt.inverse_factor(matrix, 0.01, "layer")
    options = {
        "sparse_rows": torch.ones(2048, dtype=torch.bool, device=DEVICE),
        "sparse_columns": torch.arange(4096, device=DEVICE) < 3072,
        "scales": channel_scales(weight, 1.5) if rounding else None,
    }
    found = sparsegpt.sparsegpt(weight, factor, **options)
    monkeypatch.setattr(sparsegpt, "_solver", lambda device: sparsegpt.solve_block)
    expected = sparsegpt.sparsegpt(weight, factor, **options)
    errors = [((result - weight) @ matrix * (result - weight)).sum().item() for result in (found, expected)]
    masks = ((found == 0) == (expected == 0)).float().mean().item()
    print(f"masks {masks:.5%}, errors {errors[0]:.6g} and {errors[1]:.6g}")
    assert abs(errors[0] / errors[1] - 1) <= 1e-3
    assert masks >= 0.999


def test_descent_against_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = correlated(16384, 4096)
    hessian = Hessian(4096, DEVICE)
    hessian.add(inputs)
    weight = 0.02 * torch.randn(2048, 4096, device=DEVICE)
    matrix = hessian.matrix()
    regions = {
        "sparse_rows": torch.arange(2048, device=DEVICE) % 8 > 0,
        "sparse_columns": torch.arange(4096, device=DEVICE) < 3072,
    }
    start = sparsegpt.sparsegpt(weight, sparsegpt.inverse_factor(matrix, 0.01, "layer"), **regions)
    found = coordinate_descent.descend(weight, start, matrix, 0.01, **regions, passes=2)
    monkeypatch.setattr(coordinate_descent, "_solver", lambda device: coordinate_descent.solve_block)
    expected = coordinate_descent.descend(weight, start, matrix, 0.01, **regions, passes=2)
    errors = [((result - weight) @ matrix * (result - weight)).sum().item() for result in (found, expected, start)]
    masks = ((found == 0) == (expected == 0)).float().mean().item()
    print(f"masks {masks:.5%}, errors {errors[0]:.6g} and {errors[1]:.6g}, {errors[2]:.6g} before")
    assert abs(errors[0] / errors[1] - 1) <= 1e-3
    assert errors[0] < 0.95 * errors[2]
    assert masks >= 0.999


def test_the_factor_of_a_large_matrix() -> None:
    hessian = Hessian(6000, DEVICE)
    hessian.add(correlated(20000, 6000))
    matrix = hessian.matrix()
    upper = sparsegpt.inverse_factor(matrix, 0.01, "layer").upper.double()
    damped = matrix.double()
    damped.diagonal().add_(0.01 * matrix.diagonal().double().mean())
    # Hᵢ·U maps to itself: U·H·Uᵀ = I.
    assert (upper @ damped @ upper.T - torch.eye(6000, device=DEVICE)).abs().max() < 1e-3


def test_factors_of_a_batch() -> None:
    hessians = torch.stack([each.float().T @ each.float() for each in (correlated(4096, 1000) for _ in range(3))])
    found = sparsegpt.inverse_factors(hessians, 0.01, ["a", "b", "c"])
    for hessian, factor in zip(hessians, found.each(), strict=True):
        alone = sparsegpt.inverse_factor(hessian, 0.01, "layer").upper.double()
        damped = hessian.double()
        damped.diagonal().add_(0.01 * hessian.diagonal().double().mean())
        exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert (factor.upper - exact).norm() <= 2 * (alone - exact).norm() + 1e-6 * exact.norm()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{i} sheep jump over {i * i % 97} fences." for i in range(400)))
    return path


def on_gpu(model: Path, out: Path, text: Path, **options: object) -> Report:
    sizes = {"samples": 8, "length": 64, "batch_tokens": 128}
    settings = {"method": "spensegpt+", "calibration": str(text), "device": "cuda", **sizes}
    report = prune(PruneSettings(str(model), out, **{**settings, **options}))  # type: ignore[arg-type]
    verify(out)
    return report


def test_the_elementwise_kernels_against_transformers() -> None:
    elementwise_parts.compare(DEVICE, torch.bfloat16)
    elementwise_parts.look_alikes(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("family", elementwise_parts.FAMILIES)
def test_which_parts_the_kernels_stand_for(family: str, tmp_path: Path) -> None:
    difference = elementwise_parts.find_and_run(family, tmp_path / "model", DEVICE, torch.bfloat16)
    assert difference <= TOLERANCE


def test_a_run_with_the_kernels_is_one_without_them(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three kernels run, and change what is pruned no more than rounding does."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., torch.Tensor]:
        kernel = getattr(fused_ops_triton, name)

        def call(*arguments: Any) -> torch.Tensor:
            calls[name] += 1
            return kernel(*arguments)

        return call

    for name in ("rms_norm", "silu_mul", "rotate"):
        monkeypatch.setattr(fused_ops_triton, name, counted(name))
    with_kernels = on_gpu(model, tmp_path / "with", text)
    # Eight batches go through four blocks' attention, and at least once through all the rest.
    assert all(calls[name] >= 4 * 8 for name in ("rms_norm", "silu_mul", "rotate")), calls
    monkeypatch.setattr(Stream, "_with_kernels", lambda *_: nullcontext())
    before = calls.total()
    without = on_gpu(model, tmp_path / "without", text)
    assert calls.total() == before
    for found, expected in zip(with_kernels.layers, without.layers, strict=True):
        for projection in ("gate", "up", "down"):
            losses = [getattr(layer, projection).loss for layer in (found, expected)]
            assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_what_leaves_the_gpu_is_what_was_there() -> None:
    """Whatever is computed into the same memory after that comes too late, and no round allocates anew."""
    outbox, here = Outbox(), torch.arange(4)
    places = set()
    for number in range(3):
        tensor = torch.full((8192, 8192), number, dtype=torch.uint8, device=DEVICE)
        posted, arrived = outbox.post(f"{number}.", {f"{number}.there": tensor, f"{number}.here": here})
        tensor.fill_(255)
        assert arrived is not None
        arrived.synchronize()
        assert bool((posted[f"{number}.there"] == number).all())
        assert posted[f"{number}.there"].is_pinned()
        assert posted[f"{number}.here"] is here
        places.add(posted[f"{number}.there"].data_ptr())
    assert len(places) == 1


def test_the_host_memory_is_what_was_planned(text: Path, tmp_path: Path) -> None:
    """In a process of its own: pinned memory that earlier runs let go would count as in use again.

    Without `--tune-loss fisher`, whose hidden states wait in memory that is not pinned.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    model = tiny_model("qwen3", tmp_path / "model", **sizes)
    options = ["--samples", "8", "--length", "64", "--calibration", str(text), "--batch-tokens", "128"]
    options += ["--tune-loss", "relative"]
    for place in ("device", "host"):
        command = [sys.executable, "-m", "offline_prune", str(model), str(tmp_path / place), *options]
        subprocess.run([*command, "--activations", place], check=True, timeout=300)
        report = json.loads((tmp_path / place / "report.json").read_text())
        assert report["peak_pinned_gib"] == pytest.approx(report["planned_host_gib"], rel=0.1)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_where_activations_are_changes_nothing(place: str, model: Path, text: Path, tmp_path: Path) -> None:
    on_gpu(model, tmp_path / "device", text, activations="device")
    on_gpu(model, tmp_path / place, text, activations=place)
    assert contents(tmp_path / place) == contents(tmp_path / "device")


def test_a_resumed_run_ends_as_an_uninterrupted_one(model: Path, text: Path, tmp_path: Path) -> None:
    on_gpu(model, tmp_path / "whole", text)
    cut_off(model, tmp_path / "out", text, 2, device="cuda", batch_tokens=128)
    on_gpu(model, tmp_path / "out", text, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_what_one_makes(model: Path, text: Path, tmp_path: Path) -> None:
    on_gpu(model, tmp_path / "one", text)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--samples", "8", "--length", "64", "--calibration", str(text), "--batch-tokens", "128"]
    command = [*launch, "-m", "offline_prune", str(model), str(tmp_path / "two"), "--method", "spensegpt+", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_weights_of_channels_wait_in_host_memory(model: Path) -> None:
    """Ranks send them to each other, and a tensor that is sent stays on the device of the first one."""
    source, tokens = SourceModel(str(model)), torch.randint(0, 250, (2, 16))
    assert {each.device.type for each in weights_of_channels(source, tokens, DEVICE, torch.bfloat16, 0)} == {"cpu"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_tune_together(model: Path, text: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--samples", "8", "--length", "64", "--calibration", str(text), "--batch-tokens", "128"]
    command = [*launch, "-m", "offline_prune", str(model), str(tmp_path / "two"), "--method", "spensegpt++", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    verify(tmp_path / "two")
