"""How long a model's sequences may be, and calibration text cut to that."""

from __future__ import annotations

import math
from collections.abc import Callable

from transformers import PretrainedConfig

from offline_prune.runtime import deterministic_reduce

#: Kinds of RoPE scaling whose factor comes on top of `max_position_embeddings`; with all others it is in there already.
_EXTENDING = ("linear", "dynamic")


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence, in tokens, that a model was made for; None if its configuration does not say.

    It is `max_position_embeddings` of the language model, times the factor of RoPE scaling that extends it. Where kinds
    of layers have RoPE of their own, the shortest counts. A sliding window limits what a token sees, not how long a
    sequence is.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    return int(positions * min(_extension(kind) for kind in kinds))


def _extension(rope: dict[str, object]) -> float:
    factor = rope.get("factor")
    return max(float(factor), 1.0) if rope.get("rope_type") in _EXTENDING and isinstance(factor, int | float) else 1.0


def fit_to_context(samples: int, length: int, context: int | None) -> tuple[int, int]:
    """Calibration sequences of about as many tokens in all, none longer than a model's context.

    Args:
        samples, length: as wanted.
        context: in tokens; None if unknown.

    Returns:
        The same if they fit; else the fewest samples, of equal length, that hold at most `samples · length` tokens and
        fewer than one a sample less. They divide among as many ranks as the wanted samples do, and do not depend on how
        many ranks there are.
    """
    if context is None or length <= context:
        return samples, length
    step = math.gcd(samples, deterministic_reduce.MAX_SHARDS)
    more = -(-samples * length // (context * step)) * step
    return more, samples * length // more


def within_context(
    samples: int, length: int, config: PretrainedConfig, text: str, say: Callable[[str], None]
) -> tuple[int, int]:
    """`samples` and `length` of sequences that a model was made for: what it makes of longer ones says little about it.

    Args:
        text: what the sequences are of, for the message.
        say: told where they are other than wanted.
    """
    context = context_length(config)
    more, shorter = fit_to_context(samples, length, context)
    if shorter != length:
        wanted = f"{samples} × {length}"
        say(f"{text}: {more} × {shorter} tokens instead of {wanted}, because the model's context is {context}")
    return more, shorter
