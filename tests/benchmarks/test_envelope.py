"""The envelope around every benchmark's rows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import engine_runs
from benchmarks import envelope as module
from benchmarks.envelope import ROOT, circumstances, envelope, write_result


def test_the_file_holds_the_whole_envelope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/python", "-m", "benchmarks.x", "--methods", "a b"])
    rows = [{"method": "dense", "perplexity": 1.5}, {"method": "spensegpt+", "perplexity": 2.0}]
    file = tmp_path / "new" / "x.json"
    write_result(file, "x", rows)
    data = json.loads(file.read_text())
    assert list(data) == ["benchmark", "command", "commit", "code", "gpu", "cpu", "versions", "rows"]
    assert data["benchmark"] == "x"
    assert data["command"] == "python -m benchmarks.x --methods 'a b'"
    assert data["rows"] == rows
    assert data["cpu"]
    assert {"python", "torch", "transformers", "compressed-tensors"} <= set(data["versions"])
    assert file.read_text().endswith("}\n")


def test_the_code_is_what_the_sources_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether committed or not; documents are no code."""
    (tmp_path / "vllm_spense/kernels").mkdir(parents=True)
    names = []
    for file, text in (("a.py", "1"), ("kernels/b.cu", "1"), ("kernels/b.cu", "2"), ("page.md", "1")):
        (tmp_path / "vllm_spense" / file).write_text(text)
        module._code.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, "ROOT", tmp_path)
            names.append(circumstances()["code"])
    module._code.cache_clear()
    assert len(set(names[:3])) == 3
    assert names[3] == names[2]
    assert all(path.suffix in {".py", ".cu", ".cuh"} for pattern in module.SOURCES for path in ROOT.glob(pattern))
    files = {path for pattern in module.SOURCES for path in ROOT.glob(pattern)}
    assert {Path(engine_runs.__file__), ROOT / "benchmarks/mma_limits.cu"} <= files


def test_the_command_names_the_switches_that_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/python", "x.py"])
    for name, value in (("SPENSE_PATH", "library"), ("SPENSE_CACHE_DIR", "/c"), ("SPENSE_DENSE_COPY_GIB", "8")):
        monkeypatch.setenv(name, value)
    assert envelope("x", [])["command"] == "SPENSE_DENSE_COPY_GIB=8 SPENSE_PATH=library python x.py"


def fake_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def test_a_gpu_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "nvidia-smi", 'echo "NVIDIA H100 80GB HBM3, 580.1, 1980 MHz, 2619 MHz, 700.00 W"')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert envelope("x", [])["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "580.1",
        "clocks.max.sm": "1980 MHz",
        "clocks.max.memory": "2619 MHz",
        "power.limit": "700.00 W",
    }


def test_no_gpu_and_no_checkout_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "nvidia-smi", "echo no devices; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = envelope("x", [])
    assert result["gpu"] is None
    assert result["commit"] is None


@pytest.mark.skipif(
    shutil.which("git") is None or not (module.ROOT / ".git").exists(), reason="needs git and a checkout"
)
def test_the_commit_names_the_checkout() -> None:
    assert len(envelope("x", [])["commit"].removesuffix("-dirty")) >= 12
