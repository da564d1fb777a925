"""Block-wise tuning: what it lowers, and what it leaves alone."""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import logits, run
from tiny_models import FAMILIES, tiny_model

from offline_prune import pipeline
from offline_prune.block_pruning import tuned_channels
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.methods import block_finetune, prune_mlp
from offline_prune.methods.block_finetune import BlockTuning, _AsServed, _share
from offline_prune.methods.fp8 import channel_scales, round_to_fp8
from offline_prune.model import block_forward
from offline_prune.model.loading import SourceModel
from offline_prune.model.safetensors_reader import SafetensorsReader
from offline_prune.settings import PruneSettings

MLP = "model.layers.{}.mlp.{}_proj.weight"
MORE = {"samples": 64, "length": 64}


@pytest.mark.parametrize("quantize", ["fp8", "none"])
def test_it_brings_the_model_closer_to_the_dense_one(quantize: Any, llama: Path, tmp_path: Path, text: Path) -> None:
    errors = []
    for method in ("spensegpt+", "spensegpt++"):
        report = run(llama, tmp_path / method, text, method=method, quantize=quantize, **MORE)
        errors.append((logits(tmp_path / method) - logits(llama)).square().mean().item())
    verify(tmp_path / "spensegpt++")
    for layer in report.layers:
        assert layer.tuning is not None
        assert layer.tuning.after < 0.9 * layer.tuning.before
    assert errors[1] < 0.9 * errors[0]


def test_zeros_stay_where_they_are(llama: Path, tmp_path: Path, text: Path) -> None:
    for method in ("spensegpt+", "spensegpt++"):
        run(llama, tmp_path / method, text, method=method, selection="spensegpt+", rounding="inside", descent_passes=0)
    before, after = SafetensorsReader(tmp_path / "spensegpt+"), SafetensorsReader(tmp_path / "spensegpt++")
    for name in ("gate", "up", "down"):
        # In the first layer, tuning is the only difference between the two.
        old, new = (files.read(MLP.format(0, name)).float() for files in (before, after))
        assert not torch.equal(old, new)
        assert (new[old == 0] == 0).all()


