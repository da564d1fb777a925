"""What every way of timing a model shares."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from vllm_spense.errors import SpenseError

#: What an engine says in its log between the two lines of input that it waits for.
READY = "decode_speed: ready"
#: Tokens in one step of an engine, the same for all.
TOKEN_BUDGET = 8192
#: Logits that are looked at: of fewer, all might be equal by chance in bfloat16.
LIKELIEST = 8


@dataclass(frozen=True)
class Timing:
    """One batch of equal requests.

    Attributes:
        batch: how many requests run at once.
        context: tokens of each prompt.
        ms: median time of one output token of every request.
        spread_ms: from the 10th to the 90th percentile of the same.
        prefill_ms: from the start to the first token of the last request.
    """

    batch: int
    context: int
    ms: float
    spread_ms: float
    prefill_ms: float


def require_sensible(logprobs: Iterable[float]) -> None:
    """Of the `LIKELIEST` next tokens of a model with random weights.

    Raises:
        SpenseError: some are not numbers, or all are the same, as they are of weights near zero.
    """
    found = sorted(logprobs)
    if not all(map(math.isfinite, found)) or found[0] == found[-1]:
        raise SpenseError(f"the model's logits make no sense (key: logprobs; found: {found})")


def summarize(batch: int, context: int, prefills: Sequence[float], tokens: Sequence[float]) -> Timing:
    """Medians.

    Args:
        prefills: seconds, one for each repetition.
        tokens: seconds that an output token of every request took, as often as it was measured.
    """
    deciles = quantiles(tokens, n=10) if len(tokens) > 1 else [0.0]
    return Timing(
        batch,
        context,
        round(median(tokens) * 1e3, 4),
        round((deciles[-1] - deciles[0]) * 1e3, 4),
        round(median(prefills) * 1e3, 2),
    )


def output_tokens(batch: int, context: int, steps: int) -> int:
    """How many tokens each request generates so that the whole batch decodes for `steps` steps together.

    The first to be prefilled generates one token in every step in which another one still is.
    """
    return steps + math.ceil(batch * context / max(1, TOKEN_BUDGET - batch)) + 1


def time_steps(results: Iterator[set[str]], batch: int) -> tuple[float, list[float]]:
    """Tells prefill and decode apart.

    Args:
        results: first nothing, once all requests are there; then after every step who got a token.

    Returns:
        Seconds to the first token of the last request, and seconds of every step that all requests decoded in.
    """
    next(results)
    start = last = time.perf_counter()
    begun: set[str] = set()
    prefill, steps = 0.0, []
    for result in results:
        if not result:
            continue  # a step that was only scheduled
        now = time.perf_counter()
        if len(begun) == batch:
            if len(result) < batch:
                break  # somebody is done
            steps.append(now - last)
        begun |= result
        if len(begun) == batch and not prefill:
            prefill = now - start
        last = now
    for _ in results:
        pass
    return prefill, steps
