"""An MLP's own code tells whether only the activation reads what gate_up puts out, and only down what that does."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm_models import HIDDEN, MLP, I, spense_config

from vllm_spense.plugin.activation import FusedSiluAndMul
from vllm_spense.plugin.config import SpenseConfig
from vllm_spense.plugin.linear import OutputSplitLinearMethod
from vllm_spense.plugin.parents import parent_of
from vllm_spense.plugin.plain_mlp import reason_against

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def config() -> Iterator[SpenseConfig]:
    made = spense_config()
    engine = VllmConfig()
    engine.quant_config = made
    with set_current_vllm_config(engine):
        yield made


def reason(mlp: nn.Module) -> str | None:
    """As the method of the MLP's gate_up asks for it."""
    (gate_up,) = (m for m in mlp.modules() if isinstance(getattr(m, "quant_method", None), OutputSplitLinearMethod))
    assert parent_of(gate_up) is mlp
    return reason_against(mlp, gate_up, FusedSiluAndMul)


class Plain(nn.Module):
    def __init__(self, config: SpenseConfig) -> None:
        super().__init__()
        self.first = MergedColumnParallelLinear(
            HIDDEN, [I, I], bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj"
        )
        self.last = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
        self.between = SiluAndMul()
        self.nothing = nn.Identity()

    def forward(self, x: Any) -> Any:
        sums, _ = self.first(x)
        return self.last(self.nothing(self.between(sums)))[0]


def test_a_plain_one_under_any_names(config: SpenseConfig) -> None:
    mlp = Plain(config)
    before = dict(mlp.named_modules())
    assert reason(mlp) is None
    assert dict(mlp.named_modules()) == before
    assert not any("forward" in vars(module) for module in before.values())


def scaled_gate(self: Plain, x: Any) -> Any:
    return self.last(self.between(self.first(x)[0] * 2))[0]


def gate_twice(self: Plain, x: Any) -> Any:
    self.first(x)
    return self.last(self.between(self.first(x)[0]))[0]


def down_of_sums(self: Plain, x: Any) -> Any:
    sums, _ = self.first(x)
    self.between(sums)
    return self.last(sums)[0]


def activation_alone(self: Plain, x: Any) -> Any:
    return self.between(self.first(x)[0])


def sums_too(self: Plain, x: Any) -> Any:
    sums, _ = self.first(x)
    return self.last(self.between(sums))[0], sums


def residual(self: Plain, x: Any) -> Any:
    return x + self.last(self.between(self.first(x)[0]))[0]


def by_numbers(self: Plain, x: Any) -> Any:
    sums, _ = self.first(x)
    return self.last(self.between(sums if sums else x))[0]


def by_size(self: Plain, x: Any) -> Any:
    sums, _ = self.first(x)
    return self.last(self.between(sums))[0] if x.shape[0] > 4 else x


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (scaled_gate, "unsupported operand"),
        (gate_twice, r"it calls first\(<x>\), then first\(<x>\), then between"),
        (down_of_sums, r"then last\(<first>\)"),
        (activation_alone, "then between"),
        (sums_too, r"it returns \(<last>, <first>\)"),
        (residual, "unsupported operand"),
        (by_numbers, "depends on numbers"),
        (by_size, "no attribute 'shape'"),
    ],
)
def test_one_whose_code_does_more(config: SpenseConfig, forward: Callable[..., Any], said: str) -> None:
    mlp = type("Other", (Plain,), {"forward": forward})(config)
    found = str(reason(mlp))
    assert re.search(said, found), found


def test_one_with_other_modules(config: SpenseConfig) -> None:
    mlp = Plain(config)
    mlp.second = SiluAndMul()
    assert "second (FusedSiluAndMul)" in str(reason(mlp))
    del mlp.second, mlp.between
    assert "first (MergedColumnParallelLinear), last (RowParallelLinear)" in str(reason(mlp))
    for layer, exchange in (("last", {"input_is_parallel": False}), ("first", {"gather_output": True})):
        mlp = Plain(config)
        vars(getattr(mlp, layer)).update(exchange)
        assert "ranks exchange" in str(reason(mlp))


def test_a_layer_that_is_in_nothing(config: SpenseConfig) -> None:
    layer = MergedColumnParallelLinear(HIDDEN, [I, I], bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj")
    assert parent_of(layer) is None
    assert reason_against(None, layer, FusedSiluAndMul) == "nothing is known of the module that gate_up is in"


#: What the constructors of vLLM's MLPs ask for, or find in a `config`.
SETTINGS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "dim": HIDDEN,
    "intermediate_size": I,
    "shared_intermediate_size": I,
    "hidden_act": "silu",
    "multiple_of": 32,
    "auto_adjust_ff_dim": False,
    "ffn_dim_multiplier": None,
    "bias": False,
    "mlp_bias": False,
    "mlp_multipliers": (0.5, 0.5),
}
#: MLPs of language models, those of multimodal ones too.
VLLMS = {
    "Llama, Mistral-3, Pixtral, LLaVA, GLM-4, Jamba": "llama.LlamaMLP",
    "Mistral": "mistral.MistralMLP",
    "Qwen2, Qwen3, Qwen2.5-VL, Qwen3-VL, InternVL": "qwen2.Qwen2MLP",
    "Qwen3.5, Qwen3-Next": "qwen2_moe.Qwen2MoeMLP",
    "Qwen3-MoE": "qwen3_moe.Qwen3MoeMLP",
    "LFM2": "lfm2.Lfm2MLP",
    "OLMo, hybrid": "olmo_hybrid.OlmoHybridMLP",
    "Exaone 4": "exaone4.Exaone4GatedMLP",
    "Granite": "granite.GraniteMLP",
    "Granite-MoE, shared, hybrid": "granitemoeshared.GraniteMoeSharedMLP",
    "DeepSeek": "deepseek_v2.DeepseekV2MLP",
    "GLM-4.5": "glm4_moe.Glm4MoeMLP",
    "StableLM": "stablelm.StablelmMLP",
    "InternLM2": "internlm2.InternLM2MLP",
    "Command R": "commandr.CohereMLP",
}


def build(name: str, config: SpenseConfig, **settings: Any) -> nn.Module:
    """One of vLLM's MLPs; skips the test if this version has none of that name."""
    module, _, of = name.partition(".")
    try:
        found = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), of)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"this version of vLLM has no {name}")
    hf_config = SimpleNamespace(**SETTINGS)
    engine = SimpleNamespace(quant_config=config, model_config=SimpleNamespace(hf_config=hf_config))
    more = {"config": hf_config, "quant_config": config, "vllm_config": engine, "prefix": MLP}
    known = {**SETTINGS, **more, **settings}
    return found(**{name: known[name] for name in inspect.signature(found).parameters if name in known})


@pytest.mark.parametrize("of", VLLMS)
def test_vllms_mlps_are_plain(config: SpenseConfig, of: str) -> None:
    config.packed_modules_mapping["w13"] = ["gate_proj", "up_proj"]
    assert reason(build(VLLMS[of], config)) is None


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("gemma2.Gemma2MLP", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "act_fn (GeluAndMul)"),
        ("falcon_h1.FalconH1MLP", {}, "object is not subscriptable"),
        ("qwen2_moe.Qwen2MoeMLP", {"expert_gate": nn.Linear(HIDDEN, 1)}, "linear(): argument 'input'"),
    ],
    ids=["GELU", "multipliers", "a gate of a shared expert"],
)
def test_vllms_mlps_that_are_not(config: SpenseConfig, name: str, settings: dict[str, Any], said: str) -> None:
    assert said in str(reason(build(name, config, **settings)))
