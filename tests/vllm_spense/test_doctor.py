"""`spense doctor`: what it makes of machines, and of this one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch

from vllm_spense.doctor import Machine, dotted, examine, judge, turning_points
from vllm_spense.errors import SpenseError
from vllm_spense.estimate import Timed
from vllm_spense.ops.dispatch import SWITCH, Path
from vllm_spense.roofline import Gemm

GATE_UP = Gemm(51200, 5120, "output", 38400, 12800)


def timed(path: str, tokens: int, us: float) -> Timed:
    return Timed("NVIDIA H100 80GB HBM3", GATE_UP, tokens, path, us)


HOPPER = Machine(
    "NVIDIA H100 80GB HBM3",
    "580.159.04",
    (9, 0),
    "13.0",
    {"torch": "2.11.0", "vllm": "0.26.0", "nvmath-python": "1.0.0", "cuda-bindings": "13.1.1"},
    {"cuSPARSELt": "0.8.0", "cuBLASLt": "13.1.1", "NVRTC": "13.0"},
    plugin=True,
    tools={"C++ compiler": "/usr/bin/g++", "Python's headers": "/usr/include/python3.12"},
)


def bad(machine: Machine) -> dict[str, str]:
    return {finding.subject: finding.remedy for finding in judge(machine) if finding.good is False}


def test_a_good_machine_in_about_a_dozen_lines() -> None:
    findings = judge(HOPPER)
    assert not bad(HOPPER)
    assert len(findings) <= 14
    assert "driver 580.159.04" in findings[0].found
    assert findings[-1].good
    assert findings[-1].found.startswith("one-launch for few tokens, library for many")


def test_one_launch_is_for_hopper() -> None:
    findings = judge(replace(HOPPER, capability=(10, 0)))
    assert findings[-1].good
    assert findings[-1].found == "library for any number of tokens"


def test_a_kernel_that_must_not_be_used_leaves_the_libraries() -> None:
    findings = judge(replace(HOPPER, one_launch_fault="its kernel is wrong on this machine"))
    assert ("its kernel is wrong on this machine", None) in [(finding.found, finding.good) for finding in findings]
    assert findings[-1].good
    assert findings[-1].found == "library for any number of tokens"


@pytest.mark.parametrize(
    ("change", "subject", "remedy"),
    [
        ({"gpu": None, "capability": None}, "GPU", "an NVIDIA GPU"),
        ({"capability": (8, 9)}, "2:4 in FP8", "compute capability 9.0 or more"),
        ({"packages": {"torch": "2.11.0"}}, "vllm", "pip install 'vllm-spense[cuda]'"),
        ({"packages": {"torch": "2.11.0"}}, "nvmath-python", "pip install 'nvmath-python[cu13]>=1.0'"),
        ({"packages": {"torch": "2.9.0"}, "cuda": "12.8"}, "cuda-bindings", "pip install 'nvmath-python[cu12]>=1.0'"),
        ({"plugin": False}, "plugin", "pip install vllm-spense"),
        ({"libraries": {"NVRTC": RuntimeError("no libnvrtc.so")}}, "NVRTC", "nvmath-python[cu13]"),
    ],
)
def test_whatever_is_missing_has_a_remedy(change: dict[str, object], subject: str, remedy: str) -> None:
    machine = replace(HOPPER, **change)
    assert remedy in bad(machine)[subject]
    assert judge(machine)[-1].found == "the reference path: right, and slow"
    assert judge(machine)[-1].good is False


@pytest.mark.parametrize(
    ("tool", "remedy"),
    [("C++ compiler", "apt install build-essential"), ("Python's headers", "apt install python3-dev")],
)
def test_without_what_vllm_compiles_with_nothing_runs(tool: str, remedy: str) -> None:
    machine = replace(HOPPER, tools={**HOPPER.tools, tool: FileNotFoundError("no such thing")})
    assert bad(machine)[tool] == f"{remedy} (Debian, Ubuntu)"
    assert "no such thing" in {finding.found for finding in judge(machine)}
    for last in (judge(machine)[-1], judge(replace(machine, forced=Path.LIBRARY))[-1]):
        assert last.found == "nothing: vLLM cannot compile what it runs"
        assert last.good is False


def test_this_machine_s_tools_are_looked_for(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "own-c++"
    compiler.touch(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "own-c++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert examine().tools == {"C++ compiler": str(compiler), "Python's headers": str(tmp_path)}
    monkeypatch.delenv("CXX")
    (tmp_path / "Python.h").unlink()
    assert {name: str(answer) for name, answer in examine().tools.items()} == {
        "C++ compiler": "no g++",
        "Python's headers": f"no Python.h in {tmp_path}",
    }


@pytest.mark.parametrize(("path", "good"), [(Path.LIBRARY, True), (Path.REFERENCE, False)])
def test_a_forced_path_is_named(path: Path, good: bool) -> None:
    last = judge(replace(HOPPER, forced=path))[-1]
    assert last.found == f"{path}, because SPENSE_PATH says so"
    assert last.good is good


def test_a_typo_in_the_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "libary")
    with pytest.raises(SpenseError, match="found libary"):
        examine()


def test_versions_are_written_with_dots() -> None:
    assert dotted(800, 1000) == "0.8.0"
    assert dotted(130101, 10000) == "13.1.1"


def test_an_error_is_shown() -> None:
    findings = judge(replace(HOPPER, libraries={"NVRTC": RuntimeError("no libnvrtc.so")}))
    assert "RuntimeError: no libnvrtc.so" in {finding.found for finding in findings}


def test_what_was_measured_says_who_runs_when() -> None:
    cache = [
        *(timed("one-launch", tokens, us) for tokens, us in ((16, 70), (32, 71), (64, 73), (128, 90))),
        *(timed("library", tokens, us) for tokens, us in ((16, 75), (32, 76), (64, 77), (128, 85), (2048, 600))),
    ]
    (line,) = turning_points(cache)
    assert line == (
        "output-split 51200 × 5120, 38400 2:4 + 12800 dense: one-launch to 64 tokens, library to 2048 tokens"
    )
    assert line in {finding.found for finding in judge(replace(HOPPER, cache=cache))}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_this_machine_cannot_run_fast_and_the_exit_code_says_so() -> None:
    machine = examine()
    assert machine.gpu is None
    assert machine.packages["torch"] == torch.__version__
    command = [sys.executable, "-c", "from offline_prune.cli import main; main(['doctor'])"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "needs: an NVIDIA GPU" in result.stdout
    assert "Traceback" not in result.stderr
    assert "apt install" not in result.stdout
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "CXX": "no-c++"})
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if "apt install build-essential" in line]
    assert "needs: apt install build-essential" in line
    assert "nothing: vLLM cannot compile what it runs" in result.stdout
