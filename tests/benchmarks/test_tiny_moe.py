"""The small mixture that benchmarks train for themselves: it learns, and it is a checkpoint like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import texts, tiny_moe
from benchmarks.tiny_moe import Settings, batches, make, rate
from offline_prune.checkpoint.verify import verify
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

SMALL = Settings(
    hidden=64, intermediate=128, layers=2, experts=4, chosen=2, vocabulary=300, length=32, batch=4, steps=60, rate=0.01
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that can be learned: a number, and what is twice as large."""
    path = tmp_path_factory.mktemp("texts")
    for name in (texts.TRAINING, texts.CALIBRATION, *texts.DOMAINS):
        lines = [json.dumps({"text": " ".join(f"{n} {2 * n};" for n in range(i, i + 20))}) for i in range(150)]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    return path


def test_it_learns_and_is_pruned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_moe, "_SAID", 20)
    model = tmp_path / "tiny"
    row = make(model, SMALL, torch.device("cpu"), folder)
    assert list(row["losses"]) == [1, 20, 40, 60]
    assert row["losses"][60] < 0.7 * row["losses"][1]
    assert max(row["heldout_losses"].values()) < 0.7 * row["losses"][1]
    written = json.loads((model / tiny_moe.FILE).read_text())
    assert written["benchmark"] == "tiny_moe"
    assert written["rows"][0]["heldout_losses"] == row["heldout_losses"]

    settings = {"calibration": str(folder / "calibration.jsonl"), "samples": 4, "length": 64, "device": "cpu"}
    report = prune(PruneSettings(str(model), tmp_path / "pruned", **settings))
    # Each of its tokens chose two experts.
    assert [sum(layer.tokens or []) for layer in report.layers] == SMALL.layers * [2 * 4 * 64]
    assert verify(tmp_path / "pruned").mlps == SMALL.layers * SMALL.experts

    with pytest.raises(SpenseError, match="tiny: exists"):
        make(model, SMALL, torch.device("cpu"), folder)


def test_the_same_seed_gives_the_same_model(folder: Path) -> None:
    documents = list(texts.documents_in(folder, texts.TRAINING))
    sequences = tiny_moe.packed(documents, tiny_moe.tokenizer_of(documents, 300), 32)
    few = Settings(hidden=64, intermediate=32, layers=1, experts=2, chosen=1, vocabulary=300, batch=2, steps=2)
    first, again, other = (
        tiny_moe.train(each, sequences, torch.device("cpu"))[1] for each in (few, few, replace(few, seed=1))
    )
    assert first == again != other


def test_every_sequence_is_seen_once_in_a_pass() -> None:
    found = batches(torch.arange(7)[:, None], 3, seed=0)
    passes = [torch.cat([next(found), next(found)]).flatten().tolist() for _ in range(2)]
    assert [len(set(each)) for each in passes] == [6, 6]
    assert passes[0] != passes[1]
    with pytest.raises(SpenseError, match="found 7 sequences, expected at least a batch of 8"):
        next(batches(torch.arange(7)[:, None], 8, seed=0))


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, Settings(steps=1000, rate=1.0)) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(0.01, rel=0.01)
    assert max(rates) == max(rates[90:110]) == pytest.approx(1, rel=0.05)
    assert rates[-1] == pytest.approx(0.1)


def test_training_text_is_apart_from_what_is_held_out() -> None:
    from offline_prune.calibration.data import BUILTIN_PACKAGES, HELDOUT_PACKAGES

    assert set(BUILTIN_PACKAGES) <= set(texts.TRAINING_PACKAGES)
    assert not set(HELDOUT_PACKAGES) & set(texts.TRAINING_PACKAGES)


def test_texts_without_a_training_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpenseError, match=r"python -m benchmarks\.texts .* --training"):
        make(tmp_path / "model", SMALL, torch.device("cpu"), tmp_path)


def test_held_out_texts_are_missed_before_the_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.jsonl").write_text((folder / "training.jsonl").read_text())
    (tmp_path / "code.jsonl").write_text((folder / "code.jsonl").read_text())

    def no_training(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(tiny_moe, "train", no_training)
    with pytest.raises(SpenseError, match=f"{tmp_path}: found no docstrings.jsonl, reference.jsonl; expected what `"):
        make(tmp_path / "model", SMALL, torch.device("cpu"), tmp_path)


def test_a_training_text_is_written_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "DOMAINS", ())
    monkeypatch.setattr(texts, "BUILTIN_PACKAGES", ("safetensors",))
    monkeypatch.setattr(texts, "TRAINING_PACKAGES", ("safetensors",))
    monkeypatch.setattr(texts, "_TRAINING_CHARACTERS", 10_000)
    monkeypatch.setattr(texts, "_LONGEST", 3_000)
    texts.write(tmp_path)
    assert not (tmp_path / "training.jsonl").exists()
    texts.write(tmp_path, training=True)
    found = list(texts.documents_in(tmp_path, texts.TRAINING))
    assert max(map(len, found)) == 3_000
    assert sum(map(len, found)) == 10_000
    assert found == list(texts.documents(texts.TRAINING))
