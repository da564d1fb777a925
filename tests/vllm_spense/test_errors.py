"""What other libraries' exceptions are told by."""

from __future__ import annotations

import pytest

from vllm_spense.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (OSError("\n  one\n\ntwo"), "one"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n"), "RuntimeError"),
    ],
)
def test_the_first_line(error: Exception, line: str) -> None:
    """An `assert` without a text, as a model's own code may have one, says nothing."""
    assert first_line(error) == line
