"""Many clients at one server for a while, and what that leaves in its memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from openai import AsyncOpenAI

#: Token ids that every vocabulary has.
_TOKENS = range(10, 250)
#: Of all streams, the share that a client closes before its end, and the share that it gives up waiting for.
_DROPPED, _CANCELLED = 0.1, 0.05
#: Seconds after which such a client gives up.
_PATIENCE = (0.01, 2.0)


@dataclass
class Outcome:
    """
    Attributes:
        streams, dropped, cancelled: how many were read to their end, closed early, and given up.
        tokens: that came.
        first_s: seconds until the first token, of each stream.
        wrong: one line for every stream that did not go as it should.
    """

    streams: int = 0
    dropped: int = 0
    cancelled: int = 0
    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


async def soak(
    url: str,
    model: str,
    clients: int,
    seconds: float,
    halfway: Callable[[], None],
    most_tokens: int = 128,
    longest_prompt: int = 256,
) -> Outcome:
    """Every client streams one completion after another, of random prompts and lengths, until the time is up.

    Args:
        halfway: called once half of the time is over, while all clients go on.
        most_tokens, longest_prompt: of one completion.
    """
    outcome = Outcome()
    end = time.monotonic() + seconds
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as api:

        async def client(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < end:
                prompt = chance.choices(_TOKENS, k=chance.randint(1, longest_prompt))
                stream = _stream(api, model, chance, prompt, chance.randint(2, most_tokens), outcome)
                patience = chance.uniform(*_PATIENCE) if chance.random() < _CANCELLED else None
                try:
                    await asyncio.wait_for(stream, patience)
                except TimeoutError:
                    outcome.cancelled += 1
                except Exception as error:
                    outcome.wrong.append(repr(error))

        async def call_halfway() -> None:
            await asyncio.sleep(seconds / 2)
            halfway()

        await asyncio.gather(call_halfway(), *map(client, range(clients)))
    return outcome


async def _stream(
    api: AsyncOpenAI, model: str, chance: random.Random, prompt: list[int], wanted: int, outcome: Outcome
) -> None:
    stop_at = chance.randint(1, wanted - 1) if chance.random() < _DROPPED else None
    asked = time.monotonic()
    stream = await api.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=wanted,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    got, reason = 0, None
    async with stream:
        async for chunk in stream:
            if not got:
                outcome.first_s.append(time.monotonic() - asked)
            outcome.tokens += chunk.usage.completion_tokens - got
            got = chunk.usage.completion_tokens
            if stop_at is not None and got >= stop_at:
                outcome.dropped += 1
                return
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
    outcome.streams += 1
    if (got, reason) != (wanted, "length"):
        outcome.wrong.append(f"{got} tokens of {wanted}, finish_reason {reason}")


def host_bytes() -> int:
    """Memory of every process that this one has started, shared pages counted once for each."""
    return sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))
