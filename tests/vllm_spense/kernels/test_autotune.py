"""Candidates for one GEMM: measured together, once, and again when one of them is another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from vllm_spense.format import Regions
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.tuning import autotune

PROBLEM = Problem(128, 64, Regions(96, 32), "output")
CPU = torch.device("cpu")
FOUND: dict[str, object] = {"library": {"sparse": 3}, "one-launch": {"parts": 2}}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates took turns, each time; the first takes 10 µs, the next 11, and so on."""
    counts: list[int] = []

    def medians_us(calls: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
        counts.append(len(calls))
        return [10.0 + place for place, _ in enumerate(calls)]

    monkeypatch.setenv("SPENSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "environment", lambda _: {"gpu": "one"})
    monkeypatch.setattr(autotune, "medians_us", medians_us)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return counts


def times(found: dict[str, object] = FOUND, problem: Problem = PROBLEM, tokens: int = 128) -> dict[str, float]:
    return autotune.times(problem, tokens, CPU, found, lambda: {name: [lambda: None] for name in FOUND})


def test_candidates_are_measured_together_and_once(measured: list[int]) -> None:
    for _ in range(2):
        assert times() == {"library": 10.0, "one-launch": 11.0}
    assert measured == [2]


def test_whatever_is_another_is_measured_again(measured: list[int]) -> None:
    times()
    times(found=FOUND | {"one-launch": {"parts": 3}})
    times(tokens=256)
    times(problem=Problem(128, 64, Regions(64, 64), "output"))
    assert measured == [2] * 4


@pytest.mark.parametrize("damaged", [5, None, {"library": "fast", "one-launch": 11.0}, []], ids=str)
def test_a_damaged_file_is_measured_again(
    damaged: object, measured: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times()
    (file,) = tmp_path.glob("*.json")
    entry = json.loads(file.read_text())
    file.write_text(json.dumps(entry | {"found": {"us": damaged}}))
    assert times() == {"library": 10.0, "one-launch": 11.0}
    assert measured == [2, 2]
    assert "are no times by name" in caplog.text
    assert json.loads(file.read_text()) == entry


@pytest.mark.parametrize("kept", [{"library": 10.0}, {}, {"library": 10.0, "one-launch": 11.0, "dense": 1.0}], ids=str)
def test_a_file_of_other_candidates_is_measured_again(
    kept: dict[str, float], measured: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times()
    (file,) = tmp_path.glob("*.json")
    entry = json.loads(file.read_text())
    file.write_text(json.dumps(entry | {"found": {"us": kept}}))
    assert times() == {"library": 10.0, "one-launch": 11.0}
    assert measured == [2, 2]
    assert "expected of ['library', 'one-launch']" in caplog.text
    assert json.loads(file.read_text()) == entry


def test_nothing_is_measured_while_a_graph_is_captured(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a GEMM of 128 tokens was captured before it ran once: Problem"):
        times()
    assert not measured
