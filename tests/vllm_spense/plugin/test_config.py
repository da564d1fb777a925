"""vLLM's layers under SpenseConfig, without an engine."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from vllm.model_executor.models.utils import WeightsMapper
from vllm_models import (
    HIDDEN,
    MLP,
    I,
    dequantized,
    load,
    quantization_config,
    sparse_weight,
)

import vllm_spense
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import KEY
from vllm_spense.ops.elementwise_ops import INDUCTOR_OPTIONS
from vllm_spense.plugin.config import SpenseConfig
from vllm_spense.plugin.linear import InputSplitLinearMethod, OutputSplitLinearMethod
from vllm_spense.plugin.pairing import Pairing, Quantized
from vllm_spense.plugin.unpruned_linear import UnprunedFp8

pytestmark = pytest.mark.usefixtures("world")


def gate_up(config: SpenseConfig, prefix: str = f"{MLP}.gate_up_proj", bias: bool = False) -> Any:
    return MergedColumnParallelLinear(HIDDEN, [I, I], bias=bias, quant_config=config, prefix=prefix)


def test_registration_is_idempotent() -> None:
    vllm_spense.register()
    vllm_spense.register()
    assert get_quantization_config("spense") is SpenseConfig


def test_whose_checkpoint_it_is() -> None:
    ask = SpenseConfig.override_quantization_method
    ours, other = quantization_config(), {"quant_method": "gptq", "bits": 4}
    assert ask(ours, None) == ask(ours, "spense") == "spense"
    assert ask(ours, "compressed-tensors") is None
    assert ask(other, None) is ask(other, "gptq") is ask(None, None) is ask(None, "spense") is None
    with pytest.raises(FormatError, match=r"file: /m/config\.json; key: quantization_config\.spense; found: nothing"):
        ask(other, "spense", hf_config=SimpleNamespace(_name_or_path="/m"))


def test_a_broken_annotation_does_not_pass_unseen() -> None:
    with pytest.raises(FormatError, match=r"file: /m/config\.json; key: version; found: 9"):
        SpenseConfig.override_quantization_method(
            quantization_config(version=9), None, SimpleNamespace(_name_or_path="/m")
        )


def test_research_checkpoint() -> None:
    assert SpenseConfig.get_config_filenames() == ["spense.json"]
    with pytest.raises(SpenseError, match="pruned but not quantized"):
        SpenseConfig.from_config(quantization_config()[KEY])


def test_travels_to_other_processes(config: SpenseConfig) -> None:
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied.annotation == config.annotation
        assert copied.layers == config.layers


def test_scales_may_be_inlined_unless_the_user_says_otherwise(config: SpenseConfig) -> None:
    options = get_current_vllm_config().compilation_config.inductor_compile_config
    first, *others = INDUCTOR_OPTIONS
    options[first] = 1
    gate_up(config)
    assert options[first] == 1
    assert others
    assert all(options[name] == INDUCTOR_OPTIONS[name] for name in others)


def test_only_pruned_layers_are_ours(config: SpenseConfig) -> None:
    assert isinstance(gate_up(config).quant_method, OutputSplitLinearMethod)
    down = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
    assert isinstance(down.quant_method, InputSplitLinearMethod)
    config.ignore.append("re:.*layers.1.*")
    other = gate_up(config, "model.layers.1.mlp.gate_up_proj")
    assert isinstance(other.quant_method, UnquantizedLinearMethod)


def test_unpruned_fp8_layers_get_our_scheme_and_others_keep_vllms(
    config: SpenseConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        get_current_vllm_config(), "model_config", SimpleNamespace(dtype=torch.float32, architectures=[])
    )
    layer = torch.nn.Linear(HIDDEN, HIDDEN)
    found = config.get_scheme(layer, "model.layers.0.self_attn.o_proj")
    assert type(found) is UnprunedFp8
    static = CompressedTensorsW8A8Fp8(found.weight_quant, is_static_input_scheme=True)
    per_tensor = CompressedTensorsW8A8Fp8(QuantizationArgs(num_bits=8, type="float", strategy="tensor"), False)
    for scheme in (static, per_tensor, None):
        assert UnprunedFp8.instead_of(scheme, "model.layers.0.self_attn.o_proj", Pairing(False, False)) is scheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_multiplies_unpruned_layers_in_a_type_it_has(
    config: SpenseConfig, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(get_current_vllm_config(), "model_config", SimpleNamespace(dtype=dtype, architectures=[]))
    layer: Any = RowParallelLinear(
        I, HIDDEN, bias=False, params_dtype=dtype, quant_config=config, prefix="model.layers.0.self_attn.o_proj"
    )
    weight, scale = torch.randn(HIDDEN, I).to(torch.float8_e4m3fn), torch.rand(HIDDEN, 1) + 0.5
    load(layer, weight)
    load(layer, scale, name="weight_scale")
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.dtype == dtype
    x = torch.randn(2, 5, I, dtype=dtype)
    expected = dequantized(x.float()) @ (weight.float() * scale).t()
    found, _ = layer(x)
    # A bfloat16 scale rounds some activations to the next FP8 value, a sixteenth off.
    rtol, atol = (1e-4, 1e-1) if dtype == torch.float32 else (2e-2, 5e-1)
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


def test_names_follow_vllms_twice(config: SpenseConfig) -> None:
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    config.apply_vllm_mapper(mapper)
    config.apply_vllm_mapper(mapper)
    assert set(config.layers) == {f"language_model.{MLP}.{name}_proj" for name in ("gate", "up", "down")}


def test_names_follow_the_model_inside_a_multimodal_one(config: SpenseConfig) -> None:
    """Qwen2.5-VL renames its language model, which then renames nothing, and later another engine's does so again."""
    outer, inner = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}), WeightsMapper()
    for mapper in (outer, inner, outer, inner):
        config.apply_vllm_mapper(mapper)
    assert set(config.layers) == {f"language_model.{MLP}.{name}_proj" for name in ("gate", "up", "down")}


