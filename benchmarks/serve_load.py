"""Stock FP8 and Spense under load: vLLM's OpenAI-compatible servers and `vllm bench serve`, 1024 tokens in, 256 out.

    python benchmarks/serve_load.py

serves the shape of Qwen3-32B with random weights and writes benchmarks/results/serve_load.json: requests/s, output
tokens/s, times to the first token (TTFT) and of each further one (TPOT), at each number of concurrent requests. Steps
mix prefill and decode there, in chunks, as vLLM does by default; only prefix caching is off. One server is measured at
a time, while the next one imports vLLM; `--together` starts several at once where a GPU has room for them. The same
command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.alternatives_table import STOCK
from benchmarks.bench_client import Client, ClientEnded, arguments
from benchmarks.command_line import add_out, mlp_sparsity, positive, run_main, writable_folder
from benchmarks.engine_runs import in_turn
from benchmarks.envelope import ROOT, circumstances, print_row, write_result
from benchmarks.make_shape import kv_cache_bytes, make_shape
from benchmarks.random_server import EXTENSION, FILL, GO, write_tokenizer
from benchmarks.timings import LIKELIEST, require_sensible
from scripts.bootstrap import kind
from scripts.pruned import CACHE
from scripts.server import HOST, Server, ServerFailed, exit_on_signals, free_port, last_lines, starting_vllm
from vllm_spense.errors import SpenseError
from vllm_spense.shapes import SHAPES

NAME = "the-model"
CONCURRENCIES = (16, 64, 128, 256)
SPARSITIES = (0.375, 0.25, 0.5)
#: Fewer requests than this would start and end together.
LEAST_PROMPTS = 64
#: Of a GPU's memory, what servers that share it may take.
_SHARED = 0.85
_ANSWER_SECONDS = 600
#: Of the row → of `vllm bench serve`.
_FIELDS = {
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}

Row = dict[str, Any]


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    # Stock first, and of each type of KV cache all at once: what is compared is measured within minutes.
    runs = [LoadRun(options, sparsity, kv) for kv in options.kv for sparsity in (None, *options.sparsities)]
    failed = []
    with Client(options.work / "bench.log") as client, closing(in_turn(runs, options.together)) as turns:
        for run in turns:
            try:
                run.measure(client)
            except ClientEnded:
                raise
            except SpenseError as error:
                print(error, file=sys.stderr, flush=True)
                failed.append(run.stem)
            # After each server, so that a run that is cut short leaves what it has.
            write_result(options.out, "serve_load", rows(options, runs))
    for row in rows(options, runs):
        print_row(row)
    if failed:
        sys.exit(f"not all was measured at these servers: {', '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=positive, help="fewer layers than the shape has")
    parser.add_argument("--sparsities", nargs="*", type=mlp_sparsity, default=SPARSITIES, help="beside stock FP8")
    parser.add_argument(
        "--kv", nargs="+", choices=("auto", "fp8"), default=("fp8", "auto"), help="type of the KV cache"
    )
    parser.add_argument("--concurrencies", nargs="+", type=positive, default=CONCURRENCIES, help="requests at once")
    parser.add_argument("--input", type=positive, default=1024, help="tokens of a prompt")
    parser.add_argument("--output", type=positive, default=256, help="tokens of a completion")
    parser.add_argument(
        "--prompts-per-client", type=positive, default=2, help="requests for each that runs at once, of all at least 64"
    )
    parser.add_argument("--least-prompts", type=positive, default=LEAST_PROMPTS, help="instead of 64")
    parser.add_argument("--together", type=positive, default=1, help="servers that share the GPU's memory")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture, as always on a CPU")
    parser.add_argument(
        "--work", type=writable_folder, default=str(CACHE / "serve_load"), help="for logs and what was measured"
    )
    add_out(parser, "serve_load")
    options = parser.parse_args()
    # Without any, a server would be taken for stock.
    if not all(options.sparsities):
        parser.error(f"--sparsities: found {[*options.sparsities]}, expected above 0")
    length, most = options.input + options.output, SHAPES[options.shape]["max_position_embeddings"]
    if length > most:
        parser.error(f"--input and --output: found {length} tokens together, expected at most {options.shape}'s {most}")
    options.work = options.work.resolve()
    return options


class LoadRun:
    """A server that is measured at every number of concurrent requests, or what the same code measured of it before.

    Args:
        sparsity: of the MLPs; None for stock FP8.
        kv: type of the KV cache.
    """

    def __init__(self, options: argparse.Namespace, sparsity: float | None, kv: str) -> None:
        self.options, self.sparsity, self.kv = options, sparsity, kv
        self.on_cpu = kind() == "cpu"
        self.scheme = STOCK if sparsity is None else f"spense-{100 * sparsity:g}"
        name = f"{options.shape}-{options.layers or SHAPES[options.shape]['num_hidden_layers']}-{self.scheme}"
        self.folder = make_shape(options.shape, options.work / name, sparsity, options.layers)
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        write_tokenizer(self.folder, self.config["vocab_size"])
        order = [self.config, *self.server_options(), options.input, options.output, circumstances()]
        self.stem = f"{name}-kv-{kv}-{sha256(json.dumps(order).encode()).hexdigest()[:8]}"
        self.log, self.go = (options.work / f"{self.stem}.{suffix}" for suffix in ("log", "go"))
        self.context = ExitStack()
        self.server: Server | None = None
        self.search_s: float | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return self.server and self.server.process

    def server_options(self) -> list[str]:
        """Of vLLM, the same for stock and Spense but for `--quantization`."""
        options = self.options
        wanted = {
            "served-model-name": NAME,
            "quantization": "compressed-tensors" if self.sparsity is None else "spense",
            "kv-cache-dtype": self.kv,
            "max-model-len": options.input + options.output,
            "load-format": "dummy",
            "worker-extension-cls": EXTENSION,
        }
        if options.together > 1:
            # What the others take would be mistaken for this one's.
            batch = max(options.concurrencies), options.input + options.output
            wanted["kv-cache-memory-bytes"] = kv_cache_bytes(self.config, self.kv, [batch])
            wanted["gpu-memory-utilization"] = round(_SHARED / options.together, 4)
        flags = ["--no-enable-prefix-caching", *(["--enforce-eager"] if options.eager and not self.on_cpu else [])]
        return [*(text for name, value in wanted.items() for text in (f"--{name}", str(value))), *flags]

    def start(self) -> None:
        """Lets the server import vLLM, which takes long, while another one still has the GPU."""
        if self.server or not self.missing():
            return
        self.go.unlink(missing_ok=True)
        env = {
            GO: str(self.go),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            # How long the server waits for its own worker, which waits for its turn.
            "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
            # For /collective_rpc.
            "VLLM_SERVER_DEV_MODE": "1",
        }
        if self.on_cpu:
            # Threads pinned to cores that clients use too wait for each other in every operation.
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        options = self.server_options()
        starting = starting_vllm(self.folder, free_port(), self.log, self.on_cpu, *options, env=env)
        self.server = self.context.enter_context(starting)

    def begin(self) -> None:
        """Lets the server have the GPU."""
        if self.server and not self.go.exists():
            self.server = replace(self.server, started=time.monotonic())
            self.go.touch()

    def wait_until_ready(self) -> None:
        """Returns, too, when the server fails, which `measure` reports."""
        if self.server:
            with suppress(ServerFailed):
                self.server.wait_until_ready()

    def measure(self, client: Client) -> None:
        """Measures what is not yet, and ends the server.

        Raises:
            SpenseError: the server or a request failed; shows the end of the log.
        """
        if not self.missing():
            print(f"{self.stem}: measured before", flush=True)
            return
        try:
            self.start()
            self.begin()
            assert self.server is not None
            self.server.wait_until_ready()
            ask(self.server, "/collective_rpc", {"method": FILL})
            require_finite(self.server)
            for concurrency in self.missing():
                print(f"{self.stem}: {concurrency} at once", flush=True)
                self.run_bench(client, self.server, concurrency)
        except ServerFailed as error:
            raise SpenseError(str(error.code)) from None
        finally:
            self.stop()

    def run_bench(self, client: Client, server: Server, concurrency: int) -> None:
        """Measures one number of concurrent requests.

        Raises:
            SpenseError: not all requests were answered in full.
        """
        options, result = self.options, self.result(concurrency)
        prompts = self.prompts(concurrency)
        unfinished = result.with_suffix(".unfinished")
        lengths = options.input, options.output
        url = server.url.removesuffix("/v1")
        client.run(arguments(url, NAME, self.folder, lengths, concurrency, prompts, unfinished))
        found = json.loads(unfinished.read_text(encoding="utf-8"))
        expected = {
            "completed": prompts,
            "total_input_tokens": prompts * options.input,
            "total_output_tokens": prompts * options.output,
        }
        for key, number in expected.items():
            if found[key] != number:
                raise SpenseError(
                    f"{last_lines(self.log)}\n{self.stem}, {concurrency} at once: of `vllm bench serve` (key: {key}; "
                    f"found: {found[key]}; expected: {number}); the end of {self.log} is above"
                )
        unfinished.rename(result)

    def stop(self) -> None:
        self.context.close()

    def prompts(self, concurrency: int) -> int:
        return max(self.options.prompts_per_client * concurrency, self.options.least_prompts)

    def result(self, concurrency: int) -> Path:
        """What `vllm bench serve` has written, once it is whole."""
        return self.options.work / f"{self.stem}-{concurrency}-of-{self.prompts(concurrency)}.json"

    def missing(self) -> list[int]:
        """Numbers of concurrent requests that are still to be measured."""
        return [each for each in self.options.concurrencies if not self.result(each).exists()]

    def found(self) -> Mapping[int, Mapping[str, Any]]:
        """What was measured, by the number of concurrent requests."""
        files = {each: self.result(each) for each in self.options.concurrencies}
        return {each: json.loads(file.read_text(encoding="utf-8")) for each, file in files.items() if file.exists()}


def ask(server: Server, path: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The answer to a POST with JSON.

    Raises:
        SpenseError: it is no success; shows the end of the server's log.
    """
    body = json.dumps(request).encode()
    post = urllib.request.Request(
        f"http://{HOST}:{server.port}{path}", body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(post, timeout=_ANSWER_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = f"{error}: {error.read().decode(errors='replace')}"
    except OSError as error:
        said = str(error)
    raise SpenseError(f"{last_lines(server.log)}\n{path}: {said}; the end of {server.log} is above")


def require_finite(server: Server) -> None:
    """Runs one request and looks at what the model makes of it.

    Raises:
        SpenseError: logits that are not numbers, or all the same.
    """
    request = {"model": NAME, "prompt": [*range(10, 26)], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    answer = ask(server, "/v1/completions", {**request, "logprobs": LIKELIEST})
    for likeliest in answer["choices"][0]["logprobs"]["top_logprobs"]:
        require_sensible(likeliest.values())


def rows(options: argparse.Namespace, runs: Sequence[LoadRun]) -> list[Row]:
    """One row for each type of KV cache, scheme and number of concurrent requests that was measured.

    `ratio` is output tokens/s over stock's; None where stock was not measured.
    """
    result = []
    stock = {run.kv: run.found() for run in runs if run.sparsity is None}
    for run in runs:
        for concurrency, measured in run.found().items():
            row = {name: round(measured[field], 4) for name, field in _FIELDS.items()}
            theirs = stock[run.kv].get(concurrency)
            result.append(
                {
                    "shape": options.shape,
                    "layers": run.config["num_hidden_layers"],
                    "scheme": run.scheme,
                    "sparsity": run.sparsity or 0.0,
                    "kv_cache_dtype": run.kv,
                    "concurrency": concurrency,
                    "input": options.input,
                    "output": options.output,
                    "prompts": run.prompts(concurrency),
                    **row,
                    "ratio": theirs and round(measured["output_throughput"] / theirs["output_throughput"], 4),
                }
            )
    return result


if __name__ == "__main__":
    exit_on_signals()
    run_main(main)
