"""decode_speed without an engine: what is timed, how rows are made, and a server that sends what it is told."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TextIO

import pytest

from benchmarks import decode_speed, engine_runs, timings
from benchmarks.decode_speed import compare
from benchmarks.engine_runs import Measured, layer_kernels, saved_bytes
from benchmarks.engine_times import Bench, Order, capture_sizes, grid, needed_kv_bytes
from benchmarks.make_shape import make_shape
from benchmarks.server_times import time_server
from benchmarks.timings import TOKEN_BUDGET, Timing, output_tokens, require_sensible, summarize, time_steps
from benchmarks.worker_profile import KernelRun
from vllm_spense.errors import SpenseError


def test_prefill_ends_and_decode_begins_with_the_last_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timings.time, "perf_counter", lambda: clock[0])

    def results() -> Iterator[set[str]]:
        yield set()
        for seconds, who in ((1, ""), (2, "a"), (3, "ab"), (4, "abc"), (5, "abc"), (6, "abc"), (7, "bc"), (8, "c")):
            clock[0] += seconds
            yield set(who)
        exhausted.append(True)

    exhausted: list[bool] = []
    prefill, steps = time_steps(results(), 3)
    assert prefill == 1 + 2 + 3 + 4
    assert steps == [5, 6]
    assert exhausted


@pytest.mark.parametrize(("batch", "context"), [(1, 16), (32, 4096), (256, 1024)])
def test_the_whole_batch_decodes_long_enough(batch: int, context: int) -> None:
    """A scheduler that prefills first come, first served, and gives whoever is ready a token in every step."""
    tokens = output_tokens(batch, context, steps=24)
    missing, done = [context] * batch, [0] * batch
    together = 0
    while max(done) < tokens:
        ready = [i for i in range(batch) if not missing[i]]
        together += len(ready) == batch
        budget = TOKEN_BUDGET - len(ready)
        for i in range(batch):
            part = min(missing[i], budget)
            budget -= part
            missing[i] -= part
            done[i] += not missing[i]
    assert 24 <= together <= 24 + 1 + math.ceil(batch / 16)


def test_a_batch_that_would_wait_for_memory_is_left_out() -> None:
    cache = SimpleNamespace(block_size=16, num_gpu_blocks=101)
    config = SimpleNamespace(cache_config=cache)
    model = SimpleNamespace(get_vocab_size=lambda: 100)
    bench = Bench(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config, model_config=model)), steps=8)
    assert bench.kv_tokens == 1616
    # 16 + 8 + 2 tokens are two blocks, and one of the 101 is vLLM's own.
    assert bench.fits(50, 16)
    assert not bench.fits(51, 16)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_engines_that_share_a_gpu_have_room_for_every_batch(kv: str, tmp_path: Path) -> None:
    folder = make_shape("qwen3-32b", tmp_path, 0.375, layers=2)
    order = Order(str(folder), "spense", kv, (1, 8, 33), (16, 100), most_tokens=1000, steps=8)
    assert grid(order) == [(1, 16), (8, 16), (33, 16), (1, 100), (8, 100)]
    assert grid(replace(order, prefills=(100, 2000))) == [*grid(order), (1, 2000)]
    # Keys and values of 2 layers, 8 heads of 128.
    block_bytes = 16 * 2 * 2 * 8 * 128 * (1 if kv == "fp8" else 2)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=needed_kv_bytes(order) // block_bytes)
    )
    model = SimpleNamespace(get_vocab_size=lambda: 100)
    bench = Bench(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config, model_config=model)), order.steps)
    assert all(bench.fits(*case) for case in grid(order))
    assert needed_kv_bytes(replace(order, tensor_parallel=2)) == needed_kv_bytes(order) // 2


def test_every_request_of_a_hybrid_has_a_page_in_each_layer(tmp_path: Path) -> None:
    folder = make_shape("qwen3.5-27b", tmp_path, None, layers=4)
    order = Order(str(folder), "compressed-tensors", "fp8", (1, 32), (16, 4096), most_tokens=4096, steps=8)
    # 10240 channels of three tokens in two bytes, and 48 heads of 128 × 128 in four.
    page = 10240 * 3 * 2 + 48 * 128 * 128 * 4
    # Attention has the page for tokens: the 42 of each of 33 requests fit into one.
    assert needed_kv_bytes(order) == 4 * page * 33 * 2


@pytest.mark.parametrize("wrong", [[-1.0, float("nan"), -3.0], [-1.0, float("-inf")], [-2.0, -2.0]])
def test_logits_that_make_no_sense(wrong: list[float]) -> None:
    require_sensible([-1.0, -1.0, -2.0])
    with pytest.raises(SpenseError, match=r"the model's logits make no sense \(key: logprobs"):
        require_sensible(wrong)


def test_captured_are_the_batches_and_what_prefill_asks_for() -> None:
    order = Order("m", "compressed-tensors", "fp8", (1, 32, 256), (16,), None, 8)
    assert capture_sizes(order) == [1, 32, 256, 512]
    by_default = [1, 32, 256, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert capture_sizes(replace(order, quantization="spense")) == by_default
    for quantization in ("spense", "compressed-tensors"):
        ordered = replace(order, quantization=quantization, capture=1024)
        assert capture_sizes(ordered) == [1, 32, 256, 512, 768, 1024]


def test_a_summary_is_in_milliseconds() -> None:
    timing = summarize(2, 16, [3.0, 1.0, 2.0], [i / 1000 for i in range(1, 100)])
    assert timing == Timing(2, 16, 50.0, 80.0, 2000.0)
    assert summarize(1, 16, [1.0], [0.5]).spread_ms == 0


def test_rows_hold_what_the_issue_names_and_null_for_what_dense_lacks() -> None:
    timing = Timing(1, 16, 30.0, 1.0, 90.0)
    dense = Measured({(1, 16): timing}, 100.0, weight_bytes=1000, layer_kernels=14, gpu_ms={(1, 16): 28.0})
    spense = Measured(
        {(1, 16): Timing(1, 16, 20.0, 2.0, 60.0), (8, 16): Timing(8, 16, 25.0, 2.0, 70.0)},
        120.0,
        load_s=5.0,
        search_s=15.0,
        weight_bytes=810,
        saved_bytes=200,
        gpu_ms={(1, 16): 14.0, (8, 16): 21.0},
    )
    first, second = compare(
        {"shape": "x", "layers": 2, "tensor_parallel": 1, "routing": None, "kv_cache_dtype": "fp8", "sparsity": 0.25},
        dense,
        spense,
    )
    assert first == {
        "shape": "x",
        "layers": 2,
        "tensor_parallel": 1,
        "routing": None,
        "batch": 1,
        "context": 16,
        "kv_cache_dtype": "fp8",
        "sparsity": 0.25,
        "dense_ms": 30.0,
        "spense_ms": 20.0,
        "ratio": 1.5,
        "dense_spread_ms": 1.0,
        "spense_spread_ms": 2.0,
        "prefill_dense_ms": 90.0,
        "prefill_spense_ms": 60.0,
        "prefill_ratio": 1.5,
        "gpu_dense_ms": 28.0,
        "gpu_spense_ms": 14.0,
        "gpu_ratio": 2.0,
        "dense_start_s": 100.0,
        "spense_start_s": 120.0,
        "spense_load_s": 5.0,
        "spense_search_s": 15.0,
        "dense_weight_bytes": 1000,
        "spense_weight_bytes": 810,
        "format_weight_bytes": 800,
        "dense_layer_kernels": 14,
        "spense_layer_kernels": None,
    }
    assert second["spense_ms"] == 25.0
    assert second["ratio"] is second["dense_ms"] is second["prefill_ratio"] is second["gpu_ratio"] is None


def test_the_gpu_is_busy_while_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that overlap, one inside of another, a gap; in ms of one of the steps."""
    spans = [(0, 2000), (1000, 3000), (7000, 9000), (7500, 8000), (9000, 9800)]
    events = [KernelRun("kernel", start, end) for start, end in reversed(spans)]
    monkeypatch.setattr(Bench, "profiled", lambda *_: events)
    assert Bench.__new__(Bench).gpu_ms(1, 16) == (3.0 + 2.8) / 8


