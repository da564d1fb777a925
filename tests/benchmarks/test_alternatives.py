"""The comparison with other schemes without a GPU: their configurations, what is made of the engines' answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from compressed_tensors.quantization import QuantizationConfig

from benchmarks import alternatives, alternatives_table, engine_runs
from benchmarks.alternatives import SCHEMES, int4_config, reason, scheme_config
from benchmarks.make_shape import shape_config
from benchmarks.timings import Timing
from vllm_spense.shapes import SHAPES

#: What the fake engines find, by scheme: ms of an output token.
MS = {"spense-25": 8.0, "spense-37.5": 7.0, "spense-50": 6.0, "fp8": 10.0, "w4a16": 9.0, "bf16": 20.0}
#: Of the shape with two layers.
OUTSIDE = 2 * 512 * 256 * 2
LAYER = 1_000_000


def test_every_scheme_is_what_its_name_says() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = shape_config("qwen3-32b", 2)
    assert "quantization_config" not in scheme_config(config, "bf16")
    assert scheme_config(config, "fp8")["quantization_config"]["format"] == "float-quantized"
    sparse = scheme_config(config, "spense-37.5")["quantization_config"]["spense"]
    assert len(sparse["modules"]) == 2
    for scheme, w4a8 in (("w4a16", False), ("w4a8-fp8", True)):
        QuantizationConfig.model_validate(found := scheme_config(config, scheme)["quantization_config"])
        # What vLLM decides by.
        parts = CompressedTensorsConfig.from_config(found).target_scheme_map["Linear"]
        weights, inputs = parts["weights"], parts["input_activations"]
        assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, True)
        assert CompressedTensorsConfig._is_fp8_w4a8(weights, inputs) is w4a8
        assert CompressedTensorsConfig._is_wNa16_group_channel(weights, inputs) is not w4a8
    assert int4_config(fp8_inputs=True)["ignore"] == ["lm_head"]


def fake_engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces engine processes by answers; that of W4A8 dies. Returns the names of those that were measured."""
    started: list[str] = []

    class Engine:
        """As `subprocess.Popen`."""

        def __init__(self, command: list[str], stdout: TextIO, **_: Any) -> None:
            self.order, self.answer = json.loads(command[3]), Path(command[4])
            self.scheme = Path(self.order["model"]).name.removeprefix("tiny-2-")
            self.returncode = 0 if self.scheme in MS else 1
            if self.returncode:
                print("rank 0: RuntimeError: no kernel for int4", file=stdout)
                print("RuntimeError: Engine core initialization failed. See root cause above.", file=stdout)

        def communicate(self, _: str) -> None:
            started.append(self.scheme)
            if self.returncode:
                return
            cells = [(b, c) for c in self.order["contexts"] for b in self.order["batches"]]
            cells += [(1, length) for length in self.order["prefills"]]
            ms = MS[self.scheme]
            answer = {
                "start_s": 60.0,
                "plugin_load_s": None,
                "weight_bytes": OUTSIDE + 2 * LAYER,
                "working_bytes": 10**9,
                "linear_kernels": ["Kernel"],
                "gpu_ms": [],
                "timings": [vars(Timing(b, c, ms, 0.1, 3 * ms)) for b, c in cells],
            }
            self.answer.write_text(json.dumps(answer))

        def kill(self) -> None:
            pass

    fake = SimpleNamespace(Popen=Engine, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(engine_runs, "subprocess", fake)
    return started


def measure(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    command = "alternatives.py --shape tiny --layers 2 --batches 1 32 --contexts 16 --prefills 512"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--work", str(folder), "--out", str(folder / "out.json")])
    with pytest.raises(SystemExit, match=r"these engines did not run: w4a8-fp8"):
        alternatives.main()
    return json.loads((folder / "out.json").read_text())


def test_every_scheme_has_rows_and_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = fake_engines(monkeypatch)
    result = measure(monkeypatch, tmp_path)
    assert started == [*SCHEMES]
    (failed,) = [row for row in result["rows"] if "failed" in row]
    assert (failed["scheme"], failed["failed"]) == ("w4a8-fp8", "RuntimeError: no kernel for int4")
    measured = [row for row in result["rows"] if "failed" not in row]
    assert len(measured) == 6 * 3
    for row in measured:
        assert row["ratio"] == pytest.approx(10 / MS[row["scheme"]], abs=1e-4)
        assert row["prefill_ratio"] == row["ratio"]
        # The shape has two layers of its own.
        assert row["model_weight_bytes"] == OUTSIDE + 2 * LAYER
        assert row["kv_tokens"] == (alternatives.ROOM_BYTES - 10**9 - row["weight_bytes"]) // (2 * 2 * 2 * 64)

    measure(monkeypatch, tmp_path)
    assert started == [*SCHEMES, "w4a8-fp8"]

    for table, first in (
        (alternatives_table.tables, ["", "1 × 16", "32 × 16", "1 × 512"]),
        (alternatives_table.readme, ["", "1 × 16", "32 × 16", "128 × 16"]),
    ):
        lines = table(result)
        assert "W4A8-FP8 did not run: `RuntimeError: no kernel for int4`." in lines
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        found = {line[0]: line for line in reversed(cells)}
        assert found[""][: len(first)] == first
        assert found["FP8, stock"][1:3] == ["10.00 ms", "10.00 ms"]
        assert found["Spense 50%"][1:3] == ["1.67", "1.67"]
        assert "W4A8-FP8" not in found


def test_a_whole_model_is_projected_from_its_layers() -> None:
    config = SHAPES["qwen3-32b"]
    outside = 2 * config["vocab_size"] * config["hidden_size"] * 2
    found = engine_runs.Measured({}, weight_bytes=outside + 16 * 10**9, working_bytes=2 * 10**9)
    memory = alternatives.model_memory("qwen3-32b", "fp8", 16, found)
    assert memory["model_weight_bytes"] == outside + 64 * 10**9
    assert memory["kv_tokens"] == int((0.92 * 80e9 - outside - 66e9) / (2 * 64 * 8 * 128))
    on_a_cpu = engine_runs.Measured({}, weight_bytes=outside)
    assert alternatives.model_memory("qwen3-32b", "fp8", 16, on_a_cpu)["kv_tokens"] is None


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("a\n[rank0]: torch.OutOfMemoryError: CUDA out of memory.\nb", "torch.OutOfMemoryError: CUDA out of memory."),
        ("ValueError: first\nRuntimeError: last", "RuntimeError: last"),
        ("killed", "killed"),
    ],
)
def test_the_reason_of_a_failure_is_the_error(log: str, expected: str) -> None:
    assert reason(log) == expected
