"""Times a running OpenAI-compatible server as its clients see it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence

from openai import AsyncOpenAI, OpenAIError

from benchmarks.timings import Timing, summarize
from vllm_spense.errors import SpenseError

#: Token ids that every vocabulary has.
_TOKENS = range(10, 250)


def time_server(
    url: str, batches: Sequence[int], contexts: Sequence[int], steps: int
) -> Mapping[tuple[int, int], Timing]:
    """Streams that many completions at once, of random prompts, for every batch and context.

    The time of an output token is a stream's mean while all streams generate; the median of the streams counts.

    Raises:
        SpenseError: the server cannot be reached or refuses.
    """
    try:
        return asyncio.run(_time_server(url, batches, contexts, steps))
    except OpenAIError as error:
        raise SpenseError(f"{url}: {error}") from None


async def _time_server(
    url: str, batches: Sequence[int], contexts: Sequence[int], steps: int
) -> Mapping[tuple[int, int], Timing]:
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=0) as client:
        model = (await client.models.list()).data[0].id
        await _stream(client, model, 16, steps)  # warms up
        return {
            (batch, context): await _time_batch(client, model, batch, context, steps)
            for context in contexts
            for batch in batches
        }


async def _time_batch(client: AsyncOpenAI, model: str, batch: int, context: int, steps: int) -> Timing:
    start = time.perf_counter()
    streams = await asyncio.gather(*(_stream(client, model, context, steps) for _ in range(batch)))
    last_first = max(next(iter(stream)) for stream in streams)
    paces = []
    for stream in streams:
        # While some prompts are still read, tokens of the others take longer.
        steady = [(when, tokens) for when, tokens in stream.items() if when >= last_first]
        if len(steady) > 1:
            (begin, first), *_, (end, last) = steady
            paces.append((end - begin) / (last - first))
    if not paces:
        raise SpenseError(f"the first of {batch} streams ended before the last began (key: --steps; found: {steps})")
    return summarize(batch, context, [last_first - start], paces)


async def _stream(client: AsyncOpenAI, model: str, context: int, steps: int) -> dict[float, int]:
    """How many tokens had come, by the time when a chunk of them came."""
    stream = await client.completions.create(
        model=model,
        prompt=random.choices(_TOKENS, k=context),
        max_tokens=steps,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    # A chunk may hold several tokens; the last one has no choices, only the sum.
    return {time.perf_counter(): chunk.usage.completion_tokens async for chunk in stream if chunk.choices}
