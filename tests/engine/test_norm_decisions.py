"""Which norms hand on FP8, and which down_proj leave their GEMM to a norm, in models as vLLM builds them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from norm_decisions import annotate, decisions
from tiny_models import tiny_model

from benchmarks.served_models import IMAGE, MODELS, Model, make

pytestmark = pytest.mark.engine

#: Readers of a layer's norms → whether they take FP8, which on a CPU qkv does not.
TAKES_FP8 = {"self_attn.qkv_proj": False, "mlp.gate_up_proj": True}
#: Of down: whether it defers to the next norm, its GEMM applies the scales, and each region has an output of its own.
FUSED, LEFT = [True, False, True], [False, False, False]
LLAMA_IN_LLAVA = Model(
    "LlavaForConditionalGeneration",
    top={"image_token_index": IMAGE, "vision_feature_layer": -1},
    vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14},
)  # fmt: skip
#: vLLM's code of the others imports it.
SEES = importlib.util.find_spec("torchvision") is not None
TEXT = ("llama", "llama with biases", "qwen2", "qwen3", "mistral", "seed-oss")
SEEING = {
    "LLaVA": LLAMA_IN_LLAVA,
    **{name: MODELS[name] for name in ("Qwen2.5-VL", "Mistral-3", "Qwen3-VL", "Qwen3.5")},
}


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("decisions")
    made: dict[str, Path] = {name: annotate(tiny_model(name, folder / name.replace(" ", "-"))) for name in TEXT}
    for name, model in SEEING.items() if SEES else ():
        make(model, folder / name)
        made[name] = annotate(folder / name)
    found = decisions([*made.values()], folder / "answers.json")
    return {name: found[path] for name, path in made.items()}


@pytest.mark.parametrize("name", TEXT)
def test_language_models(decided: dict[str, Any], name: str) -> None:
    found = decided[name]
    if found["class"].startswith("Transformers"):
        # Whose layers add up themselves.
        assert not any(takes for _, takes in found["norms"].values())
        assert [*found["down"].values()] == [LEFT] * 2
    else:
        require_fused(found, "model.layers")


@pytest.mark.skipif(not SEES, reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2.5-VL", "Mistral-3"])
def test_plain_language_models_of_multimodal_ones(decided: dict[str, Any], name: str) -> None:
    require_fused(decided[name], "language_model.model.layers")


@pytest.mark.skipif(not SEES, reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen3.5"])
def test_layers_between_which_more_is_done(decided: dict[str, Any], name: str) -> None:
    found = decided[name]
    assert not any(takes for _, takes in found["norms"].values())
    assert len(found["down"]) == 2
    assert all(each == LEFT for each in found["down"].values())


def require_fused(found: dict[str, Any], layers: str) -> None:
    before = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}
    assert found["norms"] == {
        f"{layers}.{i}.{before[reader]}": [f"{layers}.{i}.{reader}", takes]
        for i in range(2)
        for reader, takes in TAKES_FP8.items()
    }
    assert found["down"] == {f"{layers}.{i}.mlp.down_proj": FUSED for i in range(2)}
