"""Calibration text from every kind of source."""

import ast
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny_models import byte_tokenizer

from offline_prune.calibration import data
from offline_prune.calibration.data import calibration_tokens, check_vocabulary, heldout_tokens
from offline_prune.calibration.heldout import code_files, heldout_documents
from offline_prune.calibration.python_text import LONGEST_CODE, code, installed
from vllm_spense.errors import SpenseError

TOKENIZER = byte_tokenizer()
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def tokens(source: object, samples: int = 2, length: int = 8, seed: int = 0) -> str:
    found = calibration_tokens(str(source), TOKENIZER, samples, length, seed)
    assert found.shape == (samples, length)
    assert found.dtype == torch.int64
    return str(TOKENIZER.decode(found.flatten()))


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("the quick brown fox")
    assert tokens(path) == "the quick brown "


def test_documents_are_separated(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": "abc"}] * 9)
    assert tokens(path) == "abc<eos>" * 4


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["abc"] * 9}), tmp_path / "t.parquet")
    assert tokens(tmp_path / "t.parquet") == "abc<eos>" * 4


def test_the_seed_orders_the_documents(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": f"{i:07d}"} for i in range(40)])
    assert tokens(path, seed=1) == tokens(path, seed=1)
    assert tokens(path, seed=1) != tokens(path, seed=2)


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "<think>\nt\n</think>\n\na"},
            ]
        },
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<think>\nt\n</think>\n\na"}]},
        {"question": "hi", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "a", "solution": "no"},
    ],
)
def test_chats_go_through_the_chat_template(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)
    path = jsonl(tmp_path / "t.jsonl", [row])
    expected = "<user>hi<assistant><think>\nt\n</think>\n\na"
    assert tokens(path, 1, len(expected)) == expected


def test_chats_without_a_template_become_plain_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"question": "hi", "answer": "there"}])
    assert tokens(path, 1, 9) == "hi\n\nthere"


def test_a_hub_data_set_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return [{"text": "abc"}] * 9

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert tokens("simplescaling/s1K-1.1") == "abc<eos>" * 4
    assert asked == [("simplescaling/s1K-1.1", "train")]


def test_an_unreachable_data_set_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[Any]:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SpenseError, match=r"some/data: .*no route\n.*--calibration builtin"):
        tokens("some/data")


def test_builtin_text_is_prose_and_depends_on_the_seed_alone() -> None:
    first = tokens("builtin", 4, 512)
    assert first == tokens("builtin", 4, 512)
    assert first != tokens("builtin", 4, 512, seed=1)
    assert first.count(" the ") > 5


def test_builtin_code_is_code_and_depends_on_the_seed_alone() -> None:
    first = tokens("builtin-code", 4, 512)
    assert first == tokens("builtin-code", 4, 512)
    assert first != tokens("builtin-code", 4, 512, seed=1)
    documents = tokens("builtin-code", 64, 512).split("<eos>")[:-1]
    assert len(documents) > 2
    for text in (each for each in documents if len(each) < LONGEST_CODE):
        assert ast.get_docstring(ast.parse(text)) is None


