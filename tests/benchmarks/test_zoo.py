"""The most used architectures prune as benchmarks/results/zoo.json says; `make zoo` tries all that transformers has."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import served
from benchmarks.zoo import EXPECTED, TABLE, Architecture, Outcome, architectures, attempt, known, table, undrawn

MOST_USED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "glm4": "Glm4ForCausalLM",
    "glm4v": "Glm4vForConditionalGeneration",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "bamba": "BambaForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


@pytest.mark.parametrize("model_type", MOST_USED)
def test_the_most_used(model_type: str, tmp_path: Path) -> None:
    architecture = Architecture(model_type, MOST_USED[model_type])
    with undrawn():
        found = attempt(architecture, tmp_path)
    assert found == known()[architecture.key]


def test_nothing_ends_in_a_traceback_and_everything_else_is_refused_for_a_reason() -> None:
    outcomes = known()
    assert {each.key for each in architectures()} == set(outcomes)
    for key, outcome in outcomes.items():
        assert outcome.result in {"prunes", "prunes with --skip-unsupported", "refused", "not built"}, key
        assert bool(outcome.why) == (outcome.result in {"refused", "not built"}), key
        assert (outcome.pruned > 0) == outcome.result.startswith("prunes"), key


def test_the_table_is_made_from_what_was_found() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(known())


def test_whatever_stock_vllm_serves_is_served() -> None:
    outcomes = served.known()
    assert set(outcomes) == set(served.MODELS)
    assert {outcome.result for outcome in outcomes.values()} <= {"served", "stock cannot"}


def test_the_table_has_every_model_type() -> None:
    outcomes = {"llama LlamaForCausalLM": Outcome("prunes", gated=True, pruned=4, blocks=4)}
    assert "llama" in table(outcomes)
    assert EXPECTED.exists()
