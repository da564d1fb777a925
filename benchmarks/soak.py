"""A real client's day at vLLM's OpenAI-compatible server, with Spense and with stock vLLM on the same files.

    python -m benchmarks.soak

serves the demo's SmolLM2, asks for everything that clients ask for, lets 128 of them stream for five minutes and drop
or cancel some of it, ends the server with SIGTERM while it is busy, and writes benchmarks/results/soak.json, a row for
each server. Any checkpoint with a tokenizer and a chat template may stand in for the model: --model FOLDER. On a CPU
--random takes two small layers of random weights, so that the server has as much to do as on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from openai import APIStatusError, AsyncOpenAI, OpenAI

from benchmarks.clients import host_bytes, soak
from benchmarks.command_line import add_out, positive, readable_folder, run_main
from benchmarks.envelope import write_result
from scripts.bootstrap import kind
from scripts.demo import SERVED
from scripts.lock import appearing, locked
from scripts.pruned import CACHE, pruned
from scripts.server import CPU_ARGUMENTS, CPU_ENV, HOST, free_port, serving
from scripts.smollm2 import smollm2

NAME = "the-model"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SERVERS = {"spense": "spense", "stock": "compressed-tensors"}
MAX_MODEL_LEN = 512
#: A server that is told to end while it is busy has so long.
_ENDS_WITHIN = 60

Check = Callable[[OpenAI], None]


class Wrong(Exception):
    """An answer is not what it should be."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    served = parser.add_mutually_exclusive_group()
    served.add_argument("--model", type=readable_folder, help="a Spense checkpoint; by default the demo's")
    served.add_argument("--random", action="store_true", help="two small layers of random weights")
    parser.add_argument("--clients", type=positive, default=128)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--most-tokens", type=positive, default=128, help="of a completion")
    parser.add_argument("--longest-prompt", type=positive, default=256)
    add_out(parser, "soak")
    options = parser.parse_args()
    rows = [day(server, options.model or made(options.random), options) for server in SERVERS]
    write_result(options.out, "soak", rows)
    print(f"written: {options.out}")


def made(random: bool) -> Path:
    """The demo's checkpoint, or one of random weights."""
    dense = smollm2(CACHE / "smollm2-135m")
    return pruned(_random(dense, CACHE / "smollm2-random") if random else dense, SERVED)


def _random(source: Path, folder: Path) -> Path:
    """A model with the source's architecture and tokenizer; made once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.served_models import LAYERS

    with locked(folder):
        if not folder.exists():
            with appearing(folder) as unfinished:
                shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
                config = AutoConfig.from_pretrained(source)
                for name, value in LAYERS.items():
                    setattr(config, name, value)
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
    return folder


def day(server: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What came of one server's day.

    Returns:
        A row: `checks` has "" or what was wrong, by check; `wrong` what was wrong with streams.
    """
    print(f"{server}: starting", flush=True)
    with _server(model, SERVERS[server]) as (process, url), OpenAI(base_url=url, api_key="none", timeout=300) as client:
        checks = {name: _outcome(check, client) for name, check in CHECKS.items()}
        print(f"{server}: {json.dumps(checks)}", flush=True)
        before, memory = _answer(client), []
        outcome = asyncio.run(
            soak(
                url,
                NAME,
                options.clients,
                options.seconds,
                lambda: memory.append(host_bytes()),
                options.most_tokens,
                options.longest_prompt,
            )
        )
        memory.append(host_bytes())
        checks["idle afterwards"] = _outcome(_idle, client)
        checks["same answer afterwards"] = "" if _answer(client) == before else "it is another"
        ended = asyncio.run(_terminated(process, url, options.clients))
        row = {
            "server": server,
            "clients": options.clients,
            "seconds": options.seconds,
            "checks": checks,
            "streams": outcome.streams,
            "dropped": outcome.dropped,
            "cancelled": outcome.cancelled,
            "tokens": outcome.tokens,
            "first_token_s": round(median(outcome.first_s), 2) if outcome.first_s else None,
            "wrong": outcome.wrong,
            "host_mib": round(memory[1] / 2**20),
            "grown_mib": round((memory[1] - memory[0]) / 2**20, 1),
            "sigterm": ended,
        }
        print(f"{server}: {json.dumps(row)}", flush=True)
        return row


