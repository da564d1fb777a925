"""A model's module tree without weights, and the language model in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from vllm_spense.errors import SpenseError, first_line

_AUTO = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


@dataclass(frozen=True)
class TextModel:
    """The language model of a module tree.

    Attributes:
        name: of its module; empty for the tree itself.
        model: takes `input_ids` and runs the blocks.
        blocks: the decoder blocks in their order, by full name.
    """

    name: str
    model: PreTrainedModel
    blocks: list[tuple[str, nn.Module]]


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The module tree of a folder's model: parameters on the meta device, buffers real.

    Raises:
        SpenseError: transformers does not know the architecture, or may not run the code that comes with it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Scaled dot product attention has no logit soft-capping (Gemma 2); otherwise the model chooses.
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        attention = {"attn_implementation": "eager"} if capped else {}
        # Buffers are not weights: rotary frequencies are computed, not loaded.
        with init_empty_weights(include_buffers=False):
            model = _built(config, attention, trust_remote_code)
        model.tie_weights()
    except Exception as error:  # whatever it is, a value in config.json caused it
        reason, advice = first_line(error), ""
        if not trust_remote_code and "trust_remote_code" in str(error):
            reason, advice = "its code comes with the model", "; --trust-remote-code runs it"
        raise SpenseError(f"{folder}: transformers cannot build this as a language model: {reason}{advice}") from error
    return model.eval()


def _built(config: PreTrainedConfig, attention: dict[str, str], trust_remote_code: bool) -> PreTrainedModel:
    remote = trust_remote_code and bool(getattr(config, "auto_map", None))
    for name in () if remote else config.architectures or ():
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return _language_model_class(kind, config)._from_config(config, **attention)
    kinds: list[Any] = [auto for auto in _AUTO if remote or type(config) in auto._model_mapping]
    if not kinds:
        raise ValueError(f"{type(config).__name__} is none of a causal or multimodal language model")
    return kinds[0].from_config(config, **attention, **({"trust_remote_code": True} if remote else {}))


def _language_model_class(kind: type[PreTrainedModel], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class itself, or where it has no output head the one that adds it to the same modules."""
    if "For" in kind.__name__ or not any(type(config) in auto._model_mapping for auto in _AUTO):
        return kind
    auto = next(auto for auto in _AUTO if type(config) in auto._model_mapping)
    found: Any = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def find_text_model(model: PreTrainedModel) -> TextModel:
    """The part of the tree that turns token ids into hidden states.

    It is the innermost model around the token embedding that also holds a list with as many modules as its config
    counts layers. A vision tower of as many layers has no token embedding.

    Raises:
        SpenseError: there is none, or it is an encoder with a decoder.
    """
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise SpenseError(f"{type(model).__name__}: found an encoder with a decoder, expected a decoder alone")
    embedding = model.get_input_embeddings()
    place = next((name for name, module in model.named_modules() if module is embedding), None)
    if place is not None:
        for name in _ancestors(place):
            around = model.get_submodule(name)
            if isinstance(around, PreTrainedModel) and (blocks := _blocks(around, name)):
                return TextModel(name, around, blocks)
    count = _layers(model)
    raise SpenseError(f"{type(model).__name__}: found no list of {count} decoder blocks beside the token embedding")


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _layers(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)


def _blocks(around: PreTrainedModel, prefix: str) -> list[tuple[str, nn.Module]]:
    """The list of blocks in a model; not in a model inside it, such as a vision tower, unless there is no other."""
    count = _layers(around)
    inner = [name for name, module in around.named_modules(prefix=prefix) if isinstance(module, PreTrainedModel)]
    lists = [
        (sum(name.startswith(f"{each}.") for each in inner if each), name, module)
        for name, module in around.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        # A list of embeddings has no modules inside.
        and all(any(True for _ in block.children()) for block in module)
    ]
    if not lists:
        return []
    _, name, found = min(lists, key=lambda each: each[0])
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]
