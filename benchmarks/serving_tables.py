"""Tables of what works with vLLM: tests on GPUs and on its releases, and a client's day."""

from __future__ import annotations

from benchmarks.tables import Result, markdown, source


def gpu_tests(result: Result) -> list[str]:
    """How the tests ended that need a GPU, and what they recorded."""
    lines = []
    for file in dict.fromkeys(row["file"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["file"] == file]
        counts = [sum(row[ending] for row in mine) for ending in ("passed", "failed", "skipped")]
        recorded = [f"{name}: {value}" for row in mine for name, value in row["recorded"].items()]
        name = f"`{file.rpartition('.')[2]}.py`"
        lines.append([name, *counts, f"{sum(row['seconds'] for row in mine):.0f}", "; ".join(recorded)])
    return [*markdown(["tests", "passed", "failed", "skipped", "s", "recorded"], lines), "", source(result)]


def compat(result: Result) -> list[str]:
    """How the tests ended on each release of vLLM."""
    names = ("torch", "transformers", "compressed-tensors")
    lines = (
        [
            row["version"],
            *(row["versions"][name] for name in names),
            row["passed"],
            len(row["failed"]),
            row["skipped"],
            ", ".join(f"`{name.rpartition('::')[2]}`" for name in row["failed"]),
        ]
        for row in result["rows"]
    )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    headings = ["vLLM", *names, "passed", "failed", "skipped", "which failed"]
    return [*markdown(headings, lines), "", f"{result['cpu']}, commit {commits}: `make compat`."]


def compat_sentence(result: Result) -> list[str]:
    """The README's sentence."""
    passed = [row["version"] for row in result["rows"] if not row["failed"]]
    failed = [row["version"] for row in result["rows"] if row["failed"]]
    end = f"; not all on {', '.join(failed)}" if failed else ""
    return [f"`make compat` passes on vLLM's CPU builds {', '.join(passed)}{end} ([notes](docs/notes/serving.md))."]


def soak(result: Result) -> list[str]:
    """A client's day at each server."""
    lines = []
    for row in result["rows"]:
        wrong = [name for name, said in row["checks"].items() if said]
        end = row["sigterm"]
        lines.append(
            [
                row["server"],
                f"{len(row['checks']) - len(wrong)} of {len(row['checks'])}",
                f"{row['clients']} × {row['seconds']:.0f} s",
                row["streams"],
                row["dropped"],
                row["cancelled"],
                len(row["wrong"]),
                row["tokens"],
                f"{row['grown_mib']:+.0f}",
                f"{end['seconds']:.1f} s, code {end['code']}, {end['processes_left']} processes left",
            ]
        )
    headings = ["server", "checks passed", "clients", "streams", "dropped", "cancelled", "wrong", "tokens"]
    headings += ["memory since halfway, MiB", "SIGTERM while busy"]
    checks = ", ".join(result["rows"][0]["checks"])
    return [*markdown(headings, lines), "", f"The checks: {checks}.", "", source(result)]