@contextmanager
def _server(model: Path, quantization: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", HOST, "--port", str(port), "--quantization", quantization, "--served-model-name", NAME]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        # Small models end no answer that may go on with blanks.
        form = {"backend": "xgrammar", "disable_any_whitespace": True}
        command += ["--structured-outputs-config", json.dumps(form)]
        env = {"VLLM_NO_USAGE_STATS": "1"}
        if kind() == "cpu":
            command += CPU_ARGUMENTS
            # Threads pinned to cores that clients use too wait for each other in every operation.
            env |= {**CPU_ENV, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with serving(command, port, Path(folder, "log"), env) as process:
            yield process, f"http://{HOST}:{port}/v1"


def _outcome(check: Check, client: OpenAI) -> str:
    try:
        check(client)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def _chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": QUESTION, "max_tokens": 16} | settings)


def _answer(client: OpenAI) -> str:
    return _chat(client, temperature=0).choices[0].message.content


def _models(client: OpenAI) -> None:
    found = [model.id for model in client.models.list().data]
    _require(found == [NAME], f"the models are {found}")
    _refused(404, lambda: _chat(client, model="another"))


def _refused(status: int, ask: Callable[[], object]) -> None:
    try:
        ask()
    except APIStatusError as error:
        _require(error.status_code == status, f"refused with {error.status_code}, not {status}")
        return
    raise Wrong(f"not refused with {status}")


def _streamed(client: OpenAI) -> None:
    parts = [part.choices[0].delta.content or "" for part in _chat(client, temperature=0, stream=True) if part.choices]
    found, whole = "".join(parts), _answer(client)
    _require(found == whole, f"streamed {found!r}, whole {whole!r}")


def _logprobs(client: OpenAI) -> None:
    steps = _chat(client, temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    _require(steps, "no log probabilities")
    for step in steps:
        likeliest = max(step.top_logprobs, key=lambda each: each.logprob)
        _require(len(step.top_logprobs) == 3, f"{len(step.top_logprobs)} of 3 tokens")
        _require(likeliest.token == step.token, f"greedy {step.token!r}, likeliest {likeliest.token!r}")


def _several(client: OpenAI) -> None:
    choices = _chat(client, n=3, temperature=1.0, seed=0).choices
    _require(sorted(choice.index for choice in choices) == [0, 1, 2], f"choices {[c.index for c in choices]}")
    _require(len({choice.message.content for choice in choices}) > 1, "three times the same")


#: Few possible answers, so that a small model ends in time.
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"],
    "additionalProperties": False,
}


def _require_schema(text: str) -> None:
    found = json.loads(text)
    _require(set(found) == {"city", "capital"}, f"keys {sorted(found)}")
    _require(found["city"] in ("Paris", "Rome") and isinstance(found["capital"], bool), f"values {found}")


def _schema(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA, "strict": True}}
    _require_schema(_chat(client, response_format=form, max_tokens=64, temperature=0).choices[0].message.content)


def _tools(client: OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": _SCHEMA, "strict": True}}
    for choice in ({"type": "function", "function": {"name": "look_up"}}, "required"):
        message = _chat(client, tools=[tool], tool_choice=choice, max_tokens=128, temperature=0).choices[0].message
        _require(message.tool_calls, f"no call with tool_choice {choice}")
        _require(message.tool_calls[0].function.name == "look_up", "another function")
        _require_schema(message.tool_calls[0].function.arguments)


def _too_long(client: OpenAI) -> None:
    prompt = list(range(10, 250)) * 3
    _refused(400, lambda: client.completions.create(model=NAME, prompt=prompt, max_tokens=4))


def _metrics(client: OpenAI) -> None:
    before = _counted(client, "vllm:generation_tokens_total")
    _answer(client)
    _require(_counted(client, "vllm:generation_tokens_total") > before, "the tokens are not counted")


def _counted(client: OpenAI, name: str) -> float:
    """A counter of this model at the metrics endpoint."""
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name) and f'model_name="{NAME}"' in line)


def _idle(client: OpenAI) -> None:
    """What clients dropped and cancelled does not go on."""
    deadline = time.monotonic() + 30
    while running := _counted(client, "vllm:num_requests_running") + _counted(client, "vllm:num_requests_waiting"):
        _require(time.monotonic() < deadline, f"{running:.0f} requests go on")
        time.sleep(1)


CHECKS: dict[str, Check] = {
    "model name": _models,
    "chat": lambda client: _require(_answer(client), "no answer"),
    "streamed chat": _streamed,
    "logprobs": _logprobs,
    "n > 1": _several,
    "JSON schema": _schema,
    "tools": _tools,
    "embeddings refused": lambda client: _refused(404, lambda: client.embeddings.create(model=NAME, input="a")),
    "too long refused": _too_long,
    "metrics": _metrics,
}


async def _terminated(process: subprocess.Popen[bytes], url: str, clients: int) -> dict[str, Any]:
    """SIGTERM while clients stream.

    Returns:
        Seconds until the server's process had ended and its code, how many streams ended at all, and how many of its
        processes were left.
    """
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=2 * _ENDS_WITHIN, max_retries=0) as api:
        streams = [asyncio.create_task(_endless(api)) for _ in range(clients)]
        await asyncio.sleep(5)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while process.poll() is None and time.monotonic() < start + _ENDS_WITHIN:
            await asyncio.sleep(0.05)
        seconds = time.monotonic() - start
        done, _ = await asyncio.wait(streams, timeout=30)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return {
        "seconds": round(seconds, 1),
        "code": process.poll(),
        "streams_ended": len(done),
        "processes_left": _left(process.pid),
    }


async def _endless(api: AsyncOpenAI) -> None:
    stream = await api.completions.create(
        model=NAME, prompt="a", max_tokens=MAX_MODEL_LEN - 8, stream=True, extra_body={"ignore_eos": True}
    )
    async with stream:
        async for _ in stream:
            pass


def _left(session: int) -> int:
    """Living processes of a session."""
    left = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            left += int(state[3]) == session and state[0] != "Z"
    return left


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_main(main)
