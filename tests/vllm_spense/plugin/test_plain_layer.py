"""Norms are fused in decoder layers whose code is known to let them, whichever model these are in."""

from __future__ import annotations

import gc
import importlib
import inspect
import re
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from vllm_models import in_plain_model

from vllm_spense.plugin import parents, plain_layer, unpruned_linear
from vllm_spense.plugin.pairing import NormLink
from vllm_spense.plugin.parents import note_parents, parent_of
from vllm_spense.plugin.plain_layer import PLAIN, is_in_plain
from vllm_spense.plugin.unpruned_linear import UnprunedKernel
from vllm_spense.plugin.vllm_internals import CutlassFP8ScaledMMLinearKernel


@pytest.fixture
def layer() -> nn.Linear:
    note_parents()
    return nn.Linear(4, 4)


@pytest.fixture
def model(layer: nn.Linear) -> nn.Module:
    return in_plain_model(nn.ModuleDict({"gate_up_proj": layer}))


def derived(module: nn.Module) -> None:
    """Makes it an instance of a class of the same name, in another file."""
    module.__class__ = type(type(module).__name__, (type(module),), {"__module__": "vllm.model_executor.models.other"})


def test_a_plain_one(model: nn.Module, layer: nn.Linear) -> None:
    assert parent_of(parent_of(layer)) is model.layers[0]
    assert is_in_plain(layer)
    model.layers.append(nn.Identity())
    assert is_in_plain(layer), "beside a layer of another process of a pipeline"


@pytest.mark.parametrize("name", ["", "layers.0", "layers.0.self_attn"])
def test_a_class_that_derives_from_it_may_do_more(model: nn.Module, layer: nn.Linear, name: str) -> None:
    derived(model.get_submodule(name))
    assert not is_in_plain(layer)


def test_one_with_more_modules(model: nn.Module, layer: nn.Linear) -> None:
    model.layers[0].ada_rms_norm_t_cond = None
    assert is_in_plain(layer)
    model.layers[0].ada_rms_norm_t_cond = nn.Linear(4, 4)
    assert not is_in_plain(layer)


def test_one_beside_others(model: nn.Module, layer: nn.Linear) -> None:
    model.layers.append(nn.Linear(4, 4))
    assert not is_in_plain(layer)


def test_one_that_is_in_no_model(layer: nn.Linear) -> None:
    assert not is_in_plain(layer)
    mlp = nn.ModuleDict({"gate_up_proj": layer})
    assert not is_in_plain(layer)
    layers = nn.ModuleList([nn.ModuleDict({"mlp": mlp})])
    assert not is_in_plain(layer)
    assert parent_of(layers) is None


def test_a_slice_of_the_layers_is_not_what_they_are_in(model: nn.Module, layer: nn.Linear) -> None:
    """Models slice their list of layers in each forward pass, which registers the layers in the slice."""
    decoder_layer = model.layers[0]
    for _ in range(3):
        running = model.layers[:1]
        assert running[0] is decoder_layer
        assert parent_of(decoder_layer) is model.layers
        assert is_in_plain(layer)
    assert list(parents._parents[decoder_layer]) == [model.layers, running], "slices that are gone are forgotten"
    gone = weakref.ref(model.layers)
    del model.layers
    gc.collect()
    assert gone() is None, "noting it kept it alive"
    assert parent_of(decoder_layer) is running


def test_a_wrapper_is_what_a_layer_is_in_once_it_takes_its_place(layer: nn.Linear) -> None:
    """As vLLM makes room for LoRA adapters."""
    mlp = nn.ModuleDict({"gate_up_proj": layer, "act_fn": nn.Identity()})
    wrapper = nn.ModuleDict({"base_layer": layer})
    assert parent_of(layer) is mlp
    mlp["gate_up_proj"] = wrapper
    assert parent_of(layer) is wrapper
    assert parent_of(wrapper) is mlp
    mlp["gate_up_proj"] = layer
    assert parent_of(layer) is mlp
    del mlp["gate_up_proj"], wrapper["base_layer"]
    assert parent_of(layer) is None


