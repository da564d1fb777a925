"""Models that vLLM names, maps or fuses otherwise than Llama get stock's answers, from Spense in every pruned layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.served import Outcome, known, serve
from benchmarks.served_models import MODELS, make_pruned, runs_here
from vllm_spense.errors import SpenseError
from vllm_spense.plugin.serving_check import Serving, find_class, prove_serving

pytestmark = pytest.mark.engine

#: One for each way: fused in the files and mapped by vLLM; mapped too late; by way of transformers; experts; own code
#: and a draft head.
TEXT = (
    "GLM-4",
    "StableLM",
    "Phi-3 by way of transformers",
    "Qwen3-MoE with a dense layer",
    "Mixtral",
    "MiMo with MTP, speculating",
)
SEEING = tuple(name for name, model in MODELS.items() if model.image and not model.speculates)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    return {name: make_pruned(name, folder) for name in (*TEXT, *SEEING) if runs_here(MODELS[name])}


@pytest.fixture(scope="module")
def outcomes(pruned: dict[str, Path]) -> dict[str, Outcome]:
    """All engines, one after another in one process."""
    return serve(pruned)


@pytest.mark.parametrize("name", [*TEXT, *SEEING])
def test_served_as_stock_serves_it(outcomes: dict[str, Outcome], name: str) -> None:
    if not runs_here(MODELS[name]):
        pytest.skip("torchvision is not installed")
    assert outcomes[name] == known()[name]
    assert outcomes[name].result == "served"


def test_vllm_proves_it_without_an_engine(pruned: dict[str, Path]) -> None:
    assert find_class(pruned["StableLM"]) == Serving("StableLmForCausalLM", "StablelmForCausalLM")
    assert prove_serving(pruned["StableLM"]) == Serving("StableLmForCausalLM", "StablelmForCausalLM", 4)


def test_what_vllm_does_not_build_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpenseError, match="vLLM does not build this model:\n"):
        prove_serving(tmp_path)