def test_no_layer_of_a_pruned_module_is_left_dense(config: SpenseConfig) -> None:
    said = rf"not one of its projections \(layer: {MLP}.w1; key: projections; found: w1; expected: .*gate_proj \| "
    for make in (
        lambda: ColumnParallelLinear(HIDDEN, I, bias=False, quant_config=config, prefix=f"{MLP}.w1"),
        lambda: MergedColumnParallelLinear(HIDDEN, [I, HIDDEN], bias=False, quant_config=config, prefix=f"{MLP}.w1"),
        lambda: RowParallelLinear(HIDDEN, I, bias=False, quant_config=config, prefix=f"{MLP}.w1"),
    ):
        with pytest.raises(FormatError, match=said):
            make()


@pytest.mark.parametrize("fused", [False, True], ids=["three tensors", "fused in the files"])
@pytest.mark.parametrize("mapped", [{}, {"gate_up_proj": ["gate_proj", "up_proj"]}], ids=["unmapped", "mapped"])
@pytest.mark.parametrize("merged", [True, False], ids=["vLLM merges", "one layer of transformers'"])
def test_gate_and_up_are_found_whatever_the_model_says(fused: bool, mapped: Any, merged: bool) -> None:
    """GLM-4 maps what the files have fused, StableLM maps nothing, transformers' Phi-3 is not merged by vLLM."""
    names = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    config = SpenseConfig.from_config(quantization_config(**({"projections": names} if fused else {})))
    config.packed_modules_mapping = mapped
    if merged:
        layer: Any = gate_up(config)
    else:
        layer = ColumnParallelLinear(HIDDEN, 2 * I, bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj")
    down = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
    assert isinstance(down.quant_method, InputSplitLinearMethod)
    weight = torch.cat([sparse_weight(I, HIDDEN, (slice(0, 64), slice(None))) for _ in range(2)])
    load(layer, weight)
    load(layer, torch.ones(2 * I, 1), name="weight_scale")
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(layer(x)[0], dequantized(x) @ weight.float().t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda config: config["config_groups"]["group_0"].update(input_activations=None), "input_activations"),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(strategy="tensor"), "weights.strategy"),
        (lambda config: config["config_groups"]["group_0"]["weights"].update(type="int"), "weights.type"),
        (lambda config: config["config_groups"].update(group_0=4), "group_0"),
        (lambda config: config.update(sparsity_config={"format": "sparse-24", "targets": ["Linear"]}), "sparsity"),
        (lambda config: config.update(ignore=["lm_head", f"{MLP}.down_proj"]), "ignore"),
    ],
)
def test_wrong_quantization_is_refused_before_there_is_a_layer(change: Any, key: str) -> None:
    data = quantization_config()
    change(data)
    for ask in (SpenseConfig.from_config, lambda config: SpenseConfig.override_quantization_method(config, None)):
        with pytest.raises(FormatError, match=rf"quantiz.*key: quantization_config\..*{key}"):
            ask(copy.deepcopy(data))


def test_a_pruned_layer_that_vllm_finds_no_scheme_for_is_refused(config: SpenseConfig) -> None:
    config.ignore.append("re:.*down_proj")
    with pytest.raises(FormatError, match=rf"wrong quantization \(layer: {MLP}\.down_proj; key: quantization_config"):
        RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")


