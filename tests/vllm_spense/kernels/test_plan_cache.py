"""The cache of what searches found: kept, shared, and never trusted blindly."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vllm_spense.kernels.jit import sources
from vllm_spense.kernels.tuning import plan_cache
from vllm_spense.kernels.tuning.plan_cache import environment, folder, load_or_find, load_or_make_bytes

KEY = {"path": "test", "gpu": "one", "tokens": 16}


@dataclass(frozen=True)
class Found:
    algorithm: str
    parts: int


FOUND = Found("fast", 3)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> Found:
    pytest.fail("searched again")


def test_a_result_is_found_once(cache: Path) -> None:
    assert load_or_find(KEY, Found, lambda: FOUND) == FOUND
    assert load_or_find(KEY, Found, never) == FOUND
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == {"key": KEY, "found": {"algorithm": "fast", "parts": 3}}


def test_every_part_of_the_key_counts(cache: Path) -> None:
    for part, other in (("gpu", "two"), ("tokens", 32), ("path", "else")):
        found = Found(part, 1)
        load_or_find(KEY, Found, lambda: FOUND)
        assert load_or_find(KEY | {part: other}, Found, lambda found=found: found) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"key": null}',
        json.dumps({"key": KEY | {"gpu": "two"}, "found": {"algorithm": "foreign", "parts": 1}}),
        json.dumps({"key": KEY, "found": {"algorithm": "older version"}}),
        "\udcff",
    ],
    ids=["empty", "cut off", "no object", "no result", "foreign", "other fields", "not text"],
)
def test_a_bad_file_is_replaced_with_a_warning(cache: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    load_or_find(KEY, Found, lambda: Found("old", 1))
    (file,) = cache.iterdir()
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert load_or_find(KEY, Found, lambda: FOUND) == FOUND
    assert str(file) in caplog.text
    assert load_or_find(KEY, Found, never) == FOUND


def test_a_folder_that_cannot_be_written_costs_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    assert load_or_find(KEY, Found, lambda: FOUND) == FOUND
    assert "cannot keep" in caplog.text


def no_bytes() -> bytes:
    pytest.fail("made again")


def test_bytes_are_made_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_or_make_bytes("code", lambda: b"machine code") == b"machine code"
    assert load_or_make_bytes("code", no_bytes) == b"machine code"
    assert not caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut off", "changed", "a folder"])
def test_damaged_bytes_are_replaced_with_a_warning(cache: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    load_or_make_bytes("code", lambda: b"machine code")
    file = cache / "code"
    good = file.read_bytes()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"empty": b"", "cut off": good[:-1], "changed": good[:-1] + b"?"}[damage])
    assert load_or_make_bytes("code", lambda: b"machine code") == b"machine code"
    assert str(file) in caplog.text
    if damage != "a folder":
        assert load_or_make_bytes("code", no_bytes) == b"machine code"


def test_a_failed_search_leaves_nothing(cache: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        load_or_find(KEY, Found, lambda: Found("", 1 // 0))
    assert not cache.exists()


def _write_many(cache: Path, number: int) -> None:
    for i in range(50):
        load_or_find(KEY | {"tokens": i}, Found, lambda i=i: Found(f"process {number}", i))


def test_processes_write_at_once(cache: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_write_many, args=(cache, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(cache.glob("*.json"))) == len(list(cache.iterdir())) == 50
    for i in range(50):
        assert load_or_find(KEY | {"tokens": i}, Found, never).parts == i


def test_the_folder_follows_the_users_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder() == tmp_path / "cache"
    monkeypatch.delenv("SPENSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "spense"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path.home() / ".cache" / "spense"


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_a_folder_of_ones_own_making_is_used(cache: Path, umask: int, caplog: pytest.LogCaptureFixture) -> None:
    before = os.umask(umask)
    try:
        load_or_find(KEY, Found, lambda: FOUND)
    finally:
        os.umask(before)
    assert load_or_find(KEY, Found, never) == FOUND
    assert not caplog.text


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777], ids=oct)
def test_a_folder_that_others_can_write_is_not_used(cache: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    load_or_find(KEY, Found, lambda: FOUND)
    load_or_make_bytes("code", lambda: b"machine code")
    before = {file: file.read_bytes() for file in cache.iterdir()}
    cache.chmod(mode)
    plan_cache._warn_of_folder.cache_clear()
    for _ in range(2):
        assert load_or_find(KEY, Found, lambda: Found("new", 1)) == Found("new", 1)
        assert load_or_make_bytes("code", lambda: b"new code") == b"new code"
    assert {file: file.read_bytes() for file in cache.iterdir()} == before
    assert caplog.text.count("works without its cache") == caplog.text.count(str(cache)) == 1
    cache.chmod(0o755)
    assert load_or_find(KEY, Found, never) == FOUND


def test_a_folder_of_another_user_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_or_find(KEY, Found, lambda: FOUND)
    user = os.geteuid() or 65534  # root may write what it likes, and everybody may use what is root's
    if os.geteuid() == 0:
        os.chown(cache, user, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert load_or_find(KEY, Found, lambda: Found("new", 1)) == Found("new", 1)
    assert f"belongs to the user with the number {user}" in caplog.text


@pytest.mark.parametrize("mode", [0o664, 0o646], ids=oct)
def test_a_file_that_others_can_write_is_replaced(cache: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    load_or_make_bytes("code", lambda: b"machine code")
    (cache / "code").chmod(mode)
    assert load_or_make_bytes("code", lambda: b"new code") == b"new code"
    assert f"others may write into it (mode {mode:o})" in caplog.text
    assert load_or_make_bytes("code", no_bytes) == b"new code"


def test_plans_depend_on_every_source_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """schedule.py decides as much as the kernel that it schedules."""
    texts = dict(sources._sources())
    names = {Path(name).name for name in texts}
    assert {"one_launch.cu", "one_launch.cuh", "ptx.cuh", "one_launch.py", "schedule.py", "library.py"} <= names
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(plan_cache, "_driver", lambda: "1")

    def key() -> str:
        sources.code_digest.cache_clear()
        return environment.__wrapped__(None)["code"]

    keys = {key()}
    for name in texts:
        monkeypatch.setattr(sources, "_sources", lambda name=name: texts | {name: texts[name] + " "})
        keys.add(key())
    sources.code_digest.cache_clear()
    assert len(keys) == 1 + len(texts)
