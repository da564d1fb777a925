"""Runs that are cut off: what they leave behind, and that `--resume` ends where an uninterrupted run does."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import contents, cut_off, run
from tiny_models import tiny_model

import vllm_spense
from offline_prune import memory_plan, pipeline
from offline_prune.checkpoint import writer
from offline_prune.checkpoint.journal import FILE, Journal
from offline_prune.checkpoint.output_folder import PARTIAL
from offline_prune.methods.recipe import METHODS
from offline_prune.model.loading import SourceModel
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

LAYERS = 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=LAYERS)


@pytest.mark.parametrize("blocks", [1, LAYERS])
@pytest.mark.parametrize("options", [{}, {"quantize": "none"}, {"method": "wanda"}, {"method": "spensegpt++"}], ids=str)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    blocks: int, options: dict[str, Any], deep: Path, tmp_path: Path, text: Path
) -> None:
    whole = run(deep, tmp_path / "whole", text, **options)
    cut_off(deep, tmp_path / "out", text, blocks, **options)
    resumed = run(deep, tmp_path / "out", text, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert [layer.dense_indices for layer in resumed.layers] == [layer.dense_indices for layer in whole.layers]
    assert [layer.down for layer in resumed.layers] == [layer.down for layer in whole.layers]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama4 with a plain layer", {"skip_unsupported": True}),
        ("qwen3-moe with a plain layer", {}),
        ("deepseek-v3", {"method": "spensegpt++"}),
        ("mixtral", {"quantize": "none"}),
    ],
)
def test_blocks_of_experts_are_resumed_too(name: str, options: dict[str, Any], tmp_path: Path, text: Path) -> None:
    model = tiny_model(name, tmp_path / "model")
    whole = run(model, tmp_path / "whole", text, **options)
    cut_off(model, tmp_path / "out", text, 1, **options)
    resumed = run(model, tmp_path / "out", text, **options, resume=True)
    assert [layer.tokens for layer in resumed.layers] == [layer.tokens for layer in whole.layers]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.25}, "sparsity: found 0.375, expected 0.25"),
        ({"seed": 1}, "seed: found 0, expected 1"),
        ({"samples": 4}, "samples: found 8, expected 4.*calibration tokens: found"),
        ({"batch_tokens": 64}, "batch_tokens: found 2048, expected 64"),
    ],
)
def test_other_settings_are_refused_by_name(
    options: dict[str, Any], words: str, deep: Path, tmp_path: Path, text: Path
) -> None:
    cut_off(deep, tmp_path / "out", text, 2)
    with pytest.raises(SpenseError, match=words):
        run(deep, tmp_path / "out", text, resume=True, **options)
    assert len(list((tmp_path / "out" / PARTIAL).glob("part-*"))) == 2, "the work that was done is gone"


def test_a_method_that_means_something_else_is_refused(
    deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run that an older version began."""
    cut_off(deep, tmp_path / "out", text, 2)
    changed = replace(METHODS["spensegpt+"], selection="output-loss", descent_passes=1)
    monkeypatch.setitem(METHODS, "spensegpt+", changed)
    words = r"selection: found spensegpt\+, expected output-loss; descent_passes: found 0, expected 1"
    with pytest.raises(SpenseError, match=words):
        run(deep, tmp_path / "out", text, resume=True)


