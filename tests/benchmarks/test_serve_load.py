"""Servers under load without vLLM's own server: what is started with which options, and what is made of the answers.

`tests/engine/test_engine_times.py` has a run with real servers.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_client, random_server, serve_load
from benchmarks.bench_client import FINISHED, Client, ClientEnded, arguments, command_parser
from benchmarks.make_shape import kv_token_bytes, shape_config
from benchmarks.random_server import GO, RandomWeights, wait_for_turn, write_tokenizer
from benchmarks.serve_load import LoadRun
from benchmarks.serving_tables import load
from scripts import server
from scripts.server import starting

#: Output tokens/s that the fake clients find, by scheme.
SPEEDS = {"fp8": 1000.0, "spense-37.5": 1250.0, "spense-50": 1500.0}
#: Waits for its turn, then answers as vLLM's server does; the scheme `spense-50` dies instead while there is a reason.
FAKE_SERVER = """
import http.server, json, os, sys, time
from pathlib import Path

port, folder, reason = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
while not Path(os.environ["SPENSE_SERVER_GO"]).exists():
    time.sleep(0.01)
if folder.name.endswith("spense-50") and reason.exists():
    print("RuntimeError: " + reason.read_text(), flush=True)
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    filled = False

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc":
            Handler.filled = request["method"] == "fill_with_random_values"
            answer = {}
        else:
            # Of weights near zero all tokens are as likely.
            logprobs = {"a": -1.0, "b": -2.0 if Handler.filled else -1.0}
            answer = {"choices": [{"logprobs": {"top_logprobs": [logprobs]}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class FakeClient:
    """Writes what `vllm bench serve` would; `lost` output tokens are missing from each answer.

    Attributes:
        measured: scheme and number of concurrent requests of each run.
    """

    def __init__(self) -> None:
        self.measured: list[tuple[str, int]] = []
        self.lost = 0

    def __call__(self, log: Path) -> FakeClient:
        return self

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, command: Sequence[str]) -> None:
        asked = vars(command_parser().parse_args(list(command)))
        scheme = Path(asked["tokenizer"]).name.removeprefix("tiny-2-")
        concurrency, prompts = asked["max_concurrency"], asked["num_prompts"]
        self.measured.append((scheme, concurrency))
        speed = SPEEDS[scheme] * concurrency
        found = {
            "completed": prompts,
            "total_input_tokens": prompts * asked["random_input_len"],
            "total_output_tokens": prompts * (asked["random_output_len"] - self.lost),
            "request_throughput": speed / asked["random_output_len"],
            "output_throughput": speed,
            "median_ttft_ms": 100.0,
            "p99_ttft_ms": 400.0,
            "median_tpot_ms": 20.0,
            "p99_tpot_ms": 31.25,
        }
        Path(asked["result_dir"], asked["result_filename"]).write_text(json.dumps(found))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    """In the place of `vllm bench serve`, and fake servers in that of vLLM's."""

    def fake(model: Path, port: int, log: Path, on_cpu: bool, *options: str, env: dict[str, str]) -> Any:
        return starting(
            [sys.executable, "-c", FAKE_SERVER, str(port), str(model), str(tmp_path / "reason")], port, log, env
        )

    client = FakeClient()
    monkeypatch.setattr(serve_load, "starting_vllm", fake)
    monkeypatch.setattr(serve_load, "Client", client)
    monkeypatch.setattr(server, "STOP_SECONDS", 1)
    return client


def main(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> list[dict[str, Any]]:
    command = "serve_load.py --shape tiny --kv auto --sparsities 0.375 0.5 --concurrencies 2 48 --output 8"
    files = ["--work", str(folder / "work"), "--out", str(folder / "out.json")]
    monkeypatch.setattr(sys, "argv", [*command.split(), *more, *files])
    serve_load.main()
    return json.loads((folder / "out.json").read_text())["rows"]


def record_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """All fake servers that start from now on."""
    started: list[subprocess.Popen[bytes]] = []
    start = serve_load.LoadRun.start

    def recorded(run: LoadRun) -> None:
        start(run)
        if run.process and run.process not in started:
            started.append(run.process)

    monkeypatch.setattr(LoadRun, "start", recorded)
    return started


def options(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["serve_load.py", *more, "--work", str(folder)])
    return serve_load.parse()


def test_what_other_code_measured_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for code in ("old", "old", "new"):
        monkeypatch.setattr(serve_load, "circumstances", lambda code=code: {"code": code})
        files.append(LoadRun(options(monkeypatch, tmp_path, "--shape", "tiny"), None, "auto").result(16))
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("together", ["1", "2"])
def test_every_scheme_is_compared_with_stock(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: str
) -> None:
    rows = main(monkeypatch, tmp_path, "--together", together)
    assert client.measured == [(scheme, concurrency) for scheme in SPEEDS for concurrency in (2, 48)]
    assert [(row["scheme"], row["concurrency"], row["prompts"], row["ratio"]) for row in rows] == [
        ("fp8", 2, 64, 1.0),
        ("fp8", 48, 96, 1.0),
        ("spense-37.5", 2, 64, 1.25),
        ("spense-37.5", 48, 96, 1.25),
        ("spense-50", 2, 64, 1.5),
        ("spense-50", 48, 96, 1.5),
    ]
    assert rows[3] == {
        "shape": "tiny",
        "layers": 2,
        "scheme": "spense-37.5",
        "sparsity": 0.375,
        "kv_cache_dtype": "auto",
        "concurrency": 48,
        "input": 1024,
        "output": 8,
        "prompts": 96,
        "requests_per_s": 7500.0,
        "output_tokens_per_s": 60000.0,
        "ttft_ms": 100.0,
        "ttft_p99_ms": 400.0,
        "tpot_ms": 20.0,
        "tpot_p99_ms": 31.25,
        "ratio": 1.25,
    }
    lines = load(json.loads((tmp_path / "out.json").read_text()))
    assert "| auto | 48 | Spense 37.5% | 7500.00 | 60000 | 1.25 | 100 | 400 | 20.0 | 31.2 |" in lines
    assert "tiny, 2 layers, 1024 tokens in, 8 out; medians and 99th percentiles." in lines


def test_a_server_that_dies_is_named_and_only_what_is_missing_is_measured_again(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reason").write_text("no memory left")
    with pytest.raises(SystemExit, match=r"not all was measured at these servers: tiny-2-spense-50-kv-auto-\w{8}$"):
        main(monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert "RuntimeError: no memory left\nThe server ended with code 3" in said
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["scheme"] for row in rows} == {"fp8", "spense-37.5"}
    (tmp_path / "reason").unlink()
    client.measured.clear()
    assert {row["ratio"] for row in main(monkeypatch, tmp_path)} == {1.0, 1.25, 1.5}
    assert client.measured == [("spense-50", 2), ("spense-50", 48)]


@pytest.mark.parametrize(("together", "where"), [("1", "run"), ("1", "wait"), ("2", "wait")])
def test_a_run_that_is_told_to_end_ends(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: str, where: str
) -> None:
    """By a signal, wherever it comes: that is no failure of a server, after which the next one would be measured."""
    stops = []

    def told_to_end(*_: object) -> None:
        stops.append(where)
        raise SystemExit(143)

    if where == "run":
        monkeypatch.setattr(client, "run", told_to_end)
    else:
        monkeypatch.setattr(server.Server, "wait_until_ready", told_to_end)
    started = record_processes(monkeypatch)
    with pytest.raises(SystemExit, match=r"^143$"):
        main(monkeypatch, tmp_path, "--together", together)
    assert len(stops) == 1
    assert len(started) >= 2
    assert all(process.poll() is not None for process in started)


def test_without_a_client_no_further_server_is_measured(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = []

    def end(command: Sequence[str]) -> None:
        ended.append(command)
        raise ClientEnded("no such option")

    monkeypatch.setattr(client, "run", end)
    with pytest.raises(ClientEnded):
        main(monkeypatch, tmp_path)
    assert len(ended) == 1


def test_answers_that_are_too_short_do_not_count(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.lost = 1
    with pytest.raises(SystemExit, match="not all was measured"):
        main(monkeypatch, tmp_path)
    assert "(key: total_output_tokens; found: 448; expected: 512)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == []


def test_weights_that_were_not_filled_are_noticed(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_load, "FILL", "another_method")
    with pytest.raises(SystemExit, match="not all was measured"):
        main(monkeypatch, tmp_path)
    assert "the model's logits make no sense (key: logprobs; found: [-1.0, -1.0])" in capsys.readouterr().err
    assert client.measured == []


def test_vllm_knows_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its server and of `vllm bench serve`; stock and Spense are served alike."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = {}
    for together in ("1", "4"):
        chosen = options(monkeypatch, tmp_path, "--layers", "2", "--together", together)
        for sparsity in (None, 0.375):
            run = LoadRun(chosen, sparsity, "fp8")
            parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
            found[together, sparsity] = parser.parse_args(["--model", str(run.folder), *run.server_options()])
    for together in ("1", "4"):
        stock, spense = (vars(found[together, sparsity]) for sparsity in (None, 0.375))
        differ = {name for name in stock if stock[name] != spense[name]}
        assert differ == {"model", "quantization"}
        assert (stock["quantization"], spense["quantization"]) == ("compressed-tensors", "spense")
        assert spense["max_model_len"] == 1280
        assert spense["enable_prefix_caching"] is False
        assert spense["load_format"] == "dummy"
        # As vLLM has them by default.
        assert spense["enforce_eager"] is False
        assert spense["enable_chunked_prefill"] is None
    assert found["1", None].kv_cache_memory_bytes is None
    alone = kv_token_bytes(shape_config("qwen3-32b", 2), "fp8") * 256 * 1280
    assert alone < found["4", None].kv_cache_memory_bytes < 1.02 * alone
    assert found["4", None].gpu_memory_utilization <= 0.25

    asked = command_parser().parse_args(
        arguments("http://h:1", "m", tmp_path, (1024, 256), 64, 128, tmp_path / "r.json")
    )
    assert (asked.base_url, asked.model, asked.tokenizer) == ("http://h:1", "m", str(tmp_path))
    assert (asked.random_input_len, asked.random_output_len, asked.random_range_ratio) == (1024, 256, "0.0")
    assert (asked.max_concurrency, asked.num_prompts, asked.num_warmups, asked.seed) == (64, 128, 16, 0)
    assert (asked.ignore_eos, asked.save_result, asked.temperature) == (True, True, 0)
    assert (asked.result_dir, asked.result_filename) == (str(tmp_path), "r.json")


def test_random_prompts_keep_their_length(tmp_path: Path) -> None:
    from vllm.benchmarks.datasets import RandomDataset
    from vllm.tokenizers import get_tokenizer

    (tmp_path / "config.json").write_text(json.dumps(shape_config("qwen3-32b")))
    write_tokenizer(tmp_path, 151936)
    tokenizer = get_tokenizer(str(tmp_path))
    assert len(tokenizer) == 151936
    tokens = random.choices(range(151936), k=1024)
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens
    # More characters are refused by vLLM before it counts tokens.
    assert len(tokenizer.decode([151935] * 1024)) <= 1024 * tokenizer.max_chars_per_token
    for request in RandomDataset(random_seed=0).sample(tokenizer, num_requests=4, input_len=100, output_len=8):
        assert request.prompt_len == len(tokenizer.encode(request.prompt)) == 100
        assert request.expected_output_len == 8


def test_a_worker_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(GO, raising=False)
    wait_for_turn()
    monkeypatch.setenv(GO, str(tmp_path / "go"))
    waiting = threading.Thread(target=wait_for_turn)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    (tmp_path / "go").touch()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_worker_fills_its_model() -> None:
    class Worker(RandomWeights):
        def get_model(self) -> nn.Module:
            return model

    model = nn.Linear(64, 32)
    torch.nn.init.zeros_(model.weight)
    module, _, name = random_server.EXTENSION.rpartition(".")
    assert getattr(sys.modules[module], name) is RandomWeights
    getattr(Worker(), random_server.FILL)()
    assert model.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)


def program(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """In the place of the Python that would run `vllm bench serve`."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(bench_client.sys, "executable", str(file))


def test_a_client_runs_one_command_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(monkeypatch, tmp_path, f'while read line; do echo "got $line"; echo "{FINISHED}"; done')
    with Client(tmp_path / "log") as client:
        client.run(["--a", "1"])
        client.run(["--b", "2"])
    assert (tmp_path / "log").read_text().splitlines()[::2] == ['got ["--a", "1"]', 'got ["--b", "2"]']


def test_a_client_that_ends_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(monkeypatch, tmp_path, "echo 'serve: error: no such option'; exit 2")
    with Client(tmp_path / "log") as client, pytest.raises(ClientEnded, match=r"no such option\n.*ended with code 2"):
        client.run(["--a", "1"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--concurrencies 0 1", "--concurrencies: found 0, expected at least 1"),
        ("--prompts-per-client 0", "--prompts-per-client: found 0, expected at least 1"),
        ("--least-prompts 0", "--least-prompts: found 0, expected at least 1"),
        ("--sparsities 0 0.25", "--sparsities: found [0.0, 0.25], expected above 0"),
        ("--sparsities nan", "--sparsities: found nan, expected a number from 0 to 0.5"),
        ("--input 40960", "--input and --output: found 41216 tokens together, expected at most qwen3-32b's 40960"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        options(monkeypatch, tmp_path, *arguments.split())
    assert said in capsys.readouterr().err
