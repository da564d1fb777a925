"""Targets of make are timed, and must succeed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.first_run import seconds_of


def test_a_target_is_timed(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("demo:\n\t@sleep 0.3; echo $(PYTHON) > made\n")
    assert 0.3 <= seconds_of("demo", tmp_path) < 30
    assert "python" in (tmp_path / "made").read_text()


def test_one_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("demo:\n\t@exit 3\n")
    with pytest.raises(SystemExit, match="make demo ended with code 2"):
        seconds_of("demo", tmp_path)
