"""The examples run: pruning and evaluating a tiny model, and asking a server that stands for vLLM's."""

from __future__ import annotations

import json
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_prune_and_evaluate(example, llama: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    small = ("--samples", 4, "--length", 32)
    said = example("prune.py", llama, out, "--sparsity", 0.25, *small)
    assert re.search(r"25\.0% of the MLP weights are zero", said)
    assert (out / "config.json").exists()

    said = example("evaluate.py", llama, out, *small)
    kls = re.findall(r"([\d.]+) nats per token", said)
    assert len(kls) == 3
    assert all(0 < float(kl) < 1 for kl in kls)

    same = example("evaluate.py", llama, llama, *small)
    assert same.count(" 0.0000 nats per token") == 3
    assert same.count("100.0% of the positions") == 3


def test_a_mistake_is_one_line(example, llama: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, arguments, said in (
        ("prune.py", (llama, tmp_path / "out", "--sparsity", 0.7), "error: --sparsity: found 0.7"),
        ("evaluate.py", (llama, tmp_path / "missing"), f"error: {tmp_path / 'missing'}: no such folder"),
    ):
        with pytest.raises(SystemExit, match=re.escape(said)):
            example(name, *arguments)


class Server(BaseHTTPRequestHandler):
    """As much of OpenAI's API as the example asks for."""

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "pruned", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": f"{asked['model']} heard: {asked['messages'][-1]['content']}"}
        self._answer({"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing goes to stderr."""


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_ask_a_running_server(example, url: str) -> None:  # type: ignore[no-untyped-def]
    said = example("serve_and_ask.py", "--url", url, "--question", "How are you?")
    assert "answer    pruned heard: How are you?" in said


@pytest.mark.parametrize("arguments", [(), ("CHECKPOINT", "--url", "http://127.0.0.1:1/v1")])
def test_one_of_both_is_asked(example, arguments: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        example("serve_and_ask.py", *arguments)
