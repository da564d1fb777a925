"""Rows of calibration data: each is read once, named as it stands in its file, and costs no memory before its turn."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offline_prune.calibration.rows import shuffled_rows
from vllm_spense.errors import SpenseError


def rows(source: object, seed: int = 0, length: int = 1) -> list[Any]:
    return [row for _, row in shuffled_rows(str(source), seed, length)]


def passages(path: Path, length: int = 1) -> list[str]:
    """Of a text file, as they stand in it."""
    found = shuffled_rows(str(path), 0, length)
    return [text for _, text in sorted(found, key=lambda row: int(row[0].split(" bytes ")[1].split()[0]))]


def test_rows_are_named_as_they_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(i) for i in range(50)))
    found = dict(shuffled_rows(str(path), 3, 1))
    assert found == {f"{path}, line {2 * i + 1}": i for i in range(50)}
    assert list(found.values()) != sorted(found.values())


def test_the_order_is_that_of_shuffling_a_list(tmp_path: Path) -> None:
    """So that benchmarks draw the text that they drew before."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(str, range(10))))
    assert rows(path) == [7, 8, 1, 5, 3, 4, 2, 0, 9, 6]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_separators_of_unicode_do_not_end_a_line(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a{separator}b"}}\n{{"text": "c"}}', encoding="utf-8")
    assert sorted(row["text"] for row in rows(path)) == [f"a{separator}b", "c"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert sorted(row["text"] for row in rows(tmp_path / "rows.jsonl")) == ["a", "b"]
    assert rows(tmp_path / "text.txt") == ["one\ntwo\n"]


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep er/.cache").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text("1\n2\n3")
    (tmp_path / "deep er/b.JSONL").write_text("4")
    (tmp_path / "deep er/c.txt").write_text("five")
    (tmp_path / "deep er/.cache/d.jsonl").write_text("6")
    (tmp_path / "README.md").write_text("seven")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["8"]}), tmp_path / "e.parquet")
    found = dict(shuffled_rows(str(tmp_path), 0, 1))
    assert found == {
        **{f"{tmp_path}/a.jsonl, line {i}": i for i in (1, 2, 3)},
        f"{tmp_path}/deep er/b.JSONL, line 1": 4,
        f"{tmp_path}/deep er/c.txt, bytes 0 to 4": "five",
        f"{tmp_path}/e.parquet, row 1": {"text": "8"},
    }
    (tmp_path / "a.jsonl").write_text("1\n2\nx")
    with pytest.raises(SpenseError, match=r"a\.jsonl, line 3: not valid JSON"):
        rows(tmp_path)


def test_nested_parquet(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"hi {i}"}]} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "t.parquet")
    found = dict(shuffled_rows(str(tmp_path / "t.parquet"), 0, 1))
    assert found == {f"{tmp_path}/t.parquet, row {i + 1}": chat for i, chat in enumerate(chats)}


def test_passages_come_from_all_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n" for i in range(20_000)))
    orders = [rows(path, seed) for seed in (0, 1)]
    assert orders[0] != orders[1]
    for order in orders:
        assert all(text.endswith("\n") and text.startswith("line ") for text in order)
        first = [int(text.split()[1]) for text in order[:16]]
        assert min(first) < 5_000 < 15_000 < max(first)


def test_a_passage_is_about_as_long_as_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 100_000)
    assert {round(len(text) / 16384, 1) for text in passages(path, 4096)[:-1]} == {1.0}
    assert {round(len(text) / 2048, 1) for text in passages(path, 8)[:-1]} == {1.0}


@given(
    st.lists(st.sampled_from(["a", "ß", "語", "😀", " ", "\n", "\r\n"]), min_size=1, max_size=12), st.integers(1, 3000)
)
def test_passages_are_the_whole_text(tmp_path_factory: pytest.TempPathFactory, pieces: list[str], count: int) -> None:
    text = "".join(pieces) * count
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    assert "".join(passages(path)) == text.replace("\r\n", "\n")