def test_a_layers_kernels_are_what_runs_once_for_each() -> None:
    # Twice a layer, in all layers but the last, once a step, and in a profile that missed some of one step.
    assert layer_kernels([128.0, 63.0, 1.0, 191.9], 64) == 2 + 1 + 0 + 3
    assert layer_kernels([], 64) is None


def test_saved_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    dense, half = (
        json.loads((make_shape("qwen3-32b", tmp_path / str(sparsity), sparsity) / "config.json").read_text())
        for sparsity in (None, 0.5)
    )
    assert saved_bytes(dense) == 0
    # Everything is sparse, and sparse weights keep 0.625 of their bytes.
    assert saved_bytes(half) == 64 * 3 * 5120 * 25600 * 0.375
    mixture = json.loads((make_shape("glm-4.5-air", tmp_path / "mixture", 0.5, layers=3) / "config.json").read_text())
    # A dense layer, and two with a shared expert beside 128.
    assert saved_bytes(mixture) == 3 * 4096 * (10944 + 2 * 129 * 1408) * 0.375


def test_routing_without_experts_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["decode_speed.py", "--routing", "skewed"])
    with pytest.raises(SystemExit):
        decode_speed.parse()
    assert "--routing: qwen3-32b has no experts" in capsys.readouterr().err
    for shape, found in (("qwen3-32b", None), ("qwen3-30b-a3b", "balanced")):
        monkeypatch.setattr(sys, "argv", ["decode_speed.py", "--shape", shape])
        assert decode_speed.parse().routing == found


