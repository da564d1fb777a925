"""What commands say while they work."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from offline_prune.terminal import progress_of


def lines(monkeypatch: pytest.MonkeyPatch, total: int, *pieces: tuple[int, float]) -> list[str]:
    """Of a log, for pieces that end at so many seconds."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    file = io.StringIO()
    with progress_of(Console(file=file, width=200), shown=True) as progress:
        for done, seconds in pieces:
            now = seconds
            progress(done, total, f"b{done}")
    return file.getvalue().splitlines()


def test_the_time_left_is_at_the_pace_of_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is written for 100 s before the first block; blocks take 5 s."""
    said = lines(monkeypatch, 30, *((done, 100 + 5 * done) for done in range(1, 31)))
    assert said[0] == "pruned b3, 3 of 30 blocks, after 0:01:55, about 0:02:15 left"
    assert said[-2:] == [
        "pruned b27, 27 of 30 blocks, after 0:03:55, about 0:00:15 left",
        "pruned b30, 30 of 30 blocks, after 0:04:10",
    ]


def test_what_an_earlier_run_did_is_not_in_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines(monkeypatch, 100, *((done, 10.0 * (done - 80)) for done in range(81, 91)))
    assert said == ["pruned b90, 90 of 100 blocks, after 0:01:40, about 0:01:40 left"]


def test_of_one_piece_there_is_no_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, 2, (1, 60.0), (2, 65.0)) == [
        "pruned b1, 1 of 2 blocks, after 0:01:00",
        "pruned b2, 2 of 2 blocks, after 0:01:05",
    ]
