"""The zero-shot benchmark: its own questions, and lm-evaluation-harness on a tiny model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny_models import tiny_model

from benchmarks import zero_shot
from vllm_spense.errors import SpenseError

TEXTS = ["".join(f"{number} {word}, " for word in range(200)) for number in range(40)]


def test_the_right_answer_is_what_follows_and_the_others_come_later() -> None:
    found = zero_shot.questions(["too short", *TEXTS], 30)
    assert len(found) == 30
    for question, text in zip(found, TEXTS, strict=False):
        right = question["choices"][question["label"]]
        assert text.startswith(question["text"] + right)
        assert len(set(question["choices"])) == 4
        assert all(text.index(other) > len(question["text"]) for other in question["choices"] if other != right)
    # A model that always says the same is right as often as chance.
    assert max(Counter(question["label"] for question in found).values()) < 15
    assert zero_shot.questions(TEXTS, 30) == zero_shot.questions(TEXTS, 30)


def test_texts_that_are_too_short_are_an_error() -> None:
    with pytest.raises(SpenseError, match="no text of at least 480 characters"):
        zero_shot.questions(["short"], 5)


def test_without_the_harness_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(sys, "argv", ["zero_shot", "folder"])
    with pytest.raises(SystemExit, match="pip install 'lm-eval"):
        zero_shot.main()


def test_an_unknown_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["zero_shot", "folder", "--tasks", "continuation", "arc_hard"])
    with pytest.raises(SpenseError, match="found arc_hard, which"):
        zero_shot.main()


def test_a_server_runs_one_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["zero_shot", "a", "b", "--url", "http://localhost:8000/v1"])
    with pytest.raises(SystemExit):
        zero_shot.parse()
    assert "found 2 models" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(SpenseError, match=r"--url http://127\.0\.0\.1:9/v1: Connection error"):
        zero_shot.served_name("http://127.0.0.1:9/v1")


def test_a_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tiny_model("llama", tmp_path / "model"), tmp_path / "out.json"
    monkeypatch.setattr(zero_shot, "documents", lambda domain: iter(TEXTS))
    arguments = [str(folder), "--tasks", "continuation", "--questions", "4", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["zero_shot", *arguments])
    zero_shot.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["task"] for row in rows] == [f"continuation_{text}" for text in ("docstrings", "reference", "code")]
    assert all(row["metric"] == "acc" and 0 <= row["value"] <= 1 and row["questions"] == 4 for row in rows)
