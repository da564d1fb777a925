"""What Spense takes for granted of vLLM, held to the vLLM that is installed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.model import ModelConfig
from vllm.lora import utils as lora_utils
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.utils import WeightsMapper

import vllm_spense
from vllm_spense.plugin.activation import FusedSiluAndMul
from vllm_spense.plugin.config import SpenseConfig, complete_engine
from vllm_spense.plugin.experts import DenseExpertsMethod, RegionExpertsMethod
from vllm_spense.plugin.unpruned_linear import UnprunedKernel, UnprunedOnCpu
from vllm_spense.plugin.vllm_internals import (
    ChannelWiseTorchFP8ScaledMMLinearKernel,
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Fp8MoEMethod,
    CutlassFP8ScaledMMLinearKernel,
    FusedMoEMethodBase,
    RoutedExperts,
    local_experts,
    mapped_name,
    on_engine_completion,
    stand_in,
)

#: What no other file of the plugin may use.
INTERNAL = (
    *("MODELS_CONFIG_MAP", "op_registry_oot", "register_oot", "_map_name", "currentframe", "f_back", "ops._C"),
    *("_all_lora_classes", "can_replace_layer", "set_lora", "_map_global_expert_id"),
)


def test_internals_are_used_in_one_file() -> None:
    files = [file for folder in vllm_spense.__path__ for file in Path(folder).rglob("*.py")]
    used = {(file.name, word) for file in files for word in INTERNAL if word in file.read_text(encoding="utf-8")}
    assert {name for name, _ in used} == {"vllm_internals.py"}


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """vLLM's table of hooks, restored afterwards."""
    before = dict(MODELS_CONFIG_MAP)
    yield MODELS_CONFIG_MAP
    MODELS_CONFIG_MAP.clear()
    MODELS_CONFIG_MAP.update(before)


class TestOnEngineCompletion:
    def test_it_follows_vllms_own_hook(self, hooks: dict[str, Any]) -> None:
        called: list[object] = []

        class Theirs(VerifyAndUpdateConfig):
            @staticmethod
            def verify_and_update_config(vllm_config: object) -> None:
                called.append(("theirs", vllm_config))

        def complete(engine: object) -> None:
            called.append(("ours", engine))

        hooks["Theirs"] = Theirs
        for _ in range(2):
            on_engine_completion(["Theirs", "Nobodys"], complete)
        hooks["Theirs"].verify_and_update_config("engine")
        assert called == [("theirs", "engine"), ("ours", "engine")]
        hooks["Nobodys"].verify_and_update_config("another")
        assert called[2:] == [("ours", "another")]
        assert issubclass(hooks["Theirs"], Theirs)

    def test_a_spense_checkpoint_registers_its_architecture_alone(self, hooks: dict[str, Any]) -> None:
        before = dict(hooks)

        class HfConfig:
            architectures = ("SomeForCausalLM",)

        assert SpenseConfig.override_quantization_method({"quant_method": "gptq"}, None, HfConfig()) is None
        assert hooks == before
        on_engine_completion(HfConfig.architectures, complete_engine)
        changed = {name for name in hooks if hooks[name] is not before.get(name)}
        assert {name for name in changed if not name.startswith("Transformers")} == {"SomeForCausalLM"}

    def test_vllm_calls_it_before_it_uses_what_it_changes(self) -> None:
        """Before the quantization config, and before the sizes of CUDA graphs are chosen."""
        source = inspect.getsource(VllmConfig.__post_init__)
        steps = ("try_verify_and_update_config()", "_get_quantization_config(", "_set_cudagraph_sizes()")
        places = [source.index(step) for step in steps]
        assert places == sorted(places)
        lookup = inspect.getsource(VllmConfig.try_verify_and_update_config)
        assert re.search(r"architecture = self\.model_config\.architecture\b", lookup)
        assert "MODELS_CONFIG_MAP.get(architecture" in lookup
        assert "cls.verify_and_update_config(self)" in lookup

    def test_vllm_says_which_model_it_is_before_that(self) -> None:
        """Whose checkpoint it is, vLLM asks with the model's configuration, while it makes its own."""
        assert "hf_config=self.hf_config" in inspect.getsource(ModelConfig._verify_quantization)
        assert "self._verify_quantization()" in inspect.getsource(ModelConfig.__post_init__)


