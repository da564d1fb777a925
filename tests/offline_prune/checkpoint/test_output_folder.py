"""OUT: who may write there, and what may be replaced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import ANNOTATED, RUN, TENSORS, contents, unfinished, write

from offline_prune.checkpoint import output_folder, writer
from offline_prune.checkpoint.journal import Journal
from offline_prune.checkpoint.output_folder import PARTIAL, RECORD, OutputFolder, require_apart, written_files
from offline_prune.checkpoint.writer import CheckpointWriter
from vllm_spense.errors import SpenseError
from vllm_spense.format import PERMUTATION


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, False, False) as folder, CheckpointWriter(folder, RUN, print) as writer:
        for name, tensors in TENSORS.items():
            writer.add(name, tensors)
        for options in ((False, False), (True, False), (False, True), (True, True)):
            with pytest.raises(SpenseError, match=rf"out: another run is writing there \(process {os.getpid()} on"):
                OutputFolder(out, *options).__enter__()
        with writer.file("config.json") as path:
            path.write_text(ANNOTATED)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", RECORD]


def test_overwrite_refuses_a_card_that_others_wrote_before_any_work(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    with pytest.raises(SpenseError, match=r"README.md: found one that Spense did not write; move it away"):
        OutputFolder(tmp_path / "out", True, False).__enter__()
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_a_run_of_another_process_is_refused_whatever_its_process_id(tmp_path: Path) -> None:
    """The lock belongs to the kernel: it holds where the holder has a process id of another namespace, or none here."""
    code = """
import sys, time
from pathlib import Path
from offline_prune.checkpoint.output_folder import OutputFolder

with OutputFolder(Path(sys.argv[1]), False, False) as folder:
    (folder.partial / "lock").write_text("process 1 on another")
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(SpenseError, match="another run is writing there"):
            write(tmp_path / "out", overwrite=True, resume=True)
        process.kill()
    write(tmp_path / "out")
    assert (tmp_path / "out/config.json").exists()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(output_folder.fcntl, "flock", unsupported)
    with pytest.raises(SpenseError, match="does not lock files: Function not implemented"):
        write(tmp_path / "out")


def test_a_lock_that_was_removed_while_it_was_opened_keeps_nobody_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = output_folder.fcntl.flock, []

    def late(lock: int, how: int) -> None:
        if not calls:
            shutil.rmtree(tmp_path / "out")
        calls.append(lock)
        real(lock, how)

    monkeypatch.setattr(output_folder.fcntl, "flock", late)
    with OutputFolder(tmp_path / "out", False, False):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(SpenseError, match="another run"):
            write(tmp_path / "out")


@pytest.mark.parametrize("kind", ["dot", "empty", "link", "dangling", "below", "lost+found", "parent not writable"])
def test_every_kind_of_out_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, out = tmp_path / "target", tmp_path / "target"
    if kind not in ("dangling", "below"):
        target.mkdir()
    if kind == "dot":
        monkeypatch.chdir(target)
        out = Path(".")
    elif kind in ("link", "dangling"):
        out = tmp_path / "link"
        out.symlink_to(target)
    elif kind == "below":
        out = target = tmp_path / "new/newer/target"
    elif kind == "lost+found":
        (target / "lost+found").mkdir()
    elif kind == "parent not writable":
        tmp_path.chmod(0o555)
    inode = target.stat().st_ino if target.exists() else None
    try:
        unfinished(out)
        write(out, resume=True)
    finally:
        tmp_path.chmod(0o755)
    assert (target / "model.safetensors").exists()
    assert inode in (None, target.stat().st_ino), "a mount point cannot be another folder"
    assert out.is_symlink() == (kind in ("link", "dangling"))
    assert not (target / PARTIAL).exists()


def test_only_what_spense_wrote_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, seed=1)
    (out / "diary.txt").write_text("dear")
    (out / "old.jinja").write_text("")
    names = ["model.safetensors", PERMUTATION, "config.json", "1_Pooling/config.json", RECORD]
    assert written_files(out) == names
    with pytest.raises(SpenseError, match="not empty; --overwrite replaces a Spense checkpoint"):
        write(out)
    write(out, overwrite=True)
    assert (out / "diary.txt").read_text() == "dear"
    assert torch.equal(load_file(out / "model.safetensors")["ü"], TENSORS["c"]["ü"])


def test_what_the_new_checkpoint_does_not_have_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 10)
    write(out, seed=1)
    monkeypatch.undo()
    write(out, overwrite=True)
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]


def test_a_checkpoint_without_record_can_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, seed=1)
    (out / RECORD).unlink()
    (out / "diary.txt").write_text("dear")
    write(out, overwrite=True)
    assert torch.equal(load_file(out / "model.safetensors")["ü"], TENSORS["c"]["ü"])
    assert (out / "diary.txt").exists()