def test_a_block_that_nothing_was_done_to_is_left_alone(llama: Path, tmp_path: Path, text: Path) -> None:
    report = run(llama, tmp_path / "out", text, method="spensegpt++", sparsity=0.0, quantize="none")
    before, after = SafetensorsReader(llama), SafetensorsReader(tmp_path / "out")
    assert all(torch.equal(after.read(name), before.read(name)) for name in before)
    assert [layer.tuning.after for layer in report.layers if layer.tuning] == [0.0, 0.0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_tuned(name: str, tmp_path: Path, text: Path) -> None:
    report = run(tiny_model(name, tmp_path / "model"), tmp_path / "out", text, method="spensegpt++", **MORE)
    verify(tmp_path / "out")
    assert all(layer.tuning and layer.tuning.after < layer.tuning.before for layer in report.layers)


def test_a_block_that_cannot_be_entered_behind_its_attention(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a block is tuned on whole sequences, through its attention: the same loss to begin with, of all text."""
    monkeypatch.setattr("offline_prune.methods.block_finetune._JUDGED_SHARE", 1)
    split = run(llama, tmp_path / "split", text, method="spensegpt++", samples=16, length=256)
    monkeypatch.setattr("offline_prune.calibration.hidden_states.find_split", lambda *_: None)
    whole = run(llama, tmp_path / "whole", text, method="spensegpt++", samples=16, length=256)
    first, second = split.layers[0].tuning, whole.layers[0].tuning
    assert first
    assert second
    assert second.before == pytest.approx(first.before, rel=1e-2)
    assert second.after < second.before


def test_steps_that_do_not_fit_in_a_batch_sum_up(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In BF16, which CPUs that have it take, another order of sums alone makes two per cent.
    monkeypatch.setattr(pipeline, "compute_dtype", lambda device: torch.float32)
    for module in (block_forward, prune_mlp, block_finetune):
        monkeypatch.setattr(module, "fast_matmul", nullcontext)
    reports = [
        run(llama, tmp_path / str(batch), text, method="spensegpt++", tune_steps=2, batch_tokens=batch, **MORE)
        for batch in (4096, 512)
    ]
    found = [[layer.tuning.after for layer in report.layers if layer.tuning] for report in reports]
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize(
    ("asked", "units", "tokens", "steps"),
    [
        (512, 2**15, 1, 128),
        (512, 2**17, 1, 128),
        (512, 2**18, 1, 256),
        (512, 2**21, 1, 512),
        (64, 2**21, 1, 64),
        (128, 640, 1, 5),
        (6, 40, 1, 1),
        # Whole sequences, which need not come out even: never more steps than were asked for.
        (512, 300, 4096, 300),
        (512, 768, 4096, 512),
        (2, 5, 256, 2),
        (8, 5, 64, 2),
    ],
)
def test_a_longer_text_is_worth_more_steps(asked: int, units: int, tokens: int, steps: int) -> None:
    assert block_finetune.step_count(units, tokens, asked) == steps


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"method": "spensegpt++"}, {"tune_steps": 512, "tune_rate": 0.016, "tune_loss": "fisher"}),
        ({"method": "spensegpt++", "tune_steps": 0}, {}),
        (
            {"method": "wanda", "tune_steps": 3, "tune_rate": 0.01},
            {"tune_steps": 3, "tune_rate": 0.01, "tune_loss": "relative"},
        ),
    ],
    ids=str,
)
def test_every_method_may_be_tuned(
    options: dict[str, Any], recorded: dict[str, Any], llama: Path, tmp_path: Path, text: Path
) -> None:
    report = run(llama, tmp_path / "out", text, **options)
    settings = open_checkpoint(tmp_path / "out").annotation.settings
    assert {key: value for key, value in settings.items() if key.startswith("tune")} == recorded
    assert all((layer.tuning is not None) == bool(recorded) for layer in report.layers)


def test_channels_count_by_their_weights(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(name: str, **options: Any) -> list[float]:
        report = run(llama, tmp_path / name, text, method="spensegpt++", tune_steps=2, **options)
        return [layer.tuning.before for layer in report.layers if layer.tuning]

    def weigh(weights: torch.Tensor) -> None:
        monkeypatch.setattr("offline_prune.block_pruning.weights_of_channels", lambda model, *_: [weights, weights])

    alike = before("alike", tune_loss="relative")
    width = json.loads((llama / "config.json").read_text())["hidden_size"]
    # Of the first block alone: what the second one gets depends on how the first was tuned.
    weigh(torch.full((width,), 2.0))
    assert before("doubled")[0] == pytest.approx(2 * alike[0], rel=1e-4)
    weigh((torch.arange(width) < width // 2).float())
    halves = [before("first half")[0]]
    weigh((torch.arange(width) >= width // 2).float())
    halves.append(before("second half")[0])
    assert min(halves) > 0
    assert sum(halves) == pytest.approx(alike[0], rel=1e-4)


def test_a_model_without_predictions_is_tuned_with_all_channels_alike(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings, said = SourceModel(str(llama)), PruneSettings(str(llama), tmp_path / "out"), list[str]()
    monkeypatch.setattr(SourceModel, "head_name", None)
    tokens, cpu = torch.zeros(2, 8, dtype=torch.int64), torch.device("cpu")
    assert tuned_channels(source, settings, tokens, cpu, torch.float32, said.append) == [None, None]
    assert said == ["tuning weighs all channels alike, because the model has no output head"]


def test_gradients_go_straight_through_the_rounding_to_the_kept_weights() -> None:
    weight = torch.randn(8, 16)
    weight[:, ::2] = 0
    scales = channel_scales(weight)
    master = weight.clone().requires_grad_()
    served = _AsServed.apply(master, weight != 0, scales, torch.bfloat16)
    assert torch.equal(served, round_to_fp8(weight, scales).bfloat16())
    served.backward(torch.ones_like(served))
    assert torch.equal(master.grad, (weight != 0).float())


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [_share(step, 100) for step in range(100)]
    peak = shares.index(max(shares))
    assert 2 <= peak <= 6
    assert shares[0] < 0.2
    assert shares[:peak] == sorted(shares[:peak])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert shares[68] > 0.3
    assert shares[70:] == pytest.approx([0.3] * 30)


def test_nothing_of_a_block_is_kept_for_the_next(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until Python looks for cycles: moments take eight bytes for each weight."""
    process, seen = BlockTuning.process, list[weakref.ref[BlockTuning]]()

    def record(tuning: BlockTuning) -> Any:
        assert not any(each() for each in seen)
        seen.append(weakref.ref(tuning))
        return process(tuning)

    monkeypatch.setattr(BlockTuning, "process", record)
    gc.disable()
    try:
        run(llama, tmp_path / "out", text, method="spensegpt++", tune_steps=2, **MORE)
    finally:
        gc.enable()
    assert len(seen) > 1


def test_the_last_steps_are_averaged(llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 steps the last five, in the first block that is tuned."""
    steps: list[list[torch.Tensor]] = []
    tuned: list[dict[str, torch.Tensor]] = []

    class Recorded(torch.optim.Adam):
        def step(self, *args: Any) -> Any:
            done = super().step(*args)
            steps.append([group["params"][0].detach().clone() for group in self.param_groups])
            return done

    process = BlockTuning.process

    def record(tuning: BlockTuning) -> Any:
        found = process(tuning)
        tuned.append(found[0])
        return found

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    monkeypatch.setattr(BlockTuning, "process", record)
    run(llama, tmp_path / "out", text, method="spensegpt++", quantize="none", tune_steps=16, **MORE)
    assert len(steps) == 16 * len(tuned)
    for weights, kept in zip(zip(*steps[11:16], strict=True), tuned[0].values(), strict=True):
        assert torch.allclose(torch.stack(weights).mean(0), kept, atol=1e-7)
        assert not torch.allclose(weights[-1], kept, atol=1e-5)
