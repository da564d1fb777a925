"""A causal LM of which at most one decoder block is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from offline_prune.model.gated_mlp import Glu, Unsupported, find_glu
from offline_prune.model.safetensors_reader import TensorFiles, resolve_model
from offline_prune.runtime.pinned_buffers import Inbox
from vllm_spense.checkpoint_files import read_object
from vllm_spense.conformance import require_sane_depth
from vllm_spense.errors import SpenseError


@dataclass(frozen=True)
class Block:
    """One decoder block: its full name and what its MLP is."""

    name: str
    mlp: Glu | Unsupported


class SourceModel:
    """A model folder, its module tree without weights, and the way to fill one block of it.

    Args:
        model: a local folder or a hub name.

    Raises:
        SpenseError: no such model, no weights, an architecture that transformers does not know, already quantized.
    """

    def __init__(self, model: str) -> None:
        self.folder: Path = resolve_model(model)
        self.config_json: dict[str, Any] = read_object(self.folder / "config.json")
        if (quantization := self.config_json.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise SpenseError(f"{self.folder}: already quantized ({method}); prune the original BF16 model instead")
        self.tensors = TensorFiles(self.folder)
        require_sane_depth(self.config_json, len(self.tensors.headers), self.folder / "config.json")
        self.skeleton = empty_model(self.folder)
        self.blocks = [Block(name, find_glu(module)) for name, module in _decoder_blocks(self.skeleton)]
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._ahead: dict[str, Future[dict[str, torch.Tensor]]] = {}
        self._inbox = Inbox()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    def module(self, name: str) -> nn.Module:
        return self.skeleton.get_submodule(name)

    def linears(self) -> Iterator[str]:
        """Full names of all linear layers but the output head."""
        head = self.skeleton.get_output_embeddings()
        for name, module in self.skeleton.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                yield name

    @cached_property
    def head_name(self) -> str:
        """Full name of the output head, normally `lm_head`."""
        head = self.skeleton.get_output_embeddings()
        return next(name for name, module in self.skeleton.named_modules() if module is head)

    def prefetch(self, name: str, device: torch.device) -> None:
        """Starts to read a module's tensors into host memory pinned for a GPU, in the background, for `load`.

        One module at a time: the next one comes into the same memory, once this one is loaded.
        """
        assert not self._ahead, f"{name} would overwrite {', '.join(self._ahead)}"

        def read() -> dict[str, torch.Tensor]:
            torch.cuda.set_device(device)  # Threads start out on the first GPU.
            mine = [key for key in self.tensors if key.startswith(f"{name}.")]
            return self._inbox.fill(f"{name}.", ((key, self.tensors.read(key)) for key in mine))

        self._ahead[name] = self._reader.submit(read)

    def load(
        self, name: str, device: torch.device, dtype: torch.dtype, instead: Mapping[str, torch.Tensor] | None = None
    ) -> nn.Module:
        """Fills a module with its weights, in place.

        Args:
            name: full module name, such as a block's.
            instead: tensors, by full name, that take the place of the files' own.

        Raises:
            SpenseError: a tensor is missing, has another shape, or is not finite.
        """
        module = self.module(name)
        read: dict[str, torch.Tensor] = self._ahead.pop(name).result() if name in self._ahead else {}
        if any(f"{name}.{key}" not in self.tensors for key, _ in module.named_parameters()):
            read = self._converted(name)
        read = {**read, **(instead or {})}
        for key, parameter in list(module.named_parameters()):
            full = f"{name}.{key}"
            weight = read[full] if full in read else self.tensors.read(full)
            _set_parameter(module, key, self._checked(full, weight, parameter, device, dtype))
        for key, buffer in list(module.named_buffers()):
            owner, _, leaf = key.rpartition(".")
            full = f"{name}.{key}"
            stored = self.tensors.read(full) if full in self.tensors else buffer
            setattr(module.get_submodule(owner), leaf, stored.to(device))
        return module.eval()

    @contextmanager
    def outside_blocks(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Holds everything but the blocks and the output head in memory: embeddings, the last norm, positions."""
        inside = tuple(f"{block.name}." for block in self.blocks)
        head = self.head_name
        filled = []
        for key, parameter in list(self.skeleton.named_parameters()):
            if not key.startswith(inside) and not key.startswith(f"{head}."):
                weight = self._checked(key, self.tensors.read(key), parameter, device, dtype)
                _set_parameter(self.skeleton, key, weight)
                filled.append((key, parameter))
        for key, buffer in list(self.skeleton.named_buffers()):
            if not key.startswith(inside):
                owner, _, leaf = key.rpartition(".")
                setattr(self.skeleton.get_submodule(owner), leaf, buffer.to(device))
        try:
            yield
        finally:
            for key, empty in filled:
                _set_parameter(self.skeleton, key, empty)

    def _converted(self, name: str) -> dict[str, torch.Tensor]:
        """A block's weights where transformers keeps them under other names than the files, as it does experts."""
        stored = {key: self.tensors.read(key) for key in self.tensors if key.startswith(f"{name}.")}
        mapping: Any = get_model_conversion_mapping(self.skeleton)
        rules = LoadStateDictConfig(weight_mapping=mapping, device_map={"": "cpu"})
        empty = dict(self.module(name).named_parameters())
        with _without_progress_bars():
            convert_and_load_state_dict_in_model(self.skeleton, stored, rules)
        loaded = {key: p for key, p in self.module(name).named_parameters() if p.device.type != "meta"}
        for key in loaded:
            _set_parameter(self.module(name), key, empty[key])
        return {f"{name}.{key}": p.data for key, p in loaded.items()}

    def _checked(
        self, name: str, weight: torch.Tensor, empty: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        if weight.shape != empty.shape:
            raise SpenseError(f"{name}: found shape {tuple(weight.shape)}, expected {tuple(empty.shape)}")
        loaded = weight.to(device, dtype, non_blocking=True)
        # The answer is there when the copy is.
        if not torch.isfinite(loaded).all():
            raise SpenseError(f"{self.tensors.folder}: {name} holds NaN or infinity")
        return loaded

    def unload(self, name: str) -> None:
        """Gives the memory of a filled module back; its buffers, which are no weights, stay."""
        module = self.module(name)
        for key, parameter in list(module.named_parameters()):
            _set_parameter(module, key, parameter.to("meta"))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers shows one for the tensors of each block, which would break the run's own and flood a log."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _set_parameter(module: nn.Module, key: str, value: torch.Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, parameter)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        SpenseError: it has none that transformers can use.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpenseError(f"{folder}: no usable tokenizer: {reason}") from None


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The module tree of a folder's model: parameters on the meta device, buffers real.

    Args:
        trust_remote_code: run the Python that came with the model, where transformers does not know it.

    Raises:
        SpenseError: transformers does not know the architecture, or cannot build it from this config.json.
    """
    try:
        # Without an answer, transformers would ask one.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Scaled dot product attention has no logit soft-capping (Gemma 2).
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        # Buffers are not weights: rotary frequencies are computed, not loaded.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager" if capped else "sdpa", trust_remote_code=trust_remote_code
            )
        model.tie_weights()
    except Exception as error:  # whatever it is, a value in config.json caused it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpenseError(
            f"{folder}: transformers cannot build this as a causal language model: {reason}"
            + ("" if trust_remote_code or "custom code" not in reason else " (--trust-remote-code runs it)")
        ) from error
    return model.eval()


def _decoder_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise SpenseError(f"{type(model).__name__}: found no list of {count} decoder blocks")
