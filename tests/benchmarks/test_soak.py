"""Clients of the soak benchmark at a server that is made up; the benchmark itself records a day with real ones."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import clients, soak
from benchmarks.soak import Wrong


class Server:
    """Streams a token every hundredth of a second, and now and then one too few.

    Attributes:
        open: streams that are being read.
    """

    def __init__(self, lazy: bool = False) -> None:
        self.completions = self
        self.lazy = lazy
        self.open = 0

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def create(self, max_tokens: int, **_: Any) -> Stream:
        return Stream(self, max_tokens - self.lazy)


class Stream:
    def __init__(self, server: Server, tokens: int) -> None:
        self.server, self.tokens = server, tokens

    async def __aenter__(self) -> Stream:
        self.server.open += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.open -= 1

    async def __aiter__(self) -> AsyncIterator[Any]:
        for i in range(self.tokens):
            await asyncio.sleep(0.01)
            reason = "length" if i + 1 == self.tokens else None
            usage = SimpleNamespace(completion_tokens=i + 1)
            yield SimpleNamespace(usage=usage, choices=[SimpleNamespace(finish_reason=reason)])


def stream(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[clients.Outcome, list[int]]:
    monkeypatch.setattr(clients, "AsyncOpenAI", lambda **_: server)
    monkeypatch.setattr(clients, "_PATIENCE", (0.0, 0.02))
    halfway: list[int] = []
    outcome = asyncio.run(clients.soak("url", "model", 16, 1.0, lambda: halfway.append(server.open), most_tokens=8))
    return outcome, halfway


def test_streams_are_read_dropped_and_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    outcome, halfway = stream(server, monkeypatch)
    assert outcome.wrong == []
    assert outcome.streams > outcome.dropped > 0
    assert outcome.cancelled > 0
    assert len(outcome.first_s) >= outcome.streams + outcome.dropped
    assert outcome.tokens > outcome.streams
    assert halfway[0] > 0
    assert server.open == 0


def test_a_stream_that_ends_early_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = stream(Server(lazy=True), monkeypatch)
    assert len(outcome.wrong) == outcome.streams > 0
    assert "tokens of" in outcome.wrong[0]


def test_an_answer_outside_its_schema_is_wrong() -> None:
    soak._require_schema('{"city": "Rome", "capital": true}')
    for text in ('{"city": "Rome"}', '{"city": "Oslo", "capital": true}', '{"city": "Rome", "capital": 1}'):
        with pytest.raises(Wrong):
            soak._require_schema(text)


def test_processes_that_are_left_are_counted() -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", f"{code}; print('started', flush=True); time.sleep(60)"],
                              start_new_session=True, stdout=subprocess.PIPE)  # fmt: skip
    assert parent.stdout is not None
    parent.stdout.readline()
    assert soak._left(parent.pid) == 2
    parent.kill()
    parent.wait()
    assert soak._left(parent.pid) == 1
    os.killpg(parent.pid, signal.SIGKILL)
