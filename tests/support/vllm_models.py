"""The source of vLLM's own models, which lists of architectures are held to, and what their modules look for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import pytest
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

from vllm_spense.plugin.pairing import Pairing

PLAIN = ["LlamaForCausalLM"]

#: Phi-3 is Llama with other names for its projections.
_SAME = {"phi3": "llama"}


def module_of(architecture: str) -> ModuleType:
    """Skips the test if this version of vLLM has no model of its own for it: transformers' layers claim nothing, and
    their norms have no residual stream beside them."""
    file = _TEXT_GENERATION_MODELS.get(architecture, ("transformers", ""))[0]
    if file == "transformers":
        pytest.skip("run by way of transformers")
    return importlib.import_module(f"vllm.model_executor.models.{_SAME.get(file, file)}")


@dataclass
class QuantConfig:
    """As much of `SpenseConfig` as a module that vLLM builds looks for."""

    pairing: Pairing
