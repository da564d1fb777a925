"""What all tables of results have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
#: As `benchmarks.envelope` writes it.
Result = Mapping[str, Any]


def markdown(headings: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def source(result: Result) -> str:
    """One sentence: where the numbers come from."""
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("vllm", "torch") if name in result["versions"]
    )
    gpu = result["gpu"]["name"] if result["gpu"] else result["cpu"]
    # Some rows may be an earlier run's.
    commits = dict.fromkeys([result["commit"], *(row["commit"] for row in result["rows"] if "commit" in row)])
    return f"{gpu}, {versions}, commit {', '.join(map(str, commits))}: `{result['command']}`."