def test_each_decoder_layer_of_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers ask, of however many models. What was found keeps no model alive."""
    looks: list[nn.Module] = []
    is_plain = plain_layer._is_plain
    monkeypatch.setattr(plain_layer, "_is_plain", lambda each: looks.append(each) or is_plain(each))
    note_parents()
    layers: list[list[nn.Linear]] = [[nn.Linear(4, 4) for _ in range(8)] for _ in range(2)]
    target, draft = (in_plain_model(*(nn.ModuleDict({"up": layer}) for layer in each)) for each in layers)
    assert all(map(is_in_plain, layers[0] + layers[1] + layers[0]))
    assert looks == [*target.layers, *draft.layers]

    looks.clear()
    draft.layers.append(nn.Linear(4, 4))
    assert [is_in_plain(layer) for layer in layers[0] + layers[1]] == [True] * 8 + [False] * 8, "draft is built on"
    assert looks == [*target.layers, *draft.layers]

    looks.clear()
    gone = weakref.ref(draft.layers)
    del draft
    gc.collect()
    assert gone() is None
    assert all(map(is_in_plain, layers[0]))
    assert looks == []


@pytest.mark.parametrize(("plain", "ours", "takes"), [(True, True, True), (True, False, False), (False, True, False)])
def test_which_qkv_takes_fp8(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, plain: bool, ours: bool, takes: bool
) -> None:
    """Decided on GPUs alone; here their kernel is only said to be there."""
    qkv = nn.Linear(4, 12, bias=False)
    qkv.weight.data = torch.zeros(12, 4).t()
    model.layers[0].self_attn.add_module("qkv_proj", qkv)
    if not plain:
        derived(model)
    monkeypatch.setattr(unpruned_linear, "prepare_unpruned", lambda n, k, device, stock: ours)
    monkeypatch.setattr(unpruned_linear, "stock_gemm", lambda: None)
    stock = CutlassFP8ScaledMMLinearKernel
    monkeypatch.setattr(stock, "process_weights_after_loading", lambda kernel, layer: None)
    kernel = object.__new__(UnprunedKernel)
    kernel.logical_output_size = 12
    kernel.engine = SimpleNamespace(additional_config={})
    kernel.norm = NormLink("model.layers.0.self_attn.qkv_proj")
    kernel.process_weights_after_loading(qkv)
    assert (kernel.quantizes, kernel.norm.takes_fp8) == (ours, takes)


def module_of(file: str) -> ModuleType:
    """Skips the test if this version of vLLM has no model of its own there, but runs it by way of transformers."""
    if importlib.util.find_spec(f"vllm.model_executor.models.{file}") is None:
        pytest.skip("run by way of transformers")
    return importlib.import_module(f"vllm.model_executor.models.{file}")


def source(function: object) -> str:
    return inspect.getsource(function)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", PLAIN)
def test_vllms_decoder_layer_is_what_the_list_says(file: str) -> None:
    layer = getattr(module_of(file), f"{PLAIN[file]}DecoderLayer")
    builder = next(kind for kind in layer.__mro__ if "self.mlp = " in source(kind.__init__))
    built = re.findall(r"self\.(self_attn|mlp|input_layernorm|post_attention_layernorm) = ", source(builder.__init__))
    assert built == ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    # Of Mistral, for a module that a plain decoder layer has not.
    more = r"if self\.ada_rms_norm_t_cond is not None:\n(\s+assert .*\n)?.* = hidden_states \* \(1 \+ self\.ada_.*\n"
    plain = (
        r"hidden_states, residual = self\.input_layernorm\(hidden_states, residual\)\s+"
        r"hidden_states = self\.self_attn\(\s*positions=positions,\s*hidden_states=hidden_states,?\s*\)\s+(#.*\s+)?"
        r"hidden_states, residual = self\.post_attention_layernorm\(hidden_states, residual\)\s+"
        r"hidden_states = self\.mlp\(hidden_states\)\s+return hidden_states, residual"
    )
    run = re.sub(more, "", source(layer.forward))
    assert re.search(plain, run), run


@pytest.mark.parametrize("file", PLAIN)
def test_vllms_attention_gives_its_input_to_qkv_alone(file: str) -> None:
    run = source(getattr(module_of(file), f"{PLAIN[file]}Attention").forward)
    reads = [line.strip() for line in run.splitlines() if re.search(r"\bhidden_states\b", line)]
    assert [line for line in reads if line != "hidden_states: torch.Tensor,"] == [
        "qkv, _ = self.qkv_proj(hidden_states)"
    ]


@pytest.mark.parametrize("file", PLAIN)
def test_layers_hand_on_to_layers_and_the_last_to_a_norm(file: str) -> None:
    """Between them only layers of a draft model's interest are read, and the next process of a pipeline."""
    model = getattr(module_of(file), f"{PLAIN[file]}Model")
    # Mistral's hands what it is given to Llama's.
    runs = next(kind for kind in model.__mro__ if "self.norm(" in source(kind.forward))
    between = [kind for kind in model.__mro__[: model.__mro__.index(runs)] if "forward" in vars(kind)]
    assert all(re.search(r"return super\(\)\.forward\(\s*input_ids,", source(kind.forward)) for kind in between)
    assert not any("hidden_states" in source(kind.forward) for kind in between)
    lines = source(runs.forward).splitlines()
    reads = [line.strip() for line in lines if re.search(r"\bhidden_states\b", line)]
    known = (
        r"hidden_states = (inputs_embeds|self\.embed_input_ids\(input_ids\)|intermediate_tensors\[\"hidden_states\"\])"
        r"|(aux_hidden_states, (idx \+ 1|self\.start_layer)|\[\], 0), hidden_states, residual\)?"
        r"|aux_hidden_states = self\._maybe_add_hidden_state\(\[\], 0, hidden_states, residual\)"
        r"|hidden_states, residual = layer\((positions, hidden_states, residual(, \*\*extra_layer_kwargs)?\))?"
        r"|positions, hidden_states, residual(, \*\*extra_layer_kwargs)?"
        r"|hidden_states,"
        r"|(return IntermediateTensors\()?\{?\"hidden_states\": hidden_states,?( \"residual\": residual\}?\)?)?"
        r"|hidden_states, _ = self\.norm\(hidden_states, residual\)"
        r"|return hidden_states(, aux_hidden_states)?"
    )
    assert "hidden_states, _ = self.norm(hidden_states, residual)" in reads
    assert [line for line in reads if not re.fullmatch(known, line)] == []