def test_wrong_intermediate_size(config: SpenseConfig) -> None:
    with pytest.raises(FormatError, match=r"down_proj; key: regions; found: 128 .*; expected: 96 \(64 sparse"):
        RowParallelLinear(128, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")


def test_gate_and_up_with_biases(config: SpenseConfig) -> None:
    layer = gate_up(config, bias=True)
    weights = [sparse_weight(I, HIDDEN, (slice(0, 64), slice(None))) for _ in range(2)]
    scales, biases = torch.rand(2, I, 1) + 0.5, torch.randn(2, I)
    for i in range(2):
        load(layer, weights[i], i)
        load(layer, scales[i], i, name="weight_scale")
        load(layer, biases[i], i, name="bias")
    layer.quant_method.process_weights_after_loading(layer)
    assert {"weight_sparse", "weight_dense", "weight_scale", "bias"} <= dict(layer.named_parameters()).keys()

    x = torch.randn(2, 5, HIDDEN)
    found, _ = layer(x)
    expected = [dequantized(x) @ (w.float() * s).t() + b for w, s, b in zip(weights, scales, biases, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected, -1), rtol=1e-4, atol=1e-3)


def test_a_gate_that_vllm_does_not_merge(config: SpenseConfig) -> None:
    layer = ColumnParallelLinear(HIDDEN, I, bias=False, quant_config=config, prefix=f"{MLP}.gate_proj")
    weight = sparse_weight(I, HIDDEN, (slice(0, 64), slice(None)))
    load(layer, weight)
    load(layer, torch.ones(I, 1), name="weight_scale")
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(layer(x)[0], dequantized(x) @ weight.float().t(), rtol=1e-4, atol=1e-3)


def test_compiled_graphs_are_kept_apart_by_what_layers_run_on(
    config: SpenseConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps them under its configuration's hash, which knows nothing of our switches and of the machine."""
    engine = get_current_vllm_config()
    monkeypatch.setattr(engine, "additional_config", {"others": 1})

    def key() -> str:
        # How many ops were built is in it too, in vLLM 0.26.
        engine.compilation_config.enabled_custom_ops.clear(), engine.compilation_config.disabled_custom_ops.clear()
        return engine.compute_hash()

    def loaded() -> str:
        layer: Any = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
        load(layer, sparse_weight(HIDDEN, I, (slice(None), slice(0, 64))))
        load(layer, torch.ones(HIDDEN, 1), name="weight_scale")
        layer.quant_method.process_weights_after_loading(layer)
        return key()

    untold = key()
    first = loaded()
    assert untold != first == loaded()
    monkeypatch.setattr(
        InputSplitLinearMethod, "arrange", lambda self, layer, weight: (weight, replace(self.problem, scaled=True))
    )
    assert loaded() != first
    assert engine.additional_config["others"] == 1


@pytest.mark.parametrize(
    ("weight", "scale", "said"),
    [
        (None, 1.0, r"the weight is missing or holds NaN \(layer: .*down_proj; key: weight\)"),
        (0.0, None, r"a weight scale is missing or wrong \(layer: .*down_proj; key: weight_scale; found: nan"),
        (0.0, -1.0, r"key: weight_scale; found: -1.0; expected: a positive number"),
        (1.0, 1.0, r"are not 2:4; .* \(layer: .*down_proj; found: \[1.0, 1.0, 1.0, 1.0\]"),
    ],
)
def test_unsound_weights(config: SpenseConfig, weight: float | None, scale: float | None, said: str) -> None:
    layer: Any = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
    if weight is not None:
        load(layer, torch.full((HIDDEN, I), weight).to(torch.float8_e4m3fn))
    if scale is not None:
        load(layer, torch.full((HIDDEN, 1), scale), name="weight_scale")
    with pytest.raises(FormatError, match=said):
        layer.quant_method.process_weights_after_loading(layer)


def test_fp8_that_was_made_for_another_layer_is_refused(config: SpenseConfig) -> None:
    """As a norm or an activation hands it on that vLLM built in another order."""
    layer: Any = RowParallelLinear(I, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj")
    weight = sparse_weight(HIDDEN, I, (slice(None), slice(0, 64)))
    load(layer, weight)
    load(layer, torch.ones(HIDDEN, 1), name="weight_scale")
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, I).to(torch.float8_e4m3fn)
    for reader in (MLP, f"{MLP}.down_proj"):
        found, _ = layer(Quantized(x, torch.ones(3, 1), reader))
        torch.testing.assert_close(found, x.float() @ weight.float().t(), rtol=1e-4, atol=1e-3)
    other = "model.layers.1.mlp"
    with pytest.raises(RuntimeError, match=rf"what was made for {other} reached {MLP}\.down_proj"):
        layer(Quantized(x, torch.ones(3, 1), other))