def test_another_version_is_refused(deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(deep, tmp_path / "out", text, 2)
    monkeypatch.setattr(vllm_spense, "__version__", "99")
    with pytest.raises(SpenseError, match=r"spense: found [0-9.]+, expected 99"):
        run(deep, tmp_path / "out", text, resume=True)


def test_spelling_out_what_the_method_does_anyway_is_no_change(deep: Path, tmp_path: Path, text: Path) -> None:
    cut_off(deep, tmp_path / "out", text, 2)
    assert len(run(deep, tmp_path / "out", text, resume=True, sparsity=0.375, tune_steps=0).layers) == LAYERS


def test_another_precision_is_refused(deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a CPU that multiplies bfloat16 and one that does not."""
    monkeypatch.setattr(pipeline, "compute_dtype", lambda device: torch.bfloat16)
    cut_off(deep, tmp_path / "out", text, 2)
    monkeypatch.setattr(pipeline, "compute_dtype", lambda device: torch.float32)
    with pytest.raises(SpenseError, match=r"precision: found torch\.bfloat16, expected torch\.float32"):
        run(deep, tmp_path / "out", text, resume=True)


def test_another_model_is_refused(deep: Path, tmp_path: Path, text: Path) -> None:
    cut_off(deep, tmp_path / "out", text, 2)
    other = shutil.copytree(deep, tmp_path / "model", copy_function=shutil.copyfile)
    with pytest.raises(SpenseError, match="model: found"):
        run(other, tmp_path / "out", text, resume=True)


def test_work_is_not_thrown_away_unasked(deep: Path, tmp_path: Path, text: Path) -> None:
    cut_off(deep, tmp_path / "out", text, 2)
    with pytest.raises(SpenseError, match=r"unfinished run \(2 parts done\); --resume goes on, --overwrite starts"):
        run(deep, tmp_path / "out", text)
    run(deep, tmp_path / "out", text, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / PARTIAL).exists()


def test_resume_without_anything_to_resume_starts_at_the_start(deep: Path, tmp_path: Path, text: Path) -> None:
    assert len(run(deep, tmp_path / "out", text, resume=True).layers) == LAYERS


def test_no_error_costs_what_was_finished(deep: Path, tmp_path: Path, text: Path) -> None:
    """A file that cannot be read today may be readable tomorrow."""
    run(deep, tmp_path / "whole", text)
    cut_off(deep, tmp_path / "out", text, 2, error=SpenseError("cannot read"))
    run(deep, tmp_path / "out", text, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_explained_and_resumed(
    deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def full_after_two(tensors: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        if file.name.startswith("part-"):
            saved.append(file)
        if len(saved) > 2:
            raise OSError(28, "No space left on device")
        checkpoint_save(tensors, file, **options)

    checkpoint_save = writer.save_file
    monkeypatch.setattr(writer, "save_file", full_after_two)
    with pytest.raises(SpenseError, match=r"part-2: cannot be written: .*No space left on device"):
        run(deep, tmp_path / "out", text)
    monkeypatch.undo()
    journal = Journal.read(tmp_path / "out" / PARTIAL)
    assert journal is not None
    assert [part.file for part in journal.parts] == ["part-0", "part-1"]


def test_a_line_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"seed": 0})
    journal.start()
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        journal.add(name, tmp_path / name, {"loss": 0.1})
    whole = (tmp_path / FILE).read_bytes()
    for length in range(len(whole) + 1):
        (tmp_path / FILE).write_bytes(whole[:length])
        found = Journal.read(tmp_path)
        lines = whole[:length].count(b"\n")
        assert (found is None) == (lines == 0)
        if found:
            assert found.parts == journal.parts[: lines - 1]


def killed(model: Path, out: Path, text: Path, number: signal.Signals, blocks: int, wait: float) -> bytes:
    """Starts a real run, sends it a signal some time after a block is on disk, and returns what it said."""
    command = [sys.executable, "-m", "offline_prune", str(model), str(out), "--calibration", str(text), "--resume"]
    process = subprocess.Popen(
        [*command, "--method", "spensegpt+", "--samples", "8", "--length", "64", "--device", "cpu"],
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while len(list((out / PARTIAL).glob("part-*"))) < blocks:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    return stderr


def test_a_run_that_is_killed_again_and_again(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=30)
    run(model, tmp_path / "whole", text)
    dice = random.Random(0)
    for number, blocks in ((signal.SIGKILL, 3), (signal.SIGTERM, 10)):
        said = killed(model, tmp_path / "out", text, number, blocks, dice.uniform(0, 0.1))
        assert (b"--resume goes on from there" in said) == (number != signal.SIGKILL)
    run(model, tmp_path / "out", text, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shard_bytes", [4 << 30, 40_000], ids=["one file", "shards"])
def test_a_run_that_is_cut_off_while_files_move_ends_the_same(
    shard_bytes: int, deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_cut_off.py` does so at every single step, without a model."""
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", shard_bytes)
    run(deep, tmp_path / "whole", text)
    replace_file, moved = os.replace, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal moved
        moved += 1
        if moved in (1, 3, 6):
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    for attempt in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(deep, tmp_path / "out", text, resume=attempt > 0)
        assert not (tmp_path / "out/config.json").exists()
    report = run(deep, tmp_path / "out", text, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(report.layers) == LAYERS


def test_what_a_resumed_run_needs_on_the_disk(deep: Path, tmp_path: Path, text: Path) -> None:
    """What is there already needs no room again."""
    cut_off(deep, tmp_path / "out", text, 2)
    settings = PruneSettings(str(deep), tmp_path / "out", method="spensegpt+", samples=8, length=64)
    cpu = torch.device("cpu")
    needs = memory_plan.memory_plan(SourceModel(str(deep)), settings, cpu, torch.float32)
    parts = sum(path.stat().st_size for path in (tmp_path / "out" / PARTIAL).glob("part-*"))
    free = needs.on_disk - parts // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        memory_plan.require_disk_space(tmp_path / "out", needs.on_disk)
        with pytest.raises(SpenseError, match=r"GiB free, the run needs"):
            memory_plan.require_disk_space(tmp_path / "elsewhere", needs.on_disk)


def test_a_run_needs_no_more_disk_than_planned(
    deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the headers of the files and the report, which a model of this size is hardly larger than."""
    most = 0

    def watched(descriptor: int) -> None:
        nonlocal most
        sync(descriptor)
        weights = [path for path in tmp_path.rglob("*") if re.match(r"part-|.*\.safetensors", path.name)]
        most = max(most, sum(512 * path.stat().st_blocks for path in weights))

    sync = os.fsync
    monkeypatch.setattr(os, "fsync", watched)
    run(deep, tmp_path / "out", text, quantize="none")
    weights = (tmp_path / "out/model.safetensors").stat().st_size
    assert weights < most < 1.6 * weights


def test_a_run_that_ends_before_its_first_block_leaves_nothing(
    deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "Stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(deep, tmp_path / "out", text)
    assert not list(tmp_path.iterdir())
