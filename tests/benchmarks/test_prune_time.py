"""The benchmark of pruning, at a size that a CPU can do: whole blocks through the product's own code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import prune_time
from benchmarks.pruning_tables import prune, prune_real, prune_stages
from offline_prune.report import BlockTime, Report
from vllm_spense.shapes import MIXTURES


def test_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    options = ["--shapes", "tiny", "--methods", "spensegpt+", "spensegpt", "spensegpt++", "--blocks", "2"]
    options += ["--samples", "8", "--length", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["prune_time.py", *options, "--folder", str(tmp_path), "--out", str(out)])
    prune_time.main()
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "result.png"}
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]] == ["spensegpt+", "spensegpt", "spensegpt++"]
    # The first method has a block more, to profile.
    assert [len(row["block_seconds"]) for row in result["rows"]] == [4, 3, 3]
    assert [row["stages"].get("tune", 0.0) > 0 for row in result["rows"]] == [False, False, True]
    for row in result["rows"]:
        assert (row["shape"], row["gpus"], row["samples"], row["length"], row["blocks_measured"]) == (
            "tiny",
            0,
            8,
            32,
            2,
        )
        assert row["projected_minutes"] > 0
        assert row["seconds_per_block"] > 0
        assert sum(row["stages"].values()) == pytest.approx(row["seconds_per_block"], rel=0.1)
        assert {"load", "forward", "Hessian", "factorize", "prune", "quantize", "write"} <= set(row["stages"])
        assert row["planned_host_gib"] > 0
    assert len(prune(result)) == 2 + 3 + 2
    assert len(prune_stages(result)) > 2 + 7


def test_a_mixture_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4}
    small |= {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
    monkeypatch.setitem(prune_time.ALL_SHAPES, "small", {**MIXTURES["qwen3-30b-a3b"], **small})
    out = tmp_path / "result.json"
    options = ["--shapes", "small", "--methods", "spensegpt+", "--blocks", "2", "--no-profile"]
    options += ["--samples", "8", "--length", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["prune_time.py", *options, "--folder", str(tmp_path), "--out", str(out)])
    prune_time.main()
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (row["layers"], row["blocks_measured"], len(row["block_seconds"])) == (48, 2, 3)
    assert 60 * row["projected_minutes"] > 40 * row["seconds_per_block"] > 0
    assert len(prune(result)) == 2 + 1 + 2


def test_a_real_model_is_pruned_whole(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    options = ["--model", str(llama), "--methods", "spensegpt+", "--samples", "8", "--length", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["prune_time.py", *options, "--folder", str(tmp_path), "--out", str(out)])
    prune_time.main()
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "result.png"}
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["shape"] == llama.name
    assert row["blocks_measured"] == row["layers"] == len(row["block_seconds"])
    assert 60 * row["projected_minutes"] > sum(row["block_seconds"])
    assert len(prune_real(result)) == 2 + 1 + 2


def test_the_projection() -> None:
    """Ten blocks: the first, eight like the mean of those after it, the last; and what is around them."""
    times = [5.0, 2.0, 4.0, 1.0]
    report = Report("model", {}, 0.375, seconds=20.0, blocks=[BlockTime(str(i), s, {}) for i, s in enumerate(times)])
    assert prune_time.projected(report, report.blocks[:3], report.blocks[-1], 10) == 8.0 + 5.0 + 8 * 3.0 + 1.0
    assert prune_time.projected(report, report.blocks[:3], report.blocks[-1], 10, aside=6.0) == 32.0


@pytest.mark.parametrize(
    ("kernel", "counts"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", True),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6", True),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16", True),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize128x128x8", False),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn", True),
        ("cutlass_80_simt_sgemm_128x256_8x4_nn_align1", False),
        ("_walk", False),
    ],
)
def test_which_kernels_run_on_tensor_cores(kernel: str, counts: bool) -> None:
    assert prune_time.on_tensor_cores(kernel) == counts


def test_stages_of_equal_time_have_one_order_in_every_process() -> None:
    """Sets of words are in another order in each."""
    names = [f"stage {letter}" for letter in "abcdefghijkl"]
    row = {"shape": "tiny", "method": "spensegpt", "stages": {"forward": 1.0, **dict.fromkeys(names, 0.0)}}
    about = {"benchmark": "prune_time", "gpu": {"name": "NVIDIA H200"}, "versions": {}, "commit": "", "command": ""}
    lines = [line.split(" | ")[0].strip("| ") for line in prune_stages({**about, "rows": [row]})]
    assert lines[2:15] == ["forward", *reversed(names)]