@pytest.mark.parametrize("config", [None, "{}", '{"quantization_config": {"quant_method": "fp8"}}', "not JSON"])
def test_nothing_else_is_replaced(config: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("weights")
    if config:
        (out / "config.json").write_text(config)
    before = contents(out)
    for resume in (False, True):
        with pytest.raises(SpenseError, match="holds no Spense checkpoint"):
            write(out, overwrite=True, resume=resume)
    assert contents(out) == before
    assert not (out / PARTIAL).exists()


def test_a_record_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    (out / RECORD).unlink()
    shards = {"a": "../precious", "b": "/etc/passwd", "c": 3, "d": "model-1.safetensors"}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = written_files(out)
    assert found
    assert "model-1.safetensors" in found
    assert not {"../precious", "/etc/passwd", 3} & set(found)


def test_files_put_into_out_meanwhile_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    unfinished(out)
    (out / "diary.txt").write_text("dear")
    (out / "model.safetensors").write_text("theirs")
    with pytest.raises(SpenseError, match="not empty"):
        write(out, resume=True)
    (out / "model.safetensors").unlink()
    writes = writer.OutputFolder.publish

    def meanwhile(*arguments: Any) -> None:
        (out / "model.safetensors").write_text("theirs")
        writes(*arguments)

    monkeypatch.setattr(OutputFolder, "publish", meanwhile)
    with pytest.raises(SpenseError, match=r"model\.safetensors: is there"):
        write(out, resume=True)
    monkeypatch.undo()
    assert (out / "model.safetensors").read_text() == "theirs"
    (out / "model.safetensors").unlink()
    write(out, resume=True)
    assert (out / "diary.txt").read_text() == "dear"
    assert load_file(out / "model.safetensors")


def test_a_finished_run_that_is_resumed_has_nothing_to_do(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = contents(tmp_path / "out")
    write(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == before
    with pytest.raises(SpenseError, match="seed: found 0, expected 1"):
        write(tmp_path / "out", resume=True, seed=1)
    assert contents(tmp_path / "out") == before


def test_an_unfinished_run_is_neither_lost_nor_taken_for_a_new_one(tmp_path: Path) -> None:
    unfinished(tmp_path / "out")
    with pytest.raises(SpenseError, match=r"unfinished run \(3 parts done\); --resume goes on"):
        write(tmp_path / "out")
    with pytest.raises(SpenseError, match="seed: found 0, expected 1"):
        write(tmp_path / "out", resume=True, seed=1)
    assert Journal.read(tmp_path / "out" / PARTIAL)
    write(tmp_path / "out", overwrite=True, seed=1)
    assert load_file(tmp_path / "out/model.safetensors")["ü"].tolist() == [1, 2, 3]


def test_a_run_that_was_to_replace_a_checkpoint_is_resumed_without_saying_so_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, seed=1)
    unfinished(out, overwrite=True)
    write(out, resume=True)
    assert load_file(out / "model.safetensors")["ü"].tolist() == [0, 1, 2]
    # Only that one: here the checkpoint came after the run had begun.
    unfinished(tmp_path / "other")
    for file in out.iterdir():
        (tmp_path / "other" / file.name).symlink_to(file)
    with pytest.raises(SpenseError, match="not empty"):
        write(tmp_path / "other", resume=True)


def test_nothing_stays_of_a_run_that_finished_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new/out"
    with OutputFolder(out, False, False):
        assert (out / PARTIAL).exists()
    assert not list(tmp_path.iterdir())


def test_model_and_out_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    for out in (model, tmp_path, model / "sub", model / "new/er", tmp_path / "link", Path("."), tmp_path / "link/new"):
        for name in (model, tmp_path / "link"):
            with pytest.raises(SpenseError, match=r"OUT is .* and MODEL .*: expected folders"):
                require_apart(name, out, "MODEL")
    require_apart(model, tmp_path / "model2", "MODEL")
    require_apart(model, tmp_path / "other/model", "MODEL")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/weights").write_text("")
    (model / "model.safetensors").symlink_to(tmp_path / "other/weights")
    with pytest.raises(SpenseError, match=r"model.safetensors: a link into OUT"):
        require_apart(model, tmp_path / "other", "MODEL")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpenseError, match="file: found a file, expected a folder or nothing"):
        write(tmp_path / "file")
    with pytest.raises(SpenseError, match="cannot be written: Not a directory"):
        write(tmp_path / "file/out")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SpenseError, match=r"loop.*cannot be written"):
        write(tmp_path / "loop")
    if os.getuid():
        (tmp_path / "readonly").mkdir(mode=0o555)
        with pytest.raises(SpenseError, match=r"readonly.*cannot be written: Permission denied"):
            write(tmp_path / "readonly")