def test_a_long_text_costs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("All work and no play makes a dull day.\n" * (2**25 // 39))
    tracemalloc.start()
    try:
        drawn = shuffled_rows(str(path), 0, 2048)
        assert len("".join(next(drawn)[1] for _ in range(16))) > 100_000
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b'{"text": "a"}\n\n{"text"', r"bad\.jsonl, line 3: not valid JSON"),
        ("deep.jsonl", b"1\n" + b"[" * 100_000, r"deep\.jsonl, line 2: not valid JSON: nested too deep"),
        ("long.jsonl", b"1" * 5000, r"long\.jsonl, line 1: not valid JSON"),
        ("latin.jsonl", b'"a"\n"\xe9"', r"latin\.jsonl, line 2: not UTF-8 text: .*0xe9"),
        ("latin.txt", b"one\ntwo\n\xe9t\xe9", r"latin\.txt, line 3: not UTF-8 text: .*0xe9"),
        ("late.txt", b"line of 16 bytes\n" * 70_000 + b"\xe6\x97", r"late\.txt, line 70001: not UTF-8 text: .*0xe6"),
        ("split.txt", b"\n" + b"a" * (2**20 - 2) + b"\xe6\n", r"split\.txt, line 2: not UTF-8 text: .*0xe6"),
        ("utf16.txt", "one".encode("utf-16"), r"utf16\.txt, line 1: not UTF-8"),
        ("short.parquet", b"PAR2", r"short\.parquet: not a parquet file"),
        ("empty.parquet", b"", r"empty\.parquet: not a parquet file"),
        ("rows.jsonl.gz", b"\x1f\x8b", r"found a \.gz file, expected \.jsonl, \.txt, \.parquet"),
        ("text.docx", b"abc", r"found a \.docx file"),
        ("nameless", b"abc", r"found a nameless file"),
    ],
)
def test_damaged_files_are_explained(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpenseError, match=words):
        rows(tmp_path / name)


def test_every_damage_to_a_parquet_file_is_explained_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i * i}" for i in range(500)]}), path)
    good = path.read_bytes()
    refused: list[str] = []
    for place in range(4, len(good), 37):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            rows(path)
        except SpenseError as error:
            refused.append(str(error))
    assert refused
    assert all(words.startswith(str(path)) for words in refused)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(SpenseError, match="not a parquet file"):
        rows(path)


def test_what_is_no_file_is_explained(tmp_path: Path) -> None:
    for source, words in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "file.txt/none.jsonl", "no such file"),
        (tmp_path / "pipe.txt", "something that is no file"),
        (tmp_path / "empty", "found no .jsonl, .txt, .parquet file in this folder"),
        (" ", "--calibration: found nothing"),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "file.txt").write_text("a")
        if not (tmp_path / "pipe.txt").exists():
            os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(SpenseError, match=words):
            rows(source)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet"])
def test_a_file_that_may_not_be_read_is_explained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_text("1")
    path.chmod(0)
    if os.access(path, os.R_OK):  # The superuser may.
        monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        monkeypatch.setattr("pyarrow.parquet.read_table", Path.open)
    with pytest.raises(SpenseError, match=rf"{name}: cannot be read: Permission denied"):
        rows(path)


def test_rows_of_a_data_set_are_read_when_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Data:
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, str]:
            read.append(index)
            return {"text": str(index)}

    monkeypatch.setattr("datasets.load_dataset", lambda name, split: Data())
    drawn = shuffled_rows("some/data", 0, 1)
    for _ in range(3):
        where, row = next(drawn)
        assert where == f"some/data, row {int(row['text']) + 1}"
    assert len(read) == 3


@pytest.mark.parametrize(
    "source",
    [
        *("none.txt", "NONE.JSONL", "some/none.parquet", "none.json", "folder/none.csv.gz"),
        *("./none", "../none", "/none", "~/none", "~none.txt", "a/b/none"),
    ],
)
def test_what_is_plainly_a_path_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(SpenseError, match=f"^{re.escape(str(Path(source)))}: no such file or folder$"):
        rows(source)


@pytest.mark.parametrize("source", ["wikitext", "some/data", "some/data-1.1", "some/data.text_2", "some/data.json"])
def test_what_may_be_a_data_set_is(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [{"text": name}])
    assert rows(source) == [{"text": source}]


@pytest.mark.parametrize(
    "error",
    [ValueError(""), RuntimeError("Dataset scripts are no longer supported"), ConnectionError("no route\nat all")],
)
def test_a_data_set_that_cannot_be_loaded_is_explained(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[Any]:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    reason = (str(error) or "ValueError").splitlines()[0]
    with pytest.raises(SpenseError, match=rf"some/data: .*{reason}\n.*--calibration builtin"):
        rows("some/data")