class TestStandIn:
    def test_vllm_builds_ours(self) -> None:
        assert stand_in(FusedSiluAndMul)
        assert stand_in(FusedSiluAndMul)
        assert FusedSiluAndMul.name == SiluAndMul.name
        with set_current_vllm_config(VllmConfig()):
            assert type(SiluAndMul()) is FusedSiluAndMul

    def test_not_in_place_of_a_platforms_op(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class OfAPlatform(SiluAndMul):
            pass

        monkeypatch.setitem(op_registry_oot, "SiluAndMul", OfAPlatform)
        assert not stand_in(FusedSiluAndMul)
        assert op_registry_oot["SiluAndMul"] is OfAPlatform

    def test_only_ops_can_be_stood_in_for(self) -> None:
        assert issubclass(SiluAndMul, CustomOp)

        class Alone(torch.nn.Module):
            pass

        with pytest.raises(AssertionError):
            stand_in(Alone)  # type: ignore[type-var,arg-type]


def test_arrange_loras() -> None:
    """What it replaces, vLLM asks; `test_lora.py` has what comes of it."""
    assert "for lora_cls in _all_lora_classes:" in inspect.getsource(lora_utils.from_layer)
    assert "module.set_lora(" in inspect.getsource(LoRAModelManager.activate_adapter)
    linears = [each for each in lora_utils._all_lora_classes if issubclass(each, BaseLinearLayerWithLoRA)]
    assert {"ColumnParallelLinearWithLoRA", "RowParallelLinearWithShardedLoRA"} <= {each.__name__ for each in linears}
    for each in linears:
        assert list(inspect.signature(each.set_lora).parameters) == ["self", "index", "lora_a", "lora_b"]


def test_mapped_name() -> None:
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "vision.": None})
    assert mapped_name(mapper, "model.layers.0.mlp.up_proj") == "language_model.model.layers.0.mlp.up_proj"
    assert mapped_name(mapper, "vision.0") is None


def test_local_experts() -> None:
    layer = SimpleNamespace(
        moe_config=SimpleNamespace(num_experts=4),
        _map_global_expert_id_to_local_expert_id=lambda expert: expert - 2 if expert > 1 else -1,
    )
    assert local_experts(layer) == {2: 0, 3: 1}
    assert list(inspect.signature(RoutedExperts._map_global_expert_id_to_local_expert_id).parameters)[1:] == [
        "expert_id"
    ]


class TestClassesThatOursDeriveFrom:
    def test_experts(self) -> None:
        for method in ("create_weights", "apply"):
            base = inspect.signature(getattr(FusedMoEMethodBase, method))
            assert list(inspect.signature(getattr(RegionExpertsMethod, method)).parameters) == list(base.parameters)
        assert issubclass(DenseExpertsMethod, CompressedTensorsW8A8Fp8MoEMethod)
        stock = inspect.signature(CompressedTensorsW8A8Fp8MoEMethod.__init__).parameters
        assert list(stock)[1:4] == ["weight_quant", "input_quant", "moe"]
        made = inspect.getsource(CompressedTensorsW8A8Fp8MoEMethod)
        for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"):
            assert f'register_parameter("{name}"' in made
        loader = inspect.signature(RoutedExperts.weight_loader).parameters
        named = ["param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"]
        assert list(loader)[1:] == named
        for attribute in ("moe_config", "expert_map", "layer_name"):
            assert f".{attribute}" in inspect.getsource(RoutedExperts) or hasattr(RoutedExperts, attribute)

    def test_the_scheme_makes_its_kernel_while_it_creates_weights(self) -> None:
        source = inspect.getsource(CompressedTensorsW8A8Fp8.create_weights)
        assert "self.fp8_linear = init_fp8_linear_kernel(" in source
        assert {"is_static_input_scheme", "weight_quant"} <= set(
            inspect.signature(CompressedTensorsW8A8Fp8.__init__).parameters
        )

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (UnprunedKernel, CutlassFP8ScaledMMLinearKernel),
            (UnprunedOnCpu, ChannelWiseTorchFP8ScaledMMLinearKernel),
        ],
    )
    def test_kernels_take_the_same_arguments(self, ours: type, theirs: type) -> None:
        for method in ("apply_scaled_mm", "process_weights_after_loading"):
            mine, base = (inspect.signature(getattr(cls, method)) for cls in (ours, theirs))
            assert list(mine.parameters) == list(base.parameters), method
        assert hasattr(theirs, "_get_layer_params")
        made = "".join(inspect.getsource(cls.__init__) for cls in theirs.__mro__ if cls.__module__.startswith("vllm."))
        for attribute in ("config", "layer_param_names"):
            assert f"self.{attribute} = " in made

    def test_a_cutlass_kernel_knows_its_unpadded_size(self) -> None:
        assert "self.logical_output_size" in inspect.getsource(CutlassFP8ScaledMMLinearKernel)
        assert "cutlass_scaled_mm" in inspect.getsource(inspect.getmodule(CutlassFP8ScaledMMLinearKernel))
