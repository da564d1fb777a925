"""Runs that are cut off: what they leave behind, and that `--resume` ends where an uninterrupted run does."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from tiny_models import tiny_model

from offline_prune import pipeline
from offline_prune.checkpoint import writer
from offline_prune.checkpoint.journal import FILE, Journal, Part
from offline_prune.checkpoint.writer import Unfinished
from offline_prune.methods.recipe import METHODS
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

LAYERS = 4


class Cut(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=LAYERS)


def cut_off(
    model: Path, out: Path, text: Path, blocks: int, error: BaseException | None = None, **options: Any
) -> None:
    """Prunes so many blocks and leaves an unfinished run whose process is gone."""

    def stop(done: int, total: int, name: str) -> None:
        if done == blocks:
            raise error or Cut

    given = {"samples": 8, "length": 64, "calibration": str(text), "device": "cpu", **options}
    settings = PruneSettings(str(model), out, **given)
    with pytest.raises(type(error) if error else Cut):
        pipeline.prune(settings, stop)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        folder.rename(folder.with_name(f".{out.name}.partial-{dead.pid}"))


def contents(out: Path) -> dict[str, bytes]:
    """All files but the report, which tells how long it took."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("report.")}


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


def test_blocks_of_experts_are_resumed_too(tmp_path: Path, text: Path) -> None:
    model = tiny_model("qwen3-moe with a plain layer", tmp_path / "model")
    run(model, tmp_path / "whole", text, skip_unsupported=True)
    cut_off(model, tmp_path / "out", text, 1, skip_unsupported=True)
    run(model, tmp_path / "out", text, skip_unsupported=True, resume=True)
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
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1, "the work that was done is gone"


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
    monkeypatch.setattr(pipeline.vllm_spense, "__version__", "99")
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
    with pytest.raises(SpenseError, match=r"unfinished run \(2 blocks done\); --resume goes on, --overwrite starts"):
        run(deep, tmp_path / "out", text)
    run(deep, tmp_path / "out", text, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_without_anything_to_resume_starts_at_the_start(deep: Path, tmp_path: Path, text: Path) -> None:
    assert len(run(deep, tmp_path / "out", text, resume=True).layers) == LAYERS


def test_a_mistake_leaves_nothing(deep: Path, tmp_path: Path, text: Path) -> None:
    cut_off(deep, tmp_path / "out", text, 2, error=SpenseError("NaN"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_explained_and_resumed(
    deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def full_after_two(tensors: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        saved.append(file)
        if len(saved) > 2:
            raise OSError(28, "No space left on device")
        checkpoint_save(tensors, file, **options)

    checkpoint_save = writer.save_file
    monkeypatch.setattr(writer, "save_file", full_after_two)
    with pytest.raises(Unfinished, match=r"part-2: cannot be written: .*No space left on device"):
        run(deep, tmp_path / "out", text)
    monkeypatch.undo()
    (partial,) = tmp_path.glob(".out.partial-*")
    journal = Journal.read(partial)
    assert journal is not None
    assert [part.file for part in journal.parts] == ["part-0", "part-1"]


def test_a_line_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"seed": 0})
    journal.start()
    for name in ("a", "b"):
        journal.add(Part(name, name, {"loss": 0.1}))
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
        [*command, "--samples", "8", "--length", "64", "--device", "cpu"], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(list(out.parent.glob(f".{out.name}.partial-{process.pid}/part-*"))) < blocks:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in stderr
    assert not out.exists()
    return stderr


def test_a_run_that_is_killed_again_and_again(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", num_hidden_layers=30)
    run(model, tmp_path / "whole", text)
    dice = random.Random(0)
    for number, blocks in ((signal.SIGKILL, 3), (signal.SIGTERM, 10)):
        said = killed(model, tmp_path / "out", text, number, blocks, dice.uniform(0, 0.1))
        assert (b"--resume goes on from there" in said) == (number != signal.SIGKILL)
        (left,) = tmp_path.glob(".out*")
        assert not any(re.fullmatch(r"(model|config).*", path.name) for path in left.iterdir())
    run(model, tmp_path / "out", text, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_that_ends_before_its_first_block_leaves_nothing(
    deep: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "Stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(deep, tmp_path / "out", text)
    assert not list(tmp_path.iterdir())
