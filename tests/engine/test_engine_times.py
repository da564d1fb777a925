"""decode_speed, alternatives and serve_load with real engines, on a shape that a CPU can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import VLLM

from benchmarks.envelope import ROOT

pytestmark = pytest.mark.engine


def test_both_engines_are_measured(tmp_path: Path) -> None:
    out, work = tmp_path / "out.json", tmp_path / "work"
    options = "--shape tiny --eager --steps 8 --kv auto --sparsities 0.375 --batches 1 4 --contexts 16"
    done = run("benchmarks/decode_speed.py", *options.split(), "--out", out, "--work", work)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 16), (4, 16)]
    for row in rows:
        assert row["dense_ms"] > 0
        assert row["prefill_spense_ms"] > 0
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["spense_ms"], abs=1e-3)
    assert len(list(work.glob("*.log"))) == 2


def test_weights_of_four_bits_are_measured_and_what_cannot_run_is_named(tmp_path: Path) -> None:
    """No CPU has a kernel for FP8 activations with such weights, and vLLM's for BF16 ones needs AVX-512."""
    out = tmp_path / "out.json"
    options = "--shape tiny --layers 2 --eager --steps 8 --kv auto --schemes w4a16 w4a8-fp8 --batches 2 --contexts 16"
    done = run(
        "benchmarks/alternatives.py", *options.split(), "--prefills", "64", "--out", out, "--work", tmp_path / "work"
    )
    rows = json.loads(out.read_text())["rows"]
    failed = {row["scheme"]: row["failed"] for row in rows if "failed" in row}
    assert f"these engines did not run: {', '.join(failed)}" in done.stderr
    assert failed.pop("w4a8-fp8").startswith("NotImplementedError: No compressed-tensors compatible scheme")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        assert "cpu_gemm_wna16" in failed.pop("w4a16")
        assert len(rows) == 2
        return
    assert not failed
    measured = rows[:-1]
    assert [(row["scheme"], row["batch"], row["context"]) for row in measured] == [("w4a16", 2, 16), ("w4a16", 1, 64)]
    assert all(row["ms"] > 0 and row["prefill_ms"] > 0 and row["ratio"] is None for row in measured)
    assert measured[0]["linear_kernels"] == ["CPUWNA16LinearKernel"]


@pytest.mark.exhaustive
def test_servers_are_measured_under_load(tmp_path: Path) -> None:
    """Two servers and their client, eight processes that import vLLM."""
    out, work = tmp_path / "out.json", tmp_path / "work"
    options = "--shape tiny --kv auto --sparsities 0.375 --concurrencies 1 2 --least-prompts 4 --input 64 --output 8"
    done = run("benchmarks/serve_load.py", *options.split(), "--together", "2", "--out", out, "--work", work)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["scheme"], row["concurrency"], row["prompts"]) for row in rows] == [
        (scheme, concurrency, 4) for scheme in ("fp8", "spense-37.5") for concurrency in (1, 2)
    ]
    for row, stock in zip(rows, [*rows[:2], *rows[:2]], strict=True):
        assert row["requests_per_s"] == pytest.approx(row["output_tokens_per_s"] / 8, abs=1e-3)
        assert row["ratio"] == pytest.approx(row["output_tokens_per_s"] / stock["output_tokens_per_s"], abs=1e-3)
        assert 0 < row["ttft_ms"] <= row["ttft_p99_ms"]
        assert 0 < row["tpot_ms"] <= row["tpot_p99_ms"]
    (log,) = work.glob("*spense*.log")
    assert "runs on cpu by the reference path" in log.read_text()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | VLLM, capture_output=True, text=True)
