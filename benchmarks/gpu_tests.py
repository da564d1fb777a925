"""Runs the tests that need a GPU and records how they ended, which no CI without a GPU can show.

    python benchmarks/gpu_tests.py

runs all of tests/gpu and writes benchmarks/results/gpu_tests.json, a row for each test function. Arguments that it does
not know are pytest's:

    python benchmarks/gpu_tests.py tests/gpu/test_kernels.py -k down
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out
from benchmarks.envelope import ROOT, write_result

Row = dict[str, Any]
#: How a test may end, and junit's name for it; without any of these it has passed.
ENDINGS = {"failed": ("failure", "error"), "skipped": ("skipped",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_out(parser, "gpu_tests")
    options, pytests = parser.parse_known_args()
    if not any((ROOT / argument.partition("::")[0]).exists() for argument in pytests):
        pytests.append("tests/gpu")
    with TemporaryDirectory() as folder:
        file = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--junitxml", str(file), *pytests]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not file.exists():
            sys.exit(code)
        write_result(options.out, "gpu_tests", rows(file))
    sys.exit(code)


def rows(junit: Path) -> list[Row]:
    """One for each test function: how many of its cases ended how, their seconds, and what they recorded.

    Args:
        junit: what pytest's --junitxml wrote.
    """
    found: dict[tuple[str, str], Row] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        file, test = case.get("classname", ""), case.get("name", "").partition("[")[0]
        empty = {"file": file, "test": test, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "recorded": {}}
        row = found.setdefault((file, test), empty)
        ended = (ending for ending, names in ENDINGS.items() if any(case.find(name) is not None for name in names))
        row[next(ended, "passed")] += 1
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 2)
        row["recorded"] |= {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    return list(found.values())


if __name__ == "__main__":
    main()
