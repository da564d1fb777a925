"""Modules that hand on what is no tensor find each other, and say so where vLLM builds them in another order."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm_models import QuantConfig

from vllm_spense.plugin.norms import FusedRMSNorm
from vllm_spense.plugin.pairing import Pairing, only_modules_read_layers
from vllm_spense.plugin.vllm_internals import stand_in


@pytest.fixture
def pairing() -> Iterator[Pairing]:
    """Of the model that vLLM is building."""
    assert stand_in(FusedRMSNorm)
    engine = VllmConfig()
    engine.quant_config = QuantConfig(Pairing(activations=True, norms=True))
    with set_current_vllm_config(engine):
        yield engine.quant_config.pairing


def layer(index: int, of: str) -> str:
    return f"model.layers.{index}.{'self_attn' if of == 'qkv' else 'mlp'}.{of}_proj"


def test_the_norms_of_a_decoder_layer_know_their_readers(pairing: Pairing) -> None:
    for index in range(2):
        pairing.built_qkv(layer(index, "qkv"))
        heads = RMSNorm(16)
        pairing.built_gate_up(layer(index, "gate_up"))
        norms = [heads, RMSNorm(64), RMSNorm(64)]
        assert [norm.link and norm.link.reader for norm in norms] == [
            None,
            layer(index, "qkv"),
            layer(index, "gate_up"),
        ]
    assert RMSNorm(64).link is None, "the model's last"


def test_a_qkv_without_a_pruned_mlp_is_nobodys_neighbour(pairing: Pairing) -> None:
    """The next layer's attention may be of a kind that takes no FP8."""
    pairing.built_qkv(layer(0, "qkv"))
    pairing.built_gate_up(layer(1, "gate_up"))
    norms = [RMSNorm(64), RMSNorm(64)]
    assert [norm.link and norm.link.reader for norm in norms] == [None, layer(1, "gate_up")]


def test_a_norm_says_for_whom_its_output_is(pairing: Pairing) -> None:
    pairing.built_qkv(layer(0, "qkv"))
    link = pairing.built_gate_up(layer(0, "gate_up"))
    RMSNorm(64), (norm := RMSNorm(64))
    link.takes_fp8 = True
    found, _ = norm(torch.randn(3, 64), torch.randn(3, 64))
    assert found.reader == layer(0, "gate_up")


def test_no_links_where_norms_are_not_ours() -> None:
    pairing = Pairing(activations=False, norms=False)
    pairing.built_qkv(layer(0, "qkv"))
    pairing.built_gate_up(layer(0, "gate_up"))
    assert pairing.next_norm() is None


def test_no_links_without_a_pruned_model() -> None:
    stand_in(FusedRMSNorm)
    with set_current_vllm_config(VllmConfig()):
        assert RMSNorm(64).link is None


@pytest.mark.parametrize(("lora", "alone"), [(None, True), (object(), False)], ids=["alone", "LoRA"])
def test_who_reads_what_layers_take_and_return(lora: object, alone: bool) -> None:
    assert only_modules_read_layers(SimpleNamespace(lora_config=lora)) == alone


def test_it_travels_with_the_quantization_config(pairing: Pairing) -> None:
    link = pairing.built_qkv(layer(0, "qkv"))
    for copied in (pickle.loads(pickle.dumps(pairing)), copy.deepcopy(pairing)):
        copied.built_gate_up(layer(0, "gate_up"))
        assert copied.next_norm() == link
