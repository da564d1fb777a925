"""Whether the plugin works with every release of vLLM that it is for: a choice of tests on vLLM's CPU builds.

    make compat

makes an environment in .compat for each release, runs the tests in it, and writes benchmarks/results/compat.json, a row
for each release. Rows of releases that `--versions` leaves out stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.command_line import add_out
from benchmarks.envelope import ROOT, envelope, write_result
from benchmarks.gpu_tests import rows
from scripts.bootstrap import SetupError
from scripts.compat_env import VERSIONS, environment

#: What depends on vLLM, some minutes of it: its sources, a refusal before an engine starts, and engines on one rank and
#: on two.
TESTS = (
    "tests/vllm_spense/plugin",
    "tests/engine/test_bad_input.py::test_load_format",
    "tests/engine/test_adapters.py::test_an_engine_says_what_transformers_says[2]",
    "tests/engine/test_features.py",
    "tests/engine/test_reload.py",
)
#: All of it, with the tests that are marked `exhaustive`.
EVERYTHING = ("tests/vllm_spense/plugin", "tests/engine")
#: That a row names.
PACKAGES = ("vllm", "torch", "transformers", "compressed-tensors")
#: Prints their versions; vLLM's CPU build is a distribution of another name.
_ASK = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name.replace("-", "_")).__version__ for name in sys.argv[1:]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--exhaustive", action="store_true", help="all tests with engines, half an hour for each")
    add_out(parser, "compat")
    options = parser.parse_args()
    failed = []
    tests = EVERYTHING if options.exhaustive else TESTS
    for version in options.versions:
        try:
            row = measure(version, environment(version), tests, options.exhaustive)
        except SetupError as error:
            sys.exit("\n".join((*error.details, f"Spense: {error}")))
        keep(row, options.out)
        print(f"vLLM {version}: {row['passed']} passed, {len(row['failed'])} failed, {row['skipped']} skipped")
        failed += [f"{version}: {name}" for name in row["failed"]]
    if failed:
        sys.exit("\n".join(failed))


def measure(version: str, python: Path, tests: Sequence[str], exhaustive: bool = False) -> dict[str, Any]:
    """Runs the tests in an environment, those that are marked `exhaustive` too if told so.

    Returns:
        A row: the release, the versions beside it, how many tests passed and were skipped, which failed, seconds.
    """
    start = time.monotonic()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths}
    asked = subprocess.run([python, "-c", _ASK, *PACKAGES], env=env, cwd=ROOT, capture_output=True, text=True)
    if asked.returncode:
        raise SetupError(f"what is installed beside vLLM {version} cannot be imported", *asked.stderr.splitlines()[-5:])
    with TemporaryDirectory() as folder:
        file = Path(folder, "junit.xml")
        marked = "not gpu" if exhaustive else "not gpu and not exhaustive"
        command = [python, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", "--junitxml", file, *tests]
        code = subprocess.run(command, env=env, cwd=ROOT).returncode
        if not file.exists():
            raise SetupError(f"pytest ended with code {code} in the environment with vLLM {version}")
        found = rows(file)
    return {
        "version": version,
        "versions": json.loads(asked.stdout.splitlines()[-1]),
        "commit": envelope("compat", [])["commit"],
        "passed": sum(row["passed"] for row in found),
        "skipped": sum(row["skipped"] for row in found),
        "failed": sorted({f"{row['file']}::{row['test']}" for row in found if row["failed"]}),
        "seconds": round(time.monotonic() - start),
    }


def keep(row: dict[str, Any], out: Path) -> None:
    """Puts a row into the result file, in the place of that release's."""
    known = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    others = {each["version"]: each for each in known if each["version"] != row["version"]}
    found = others | {row["version"]: row}
    write_result(out, "compat", [found[version] for version in VERSIONS if version in found])


if __name__ == "__main__":
    main()
