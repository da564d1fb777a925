"""How long a model's sequences may be, and calibration text that keeps to it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig

from offline_prune.calibration.context_length import context_length, fit_to_context
from offline_prune.runtime import deterministic_reduce


def llama(rope: dict[str, Any] | None = None, positions: int = 4096) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=positions, rope_parameters=rope and {"rope_theta": 1e4, **rope})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (llama(), 4096),
        # The factor comes on top of these.
        (llama({"rope_type": "linear", "factor": 4.0}), 16384),
        (llama({"rope_type": "dynamic", "factor": 2.0}), 8192),
        # In these max_position_embeddings is what scaling has reached.
        (
            llama(
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                131072,
            ),
            131072,
        ),
        (llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}), 4096),
        # A window is no limit to the sequence.
        (MistralConfig(max_position_embeddings=32768, sliding_window=4096), 32768),
        # Only full attention is scaled, and the windows of the others have the positions they were trained with.
        (
            Gemma3TextConfig(
                max_position_embeddings=8192,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            8192,
        ),
        (Gemma3Config(text_config={"max_position_embeddings": 1234}), 1234),
        (GPT2Config(n_positions=77), 77),
        (PretrainedConfig(), None),
        (PretrainedConfig.from_dict({"max_position_embeddings": None}), None),
        (PretrainedConfig.from_dict({"max_position_embeddings": -1}), None),
    ],
)
def test_context_of_a_configuration(config: PretrainedConfig, expected: int | None) -> None:
    assert context_length(config) == expected


@pytest.mark.parametrize(
    ("wanted", "context", "expected"),
    [
        ((128, 16384), None, (128, 16384)),
        ((128, 16384), 131072, (128, 16384)),
        ((128, 16384), 16384, (128, 16384)),
        ((128, 16384), 8192, (256, 8192)),
        ((128, 16384), 2048, (1024, 2048)),
        ((1, 16384), 10000, (2, 8192)),
        # 2098 would hold as many tokens, but not divide among eight ranks as 128 does.
        ((128, 16384), 1000, (2104, 996)),
        ((6, 100), 99, (8, 75)),
        ((3, 5), 1, (15, 1)),
    ],
)
def test_sequences_are_cut_to_the_context(
    wanted: tuple[int, int], context: int | None, expected: tuple[int, int]
) -> None:
    assert fit_to_context(*wanted, context) == expected


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 5000))
def test_the_number_of_tokens_stays(samples: int, length: int, context: int) -> None:
    more, shorter = fit_to_context(samples, length, context)
    assert 1 <= shorter <= max(1, min(length, context))
    assert samples * length - more < more * shorter <= samples * length
    for ranks in (1, 2, 4, deterministic_reduce.MAX_SHARDS):
        assert samples % ranks or more % ranks == 0
