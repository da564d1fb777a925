"""The tables of the README and of docs/ are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import performance
from benchmarks.decode_tables import errors
from benchmarks.performance import DOCUMENTS, TABLES, filled
from benchmarks.pruning_tables import prune_sentence
from benchmarks.serving_tables import compat_sentence, gpu_tests, soak
from vllm_spense import estimate as estimates
from vllm_spense import roofline
from vllm_spense.estimate import estimate, load
from vllm_spense.roofline import GPUS

ABOUT = {
    "commit": "0123456789ab",
    "command": "python benchmarks/x.py",
    "gpu": {"name": "NVIDIA H100 80GB HBM3"},
    "cpu": "a CPU",
    "versions": {"vllm": "0.26.0", "torch": "2.11.0"},
}
DECODE = [
    {
        "shape": "qwen3-32b",
        "layers": 64,
        "batch": batch,
        "context": context,
        "kv_cache_dtype": kv,
        "sparsity": sparsity,
        "dense_ms": 16.0,
        "spense_ms": 16.0 / ratio,
        "ratio": ratio,
        "prefill_dense_ms": 300.0,
        "prefill_ratio": ratio - 0.05,
        "dense_start_s": 80.0,
        "spense_start_s": 90.0,
        "spense_load_s": 4.0,
        "spense_search_s": 12.5,
        "dense_weight_bytes": 32 << 30,
        "spense_weight_bytes": 28.28 * 2**30,
        "format_weight_bytes": 28 << 30,
    }
    for kv in ("auto", "fp8")
    for sparsity, ratio in ((0.25, 1.14), (0.375, 1.23))
    for context in (16, 4096)
    for batch in (1, 256)
]
BREAKDOWN = [
    {
        "m": 32,
        "scheme": "stock",
        "sparsity": 0.0,
        "gemm_us": 144.25,
        "other_us": 20.0,
        "total_us": 164.25,
        "ratio": 1.0,
    },
    {"m": 32, "scheme": "spense", "sparsity": 0.375, "gemm_us": 104.0, "other_us": 21, "total_us": 125, "ratio": 1.314},
]
PRUNE = [
    {
        "shape": "qwen3-32b",
        "method": method,
        "gpus": 1,
        "samples": 128,
        "length": 4096,
        "blocks_measured": 3,
        "seconds_per_block": minutes,
        "projected_minutes": minutes,
        "paper_minutes": paper,
        "tensor_core_share": share,
        "stages": {"load": 0.5, "forward": 12.25} | stages,
        "peak_gpu_gib": 38.25,
        "planned_gpu_gib": 40.0,
        "peak_host_gib": 2.0,
        "pinned_host_gib": 1.0,
        "planned_host_gib": 4.0,
    }
    for method, minutes, paper, share, stages in (
        ("spensegpt", 21.5, 79.8, 0.75, {}),
        ("spensegpt+", 22.6, None, None, {"select": 0.125}),
    )
]
SELECTION = [
    {"all_tokens": 4096, "tokens": 512, "overlap_mean": 0.979, "overlap_least": 0.943},
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the results of some benchmarks."""
    for name, rows in (
        ("decode_speed", DECODE),
        ("decode_speed-h200", DECODE),
        ("layer_breakdown", [row | {"kernels": 5} for row in BREAKDOWN]),
        ("prune_time", PRUNE),
        ("selection_tokens", SELECTION),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_result_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert filled(text) == text, "run: python -m benchmarks.performance"


def test_every_table_has_its_place() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert all(text.count(f"<!-- table {name} -->") == 1 for name in TABLES)
    assert text.count("<!-- end -->") == len(TABLES)


def test_every_table_has_its_result_files() -> None:
    files = {(name, file) for name, (files, _) in TABLES.items() for file in files.split()}
    assert {(name, file) for name, file in files if not (performance.RESULTS / f"{file}.json").exists()} == set()


def table(name: str, results: Path) -> str:
    return filled(f"before\n<!-- table {name} -->\nold\n<!-- end -->\nafter\n", results)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "decode",
            ["| KV cache | context | batch | stock, ms | 25.0% | 37.5% |", "| fp8 | 16 | 256 | 16.00 | 1.14 | 1.23 |"],
        ),
        ("prefill", ["| auto | 4096 | 256 | 300.00 | 1.09 | 1.18 |"]),
        (
            "memory",
            ["| dense | 32.00 | 32.00 | +0.00% | 80 |  |  |", "| 37.5% | 28.28 | 28.00 | +1.00% | 90 | 4.0 | 12.5 |"],
        ),
        ("mlp", ["| 32 | spense 37.5% | 104.0 | 21.0 | 125.0 | 1.31 | 5 |"]),
        ("readme", ["| auto | 4096 | 1 | 16.00 | 1.14 | 1.23 |"]),
        (
            "prune",
            [
                "| qwen3-32b | spensegpt | 1 | 128 × 4096 | 3 × 21.5 s | 21.5 | 80 | 75% |"
                " 38.2 of 40.0 | 1.00 of 4.00 | 2.0 |",
                "| qwen3-32b | spensegpt+ | 1 | 128 × 4096 | 3 × 22.6 s | 22.6 |  |  |"
                " 38.2 of 40.0 | 1.00 of 4.00 | 2.0 |",
            ],
        ),
        ("prune_stages", ["| forward | 12.25 | 12.25 |", "| select | 0.00 | 0.12 |"]),
        ("selection", ["| 512 | 1/8 | 97.9% | 94.3% |"]),
    ],
)
def test_tables(name: str, lines: list[str], results: Path) -> None:
    text = table(name, results)
    assert text.startswith(f"before\n<!-- table {name} -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    for line in lines:
        assert f"\n{line}\n" in text
    assert "NVIDIA H100 80GB HBM3, vllm 0.26.0, torch 2.11.0, commit 0123456789ab: `python benchmarks/x.py`." in text
    assert filled(text, results) == text


def test_the_sentence_on_pruning(results: Path) -> None:
    (sentence,) = prune_sentence({**ABOUT, "rows": PRUNE})
    times = "takes one NVIDIA H100 80GB HBM3 21.5 minutes with `spensegpt` and 22.6 minutes with `spensegpt+`"
    assert f"on 128 × 4096 calibration tokens {times}" in sentence
    assert f"\n{sentence}\n" in table("prune_readme", results)


def test_some_tables_are_shorter(results: Path) -> None:
    assert "fp8" not in table("prefill", results)
    # Each batch at the longest context that it was measured at.
    assert "| 16 | 256 |" in table("decode", results)
    assert "| 16 | 256 |" not in table("readme", results)
    file = results / "decode_speed-h200.json"
    file.write_text(json.dumps({**ABOUT, "rows": DECODE[::-1]}))
    assert "| 16 | 256 |" not in table("readme", results), "whatever was measured first"


def test_gpu_tests_are_summed_up_by_file() -> None:
    row = {"file": "tests.gpu.test_kernels", "test": "a", "passed": 3, "failed": 0, "skipped": 1, "seconds": 1.4}
    rows = [row | {"recorded": {"GPU": "+0 MiB"}}, row | {"test": "b", "failed": 1, "recorded": {}}]
    assert gpu_tests({**ABOUT, "rows": rows})[2] == "| `test_kernels.py` | 6 | 1 | 2 | 3 | GPU: +0 MiB |"


def test_releases_that_fail_are_named() -> None:
    row = {"version": "0.26.0", "failed": []}
    rows = [row, row | {"version": "0.27.0", "failed": ["tests.a::test_b"]}, row | {"version": "0.28.0"}]
    said = "passes on vLLM's CPU builds 0.26.0, 0.28.0; not all on 0.27.0 ("
    assert said in compat_sentence({**ABOUT, "rows": rows})[0]


def test_a_day_counts_what_was_wrong() -> None:
    end = {"seconds": 1.04, "code": 0, "streams_ended": 8, "processes_left": 0}
    row = {"server": "stock", "checks": {"chat": "", "tools": "Wrong: none"}, "clients": 8, "seconds": 20.0}
    row |= {"streams": 9, "dropped": 2, "cancelled": 1, "tokens": 70, "wrong": ["a"], "grown_mib": 0.2, "sigterm": end}
    found = soak({**ABOUT, "rows": [row]})
    assert found[2] == "| stock | 1 of 2 | 8 × 20 s | 9 | 2 | 1 | 1 | 70 | +0 | 1.0 s, code 0, 0 processes left |"


def test_gemms_are_those_that_the_policy_takes(results: Path) -> None:
    row = {"layer": "down", "dense_ratio": 0.25, "ideal": 1.391, "m": 32}
    rows = [row | {"ratio": 1.3, "chosen": True}, row | {"ratio": 1.35, "chosen": False}]
    rows.append(row | {"ratio": 1.1, "chosen": True, "m": 256})
    (results / "gemm_sweep.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    assert "\n| down | 0.25 | 1.39 | 1.30 (93%) | 1.10 (79%) |\n" in table("gemm", results)


def test_experts_against_stock_and_ideal(results: Path) -> None:
    row = {"shape": "qwen3-30b-a3b", "layer": "down", "routing": "balanced", "sparsity": 0.375, "tokens": 32}
    rows = [row | {"over_stock": 1.36, "of_ideal": 0.81}, row | {"tokens": 8, "over_stock": None, "of_ideal": 0.7}]
    (results / "expert_gemm.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    assert "\n| qwen3-30b-a3b | down | balanced | 37.5% |  | 1.36 (81%) |\n" in table("experts", results)
    (results / "expert_mixture.json").write_text(json.dumps({**ABOUT, "rows": rows}))
    assert "\n| qwen3-30b-a3b | balanced | 37.5% |  | 1.36 |\n" in table("mixtures", results)


def test_what_was_not_measured_says_so(results: Path) -> None:
    assert "Not measured yet: `python benchmarks/gemm_sweep.py` on a GPU" in table("gemm", results)
    several = "`torchrun --nproc-per-node 2 benchmarks/prune_time.py` on 2 GPUs"
    assert f"Not measured yet: {several} makes this table." in table("prune_gpus", results)
    shapes = table("prune_shapes", results)
    assert "Not measured yet: `python benchmarks/prune_time.py --shapes qwen3-32b seed-oss-36b " in shapes
    assert "--out benchmarks/results/prune_time-shapes.json` on a GPU makes this table." in shapes


def test_a_table_that_does_not_exist_is_an_error(results: Path) -> None:
    with pytest.raises(KeyError, match="speed"):
        table("speed", results)


def test_errors_of_the_estimate(results: Path) -> None:
    found = estimate(*load("qwen3-32b", 0.25), GPUS["h100"], 32, 16)
    row: dict[str, Any] = DECODE[0] | {"batch": 32, "dense_ms": found.dense_ms / 2, "ratio": found.speed_up / 1.1}
    lines = errors({**ABOUT, "rows": [row, row | {"dense_ms": found.dense_ms, "ratio": found.speed_up}]})
    assert "| speed-up | 5.0% | 10.0% |" in lines
    assert "| stock's ms per output token | 50.0% | 100.0% |" in lines
    shorter = estimate(*load("qwen3-32b", 0.25), GPUS["h100"], 32, 16).dense_ms
    fewer = errors({**ABOUT, "rows": [row | {"layers": 32, "dense_ms": shorter}]})
    assert "0.0% | 0.0%" not in "".join(fewer)
    unknown = {**ABOUT, "gpu": {"name": "NVIDIA L4"}, "rows": [row]}
    assert errors(unknown) == ["This GPU's data sheet is not known to `spense estimate`."]


def test_the_text_has_the_constants_of_the_code() -> None:
    text = (performance.ROOT / "docs/performance.md").read_text(encoding="utf-8")
    regions = (roofline.STOCK, roofline.DENSE_REGION, roofline.SPARSE_REGION)
    memory, products = ([getattr(share, name) for share in regions] for name in ("memory", "tensor_cores"))
    words = " ".join(text.split())
    assert f"{min(memory) * 100:.0f} to {max(memory) * 100:.0f}% of the memory's bandwidth" in words
    assert f"{min(products) * 100:.0f} to {max(products) * 100:.0f}% of the tensor cores' peak" in words
    (layer, token), (own_layer, own_token) = estimates._STOCK.elementwise, estimates._SPENSE.elementwise
    assert f"{layer:.0f} µs a layer and {token} µs a layer and token" in words
    assert f"in stock vLLM, {own_layer} and {own_token} in Spense" in words
    both = (*estimates._STOCK.around_experts, *estimates._SPENSE.around_experts)
    assert "tokens, {:.0f} and {}, {:.0f} and {}.".format(*both) in words


def test_the_text_has_the_shares_of_the_time_line() -> None:
    rows = json.loads((performance.RESULTS / "layer_timeline.json").read_text())["rows"]
    gemms, rest = [], []
    for case in {(row["tokens"], row["sparsity"]) for row in rows}:
        mine = [row for row in rows if (row["tokens"], row["sparsity"]) == case]
        # A layer's GEMM may be several kernels.
        least = {row["role"]: max(row["bytes_us"], row["products_us"]) for row in mine if row["bytes_us"]}
        us = {role: sum(row["us"] for row in mine if row["role"] == role) for role in {row["role"] for row in mine}}
        gemms += [us[role] / least[role] for role in least]
        rest.append(sum(us[role] for role in us.keys() - least) / sum(us.values()))
    words = " ".join((performance.ROOT / "docs/performance.md").read_text(encoding="utf-8").split())
    assert f"GEMMs take {min(gemms):.1f} to {max(gemms):.1f} times" in words
    assert f"the rest {min(rest) * 100:.0f} to {max(rest):.0%} of the layer" in words


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md", "docs/notes/kernels.md"])
def test_the_text_has_the_speed_ups_of_the_mixtures_table(document: str) -> None:
    file, _ = TABLES["decode_mixture"]
    ratios = [row["ratio"] for row in json.loads((performance.RESULTS / f"{file}.json").read_text())["rows"]]
    words = " ".join((performance.ROOT / document).read_text(encoding="utf-8").split())
    assert f" {min(ratios):.2f} to {max(ratios):.2f} " in words.replace("[", " ")


def test_batches_stand_in_order_whatever_was_measured_first(tmp_path: Path) -> None:
    (tmp_path / "decode_speed-h200.json").write_text(json.dumps({**ABOUT, "rows": DECODE[::-1]}))
    lines = [line for line in table("decode_h200", tmp_path).splitlines() if line.startswith(("| auto", "| fp8"))]
    places = [line.split(" | ")[:3] for line in lines]
    assert len(places) > 1
    assert places == sorted(places, key=lambda place: (place[0], int(place[1]), int(place[2])))


def test_four_bits_stand_beside_pruning_on_the_texts_that_both_have(tmp_path: Path) -> None:
    def row(method: str, sparsity: float, form: str, domain: str, kl: float) -> dict[str, Any]:
        about = {"model": "m", "method": method, "sparsity": sparsity, "format": form, "seed": 0, "domain": domain}
        return {**about, "perplexity": 10 + kl, "kl": kl}

    pruned = [row("spensegpt+", 0.25, "fp8", domain, kl) for domain, kl in (("code", 0.2), ("prose", 0.4))]
    size = {"heldout": 8, "heldout_length": 512}
    rounded = [row("llmcompressor gptq", 0.0, "int4-g128", domain, 0.1) | size for domain in ("reference", "handbook")]
    (tmp_path / "accuracy-smollm2.json").write_text(json.dumps({**ABOUT, "rows": pruned}))
    assert "| `spensegpt+` | 25.0% | 0.300 | 10.20 | 10.40 |" in table("summary", tmp_path)
    (tmp_path / "peers-int4.json").write_text(json.dumps({**ABOUT, "rows": rounded}))
    text = table("summary", tmp_path)
    assert "| GPTQ, four bits | 0.0% | 0.100 | 10.10 |" in text
    assert "| `spensegpt+` | 25.0% | 0.400 | 10.40 |" in text
    assert "m on reference" in text
    larger = [{**row, "heldout": 40} for row in rounded]
    (tmp_path / "peers-int4.json").write_text(json.dumps({**ABOUT, "rows": larger}))
    assert "GPTQ" not in table("summary", tmp_path)