@pytest.mark.parametrize("source", ["builtin", "builtin-code"])
def test_too_few_packages_are_named_in_one_line(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BUILTIN_PACKAGES", ("safetensors", "no_such_package"))
    monkeypatch.setattr(data, "MORE_BUILTIN_PACKAGES", ())
    packages = "of the packages safetensors, no_such_package: found"
    with pytest.raises(SpenseError, match=rf"^{source}, from safetensors {packages} [1-9]\d+ tokens, .*\Z"):
        tokens(source, 1000, 16384)
    monkeypatch.setattr(data, "BUILTIN_PACKAGES", ("no_such_package",))
    words = f"^{source}, from none of the packages no_such_package: found 0 tokens, expected at least 16 .*\\Z"
    with pytest.raises(SpenseError, match=words):
        tokens(source)


def test_heldout_code_is_not_the_calibration_code() -> None:
    folders = installed((*data.BUILTIN_PACKAGES, *data.MORE_BUILTIN_PACKAGES)).values()
    files = [file.resolve() for file in code_files()]
    assert len(files) > 100
    assert not [file for file in files for folder in folders if file.is_relative_to(folder.resolve())]
    heldout = {text for text in islice(heldout_documents("code"), 100) if len(text) > 100}
    assert len(heldout) > 50
    assert not heldout & set(islice(code(data.BUILTIN_PACKAGES, 0), 100))


def test_heldout_text_is_not_the_calibration_text() -> None:
    assert not set(data.BUILTIN_PACKAGES) & set(data.HELDOUT_PACKAGES)
    heldout = heldout_tokens(TOKENIZER, 4, 512)
    assert heldout.shape == (4, 512)
    sentences = {line for line in str(TOKENIZER.decode(heldout.flatten())).splitlines() if len(line) > 40}
    assert sentences
    assert not sentences & set(tokens("builtin", 64, 512).splitlines())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "found 0 tokens, expected at least 16"),
        ("empty.jsonl", "", "found 0 tokens, expected at least 16"),
        ("blank.jsonl", '{"text": " "}\n{"messages": [{"role": "user", "content": ""}]}', "found 0 tokens"),
        ("short.txt", "abc", "found 4 tokens"),
        ("bad.jsonl", '{"text": "a"}\n{"text"', "bad.jsonl, line 2: not valid JSON"),
        ("odd.jsonl", '{"body": "a"}', "odd.jsonl, line 1: found body; expected a column text, messages"),
        (
            "late.jsonl",
            '{"text": "a"}\n' * 56 + '{"body": "a"}\n' + '{"text": "a"}\n' * 40,
            "late.jsonl, line 57: found body",
        ),
    ],
)
def test_bad_files_are_explained(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SpenseError, match=words):
        tokens(tmp_path / name, samples=2, length=8 if "late" not in name else 4000)


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(SpenseError, match="no such file"):
        tokens(tmp_path / "none.jsonl")


def test_a_long_text_is_drawn_from_all_over_and_not_tokenized_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{i:07d}\n" for i in range(2**17)))
    seen = 0
    whole = type(TOKENIZER).__call__

    def counted(self: Any, text: str, **options: Any) -> Any:
        nonlocal seen
        seen += len(text)
        return whole(self, text, **options)

    monkeypatch.setattr(type(TOKENIZER), "__call__", counted)
    found = tokens(path, 64, 512)
    assert 64 * 512 - 100 <= seen < 64 * 512 + 4096
    numbers = [int(line) for line in found.replace("<eos>", "").split() if len(line) == 7]
    assert min(numbers) < 2**15
    assert max(numbers) > 3 * 2**15
    assert found == tokens(path, 64, 512) != tokens(path, 64, 512, seed=1)


def test_lone_surrogates_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(r'{"text": "\ud83d\ude00 a\ud800b\udc00"}')
    assert tokens(path, 1, 14) == "😀 a\ufffdb\ufffd<eos>"
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)
    path.write_text(r'{"question": "a\ud800", "answer": "b"}')
    assert tokens(path, 1, 22) == "<user>a\ufffd<assistant>b"


def test_refused_chats_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHAT
    monkeypatch.setattr(TOKENIZER, "chat_template", refusing)
    path = jsonl(tmp_path / "t.jsonl", [{"question": q, "answer": "a"} for q in ("yes", "no", "no", "yes")])
    said: list[str] = []
    found = calibration_tokens(str(path), TOKENIZER, 1, 42, 0, said.append)
    assert TOKENIZER.decode(found[0]) == "<user>yes<assistant>a" * 2
    (line,) = said
    assert "the chat template refuses 2 of 4 documents" in line or "refuses 1 of" in line
    assert f"{path}, line " in line
    assert "not this" in line
    with pytest.raises(SpenseError, match=r"found 42 tokens(.|\n)*refuses 2 of 4 documents.*line [23]: not this"):
        tokens(path, 1, 43)
    with pytest.raises(SpenseError, match=r"found 0 tokens(.|\n)*refuses 1 of 1 documents.*line 1: not this"):
        tokens(jsonl(path, [{"question": "no", "answer": "a"}]), 1, 43)


def test_tokens_have_embeddings() -> None:
    check_vocabulary(torch.tensor([[0, 9]]), 10)
    for token in (10, -1):
        with pytest.raises(SpenseError, match=f"found token {token}, expected 0 to 9"):
            check_vocabulary(torch.tensor([[0, token]]), 10)