def fake_engines(monkeypatch: pytest.MonkeyPatch, code: int = 0) -> list[dict[str, Any]]:
    """Replaces engine processes by an answer: twice as fast when they are Spense's."""
    orders: list[dict[str, Any]] = []

    class Engine:
        """As `subprocess.Popen`; it begins when it gets a line of input."""

        returncode = code

        def __init__(self, command: list[str], stdout: TextIO, **_: Any) -> None:
            self.order, self.answer = json.loads(command[3]), Path(command[4])
            stdout.write("the engine's last words\n")

        def communicate(self, line: str) -> None:
            assert line == "\n\n"
            order = self.order
            orders.append(order)
            ms = 1.0 if order["quantization"] == "spense" else 2.0
            found = [Timing(batch, context, ms, 0.1, ms) for context in order["contexts"] for batch in order["batches"]]
            answer = {
                "start_s": 1.0,
                "plugin_load_s": 0.5,
                "weight_bytes": 10**6,
                "gpu_ms": [],
                "timings": [vars(timing) for timing in found],
            }
            if not code:
                self.answer.write_text(json.dumps(answer))

        def kill(self) -> None:
            pass

    fake = SimpleNamespace(Popen=Engine, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(engine_runs, "subprocess", fake)
    return orders


def measure(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    command = ["decode_speed.py", "--shape", "tiny", "--batches", "1", "8", "--contexts", "16", "32", *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    decode_speed.main()


def test_what_other_code_measured_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engines = fake_engines(monkeypatch)
    arguments = ("--sparsities", 0.5, "--kv", "auto", "--work", tmp_path / "work", "--out", tmp_path / "out.json")
    for code, measured in (("old", 2), ("old", 2), ("new", 4), ("old", 4)):
        monkeypatch.setattr(engine_runs, "circumstances", lambda code=code: {"code": code})
        measure(monkeypatch, *arguments)
        assert len(engines) == measured


def test_every_combination_is_a_row_and_finished_engines_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    orders = fake_engines(monkeypatch)
    out = tmp_path / "out.json"
    measure(monkeypatch, "--work", tmp_path / "work", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    keys = {(row["kv_cache_dtype"], row["sparsity"], row["batch"], row["context"]) for row in rows}
    assert len(keys) == len(rows) == 2 * 3 * 2 * 2
    assert all(row["ratio"] == 2 for row in rows)
    assert [(order["kv_cache_dtype"], order["quantization"]) for order in orders] == [
        (kv, name) for kv in ("auto", "fp8") for name in ("compressed-tensors", "spense", "spense", "spense")
    ]
    assert out.with_suffix(".png").stat().st_size > 10_000

    measure(monkeypatch, "--work", tmp_path / "work", "--out", out)
    assert len(orders) == 8
    measure(monkeypatch, "--work", tmp_path / "work", "--out", out, "--steps", "9", "--kv", "fp8")
    assert len(orders) == 12


def test_a_failing_engine_shows_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_engines(monkeypatch, code=3)
    with pytest.raises(SpenseError, match=r"the engine's last words\nthe engine of tiny-dense-.* ended with code 3"):
        measure(monkeypatch, "--out", tmp_path / "out.json")


class Server(BaseHTTPRequestHandler):
    """Sends each token some 10 ms after the one before, the last half of them in one chunk."""

    prompts: ClassVar[list[list[int]]] = []
    #: Milliseconds that a token really took, of each request: a busy machine sleeps longer.
    paces: ClassVar[list[float]] = []

    def do_GET(self) -> None:
        self.reply(json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}), "application/json")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompts.append(request["prompt"])
        assert request["ignore_eos"]
        self.reply("", "text/event-stream")
        counts = [*range(1, request["max_tokens"] // 2 + 1), request["max_tokens"]]
        sent = []
        for before, tokens in zip([0, *counts], counts, strict=False):
            time.sleep(0.01 * (tokens - before))
            sent.append(time.perf_counter())
            self.event([{"index": 0, "text": "x"}], tokens)
        self.paces.append(1e3 * (sent[-1] - sent[0]) / (counts[-1] - counts[0]))
        self.event([], request["max_tokens"])
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, choices: list[dict[str, Any]], tokens: int) -> None:
        usage = {"completion_tokens": tokens, "prompt_tokens": 1, "total_tokens": tokens + 1}
        data = {"id": "1", "object": "text_completion", "choices": choices, "usage": usage}
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def reply(self, body: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_server_is_timed_by_tokens_not_by_chunks(url: str) -> None:
    Server.prompts.clear()
    Server.paces.clear()
    found = time_server(url, [1, 4], [16, 32], 12)
    assert sorted(len(prompt) for prompt in Server.prompts) == [16] * 6 + [32] * 5
    assert len({tuple(prompt) for prompt in Server.prompts}) == 11
    assert found.keys() == {(1, 16), (4, 16), (1, 32), (4, 32)}
    # By chunks they would take nearly twice as long.
    assert all(0.75 * min(Server.paces) < timing.ms < 1.25 * max(Server.paces) for timing in found.values())
    assert all(timing.prefill_ms >= 10 for timing in found.values())


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(SpenseError, match=r"http://127\.0\.0\.1:9/v1: Connection error"):
        time_server("http://127.0.0.1:9/v1", [1], [16], 8)


def test_one_server_is_rows_without_a_ratio(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure(monkeypatch, "--url", url, "--out", tmp_path / "out.json", "--steps", 8)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 16), (8, 16), (1, 32), (8, 32)]
    assert all(row["ratio"] is None and row["spense_ms"] for row in rows)
