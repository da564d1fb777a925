"""Runs cut off at any change of the file system, full disks, damaged journals and parts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_run import TENSORS, contents, unfinished, write

from offline_prune.checkpoint import writer
from offline_prune.checkpoint.journal import FILE, Journal
from offline_prune.checkpoint.merge import merge
from offline_prune.checkpoint.output_folder import PARTIAL, RECORD
from offline_prune.runtime.activation_store import Place, allocate
from vllm_spense.errors import SpenseError


@pytest.fixture(params=["one file", "shards"])
def sharding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "shards":
        monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 10)
    return request.param


def test_merged_parts_are_what_safetensors_writes(tmp_path: Path) -> None:
    for name, tensors in TENSORS.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    together = {key: tensor for tensors in TENSORS.values() for key, tensor in tensors.items()}
    save_file(together, tmp_path / "expected", metadata={"format": "pt"})
    merge([tmp_path / name for name in TENSORS], tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "whole"]


def test_merging_needs_room_for_one_part_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0

    def watched(descriptor: int) -> None:
        nonlocal most
        real(descriptor)
        most = max(most, sum(512 * path.stat().st_blocks for path in tmp_path.iterdir()))

    real = os.fsync
    parts = [tmp_path / str(number) for number in range(8)]
    for part in parts:
        save_file({part.name: torch.ones(1 << 20, dtype=torch.uint8)}, part)
    monkeypatch.setattr(os, "fsync", watched)
    merge(parts, tmp_path / "whole")
    assert 8 << 20 <= most <= (9 << 20) + (1 << 17)


def forked(work: Callable[[], object], at: int, kill: bool) -> int:
    """The exit status of a child that is killed, or interrupted, before its at-th change of the file system."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status, done = 3, 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"):
            done += 1
            if done == at:
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt

    try:
        sys.addaudithook(hook)
        work()
        status = 0
    except KeyboardInterrupt:
        status = 2
    finally:
        os._exit(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kill", [True, False], ids=["kill", "interrupt"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over another"])
def test_a_run_cut_off_at_any_change_ends_the_same(sharding: str, overwrite: bool, kill: bool, tmp_path: Path) -> None:
    """From the first folder that is made to the lock that is given back."""

    def before(out: Path) -> None:
        if overwrite:
            write(out, seed=1)
            (out / "diary.txt").write_text("dear")

    whole = tmp_path / "whole"
    before(whole)
    write(whole, overwrite)
    expected = contents(whole)
    new = {name: data for name, data in expected.items() if name != RECORD}
    assert ("model.safetensors" in expected) == (sharding == "one file")
    assert ("diary.txt" in expected) == overwrite
    for at in range(1, 200):
        out = tmp_path / str(at)
        before(out)
        old = contents(out)
        status = forked(partial(write, out, overwrite), at, kill)
        if status == 0:
            break
        assert status == (-signal.SIGKILL if kill else 2)
        found = {name: data for name, data in contents(out).items() if not name.startswith(PARTIAL)}
        if "config.json" in found:
            assert found == old or found.items() >= new.items(), "a mixture that may be taken for a checkpoint"
        journal = Journal.read(out / PARTIAL)
        assert not overwrite or journal or (out / "config.json").exists(), "neither the old nor the new checkpoint"
        # What the run was allowed to replace is on record once it has begun.
        anew = overwrite and not (journal and journal.begun)
        write(out, overwrite=anew, resume=not anew)
        assert contents(out) == expected, at
        shutil.rmtree(out)
    assert at > 25


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_damage_to_the_journal_is_said_and_made_good(at: int, tmp_path: Path) -> None:
    write(tmp_path / "whole")
    unfinished(tmp_path / "out")
    journal = tmp_path / "out" / PARTIAL / FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    changed = lines[at].replace(b"seed", b"sead").replace(b"0.1", b"0.7")
    for damaged in (changed, b"\xff\xfe\n", b"[]\n", b"{}\n", lines[at][:9] + b"\n"):
        journal.write_bytes(b"".join([*lines[:at], damaged, *lines[at + 1 :]]))
        if at == 0:
            with pytest.raises(SpenseError, match=r"journal.jsonl: line 1 is damaged, and no run can go on from it"):
                write(tmp_path / "out", resume=True)
            continue
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        said = write(tmp_path / "copy", resume=True)
        assert f"line {at + 1} is damaged; {at - 1} parts before it are kept" in said[0]
        model = "model.safetensors"
        assert (tmp_path / "copy" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
        shutil.rmtree(tmp_path / "copy")
    write(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("file", ["part-1", "permutations-1"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "one bit"])
def test_damage_to_a_part_is_said_and_made_good(damage: str, file: str, tmp_path: Path) -> None:
    write(tmp_path / "whole")
    unfinished(tmp_path / "out")
    part = tmp_path / "out" / PARTIAL / file
    whole = part.read_bytes()
    part.unlink()
    if damage != "missing":
        changed = {"truncated": whole[:-1], "garbage": b"\xff" * 99, "one bit": whole[:-1] + bytes([whole[-1] ^ 1])}
        part.write_bytes(changed[damage])
    said = write(tmp_path / "out", resume=True)
    assert f"{file}: " in said[0]
    assert "1 parts before it are kept, the others made again" in said[0]
    assert {**contents(tmp_path / "out"), RECORD: b""} == {**contents(tmp_path / "whole"), RECORD: b""}


def test_activations_that_the_disk_has_no_room_for_are_refused(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import torch
from offline_prune.runtime.activation_store import Place, allocate

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
allocate((1 << 20,), torch.float32, torch.device("cpu"), Place.DISK, Path(sys.argv[1]))
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, "a signal nobody can explain"
    assert f"SpenseError: {tmp_path}/activations-0: no room for 0.00 GiB of activations" in result.stderr
    assert not list(tmp_path.iterdir())


def test_activations_on_disk_have_their_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *arguments, **options: None)
    tensor = allocate((3, 1 << 18), torch.float32, torch.device("cpu"), Place.DISK, tmp_path)
    (file,) = tmp_path.iterdir()
    assert 512 * file.stat().st_blocks >= tensor.nbytes == 3 << 20
    tensor[2, -1] = 5.0
    assert file.read_bytes()[-4:] == torch.tensor(5.0).numpy().tobytes()
