"""A language model, or one inside a multimodal model, of which at most one decoder block is in memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from offline_prune.model.expert_names import with_names
from offline_prune.model.experts import Experts, Mixture, Mlp, find_mlps
from offline_prune.model.gated_mlp import GatedMlp, Unsupported
from offline_prune.model.model_tensors import ModelTensors
from offline_prune.model.prequantized import config_of_weights, refuse_unreadable
from offline_prune.model.safetensors_reader import SafetensorsReader, resolve_model
from offline_prune.model.skeleton import empty_model, find_text_model
from offline_prune.runtime.pinned_buffers import Inbox
from vllm_spense.checkpoint_files import read_object
from vllm_spense.conformance import require_sane_depth
from vllm_spense.errors import SpenseError, first_line


@dataclass(frozen=True)
class Block:
    """One decoder block: its full name and what its MLP is, or what it has in place of one."""

    name: str
    mlp: Mlp | Unsupported

    @property
    def mlps(self) -> tuple[GatedMlp, ...]:
        """Its gated MLPs but for routed experts."""
        if isinstance(self.mlp, GatedMlp):
            return (self.mlp,)
        return self.mlp.shared if isinstance(self.mlp, Mixture) else ()


#: Of a name inside a draft layer: what stands before, and the layer's number.
DRAFT_LAYER = re.compile(r"(.*\.)?mtp_layers\.(\d+)\.")


class SourceModel:
    """A model folder, its module tree without weights, and the way to fill one block of it.

    Args:
        model: a local folder or a hub name.
        trust_remote_code: run the Python code that a model brings along.
        as_stored: the model as its files have it: one that Spense pruned too, and weights stored in FP8 times their
            scales in float32.

    Attributes:
        config_json: its config.json, without what says how the weights are stored.
        tensors: its weights, under the modules' names.
        text: the language model, which is `skeleton` or somewhere inside it.
        blocks: the language model's decoder blocks.

    Raises:
        SpenseError: no such model, no weights, an architecture that transformers does not know, weights that are
            quantized to something else than FP8.
    """

    def __init__(self, model: str, trust_remote_code: bool = False, as_stored: bool = False) -> None:
        self.folder: Path = resolve_model(model)
        config = read_object(self.folder / "config.json")
        refuse_unreadable(self.folder, config, pruned_too=as_stored)
        self.config_json: dict[str, Any] = config_of_weights(config)
        self._trust = trust_remote_code
        files = SafetensorsReader(self.folder)
        require_sane_depth(config, len(files.headers), self.folder / "config.json")
        self.skeleton = empty_model(self.folder, trust_remote_code)
        self.tensors = ModelTensors(files, self.skeleton, config, torch.float32 if as_stored else None)
        found = find_text_model(self.skeleton)
        self.text_name, self.text = found.name, found.model
        self.blocks = _described(found.blocks, self.tensors)
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._ahead: dict[str, Future[dict[str, torch.Tensor]]] = {}
        self._inbox = Inbox()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder, self._trust)

    @cached_property
    def processor(self) -> Any:
        """What turns images and text into this model's inputs.

        Raises:
            SpenseError: it has none that transformers can use.
        """
        return load_processor(self.folder, self._trust)

    @property
    def experts(self) -> dict[str, Experts]:
        """The routed experts of blocks that have some, by the blocks' names."""
        return {block.name: block.mlp.experts for block in self.blocks if isinstance(block.mlp, Mixture)}

    def module(self, name: str) -> nn.Module:
        return self.skeleton.get_submodule(name)

    def linears(self) -> Iterator[str]:
        """Full names of the language model's linear layers, without the output head and draft layers (MTP).

        Draft layers are modules only where a model brings its own code (MiMo); elsewhere the files alone have them.
        """
        head = self.skeleton.get_output_embeddings()
        for name, module in self.text.named_modules(prefix=self.text_name):
            if isinstance(module, nn.Linear) and module is not head and not DRAFT_LAYER.match(name):
                yield name

    @cached_property
    def head_name(self) -> str | None:
        """Full name of the output head, normally `lm_head`; None where the model has none, or its files nothing for it,
        as `AutoModel` writes them.
        """
        name, embedding = self._head_module, cast(nn.Embedding, self.text.get_input_embeddings())
        if name is None or self.module(name).weight is embedding.weight:
            return name
        return name if self._stands_for(f"{name}.weight") or self.tensors.parts_of(name) else None

    @cached_property
    def _head_module(self) -> str | None:
        head = self.skeleton.get_output_embeddings()
        return next((name for name, module in self.skeleton.named_modules() if module is head), None)

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
        given = instead or {}
        mlp = next((block.mlp for block in self.blocks if block.name == name), None)
        if isinstance(mlp, Mixture):
            at_hand = {**read, **given}
            read |= mlp.experts.assembled(
                name, lambda key: at_hand[key] if key in at_hand else self.tensors.read(key), device
            )
        read = {**read, **given}
        if any(f"{name}.{key}" not in read and self._stands_for(f"{name}.{key}") is None for key in _keys(module)):
            read = {**self._converted(name), **read}
        for key, parameter in list(module.named_parameters()):
            full = f"{name}.{key}"
            weight = read[full] if full in read else self.tensors.read(self._stands_for(full) or full)
            _set_parameter(module, key, self._checked(full, weight, parameter, device, dtype))
        for key, buffer in list(module.named_buffers()):
            owner, _, leaf = key.rpartition(".")
            full = f"{name}.{key}"
            stored = self.tensors.read(full) if full in self.tensors else buffer
            setattr(module.get_submodule(owner), leaf, stored.to(device))
        return module.eval()

    @contextmanager
    def outside_blocks(self, device: torch.device, dtype: torch.dtype, whole: bool = False) -> Iterator[nn.Module]:
        """The language model with everything but its blocks and the output head in memory: embeddings, positions,
        what stands in front of the head.

        Args:
            whole: with vision towers and projectors too.
        """
        filled = []
        for key, parameter in self._outside_blocks(whole):
            weight = self.tensors.read(self._stands_for(key) or key)
            _set_parameter(self.skeleton, key, self._checked(key, weight, parameter, device, dtype))
            filled.append((key, parameter))
        around, prefix = self._around(whole)
        for key, buffer in list(around.named_buffers(prefix=prefix)):
            if not self._inside_a_block(key):
                owner, _, leaf = key.rpartition(".")
                stored = self.tensors.read(key) if key in self.tensors else buffer
                setattr(self.skeleton.get_submodule(owner), leaf, stored.to(device))
        try:
            yield self.text
        finally:
            for key, empty in filled:
                _set_parameter(self.skeleton, key, empty)

    def missing_outside_blocks(self) -> list[str]:
        """Parameters of the whole model, outside its blocks, that no tensor of the files stands for as it is."""
        return [key for key, _ in self._outside_blocks(whole=True) if self._stands_for(key) is None]

    def parameters_outside_blocks(self) -> int:
        """How many numbers all parameters of the whole model outside its blocks hold."""
        return sum(parameter.numel() for _, parameter in self._outside_blocks(whole=True))

    def _outside_blocks(self, whole: bool) -> list[tuple[str, nn.Parameter]]:
        """Parameters by full name, without the output head's."""
        around, prefix = self._around(whole)
        parameters = list(around.named_parameters(prefix=prefix))
        if not whole and self.skeleton.base_model is self.text is not self.skeleton:
            # Layers between the language model and its output head (ModernBERT).
            beside = [(key, each) for key, each in self.skeleton.named_parameters() if not key.startswith(f"{prefix}.")]
            parameters += [(key, each) for key, each in beside if self._stands_for(key) is not None]
        return [
            (key, parameter)
            for key, parameter in parameters
            if not self._inside_a_block(key) and key.rpartition(".")[0] != self._head_module
        ]

    def _around(self, whole: bool) -> tuple[nn.Module, str]:
        """The whole model or its language model, and its name."""
        return (self.skeleton, "") if whole else (self.text, self.text_name)

    def _inside_a_block(self, name: str) -> bool:
        return name.startswith(self._block_prefixes)

    @cached_property
    def _block_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{block.name}." for block in self.blocks)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Parameter → another one that it is the same as."""
        return dict(getattr(self.skeleton, "all_tied_weights_keys", None) or {})

    def _stands_for(self, name: str) -> str | None:
        """The tensor of a parameter; None where there is none, or only in another form."""
        if name in self.tensors:
            return name
        others = [self._tied.get(name, name), *(key for key, to in self._tied.items() if to == name)]
        return next((other for other in others if other in self.tensors), None)

    def _converted(self, name: str) -> dict[str, torch.Tensor]:
        """A block's weights where transformers keeps them in another form than the files, as it does experts."""
        stored = {key: self.tensors.read_stored(key) for key in self.tensors.parts_of(name)}
        rules = LoadStateDictConfig(weight_mapping=self.tensors.conversions.rules, device_map={"": "cpu"})
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


def _keys(module: nn.Module) -> list[str]:
    return [key for key, _ in module.named_parameters()]


def _set_parameter(module: nn.Module, key: str, value: torch.Tensor) -> None:
    owner, _, leaf = key.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, parameter)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        SpenseError: it has none that transformers can use.
    """
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SpenseError(f"{folder}: no usable tokenizer: {first_line(error)}") from None


def load_processor(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's processor of images and text.

    Raises:
        SpenseError: it has none that transformers can use, or one that needs a package that is not installed.
    """
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        needs = " (pip install torchvision)" if "torchvision" in str(error).lower() else ""
        raise SpenseError(f"{folder}: no usable processor of images: {first_line(error)}{needs}") from None


def _described(blocks: list[tuple[str, nn.Module]], tensors: ModelTensors) -> list[Block]:
    """What the MLP of every block is. One that several blocks share sees inputs of all of them, and is not pruned."""
    found = [Block(name, _stored_alike(find_mlps(module), name, tensors)) for name, module in blocks]
    weights = {
        block.name: id(block.mlp.down(module).weight)
        for block, (_, module) in zip(found, blocks, strict=True)
        if isinstance(block.mlp, GatedMlp)
    }
    users = Counter(weights.values())
    return [
        Block(block.name, Unsupported(f"a gated MLP that {users[weights[block.name]]} blocks share", shared=True))
        if block.name in weights and users[weights[block.name]] > 1
        else block
        for block in found
    ]


def _stored_alike(mlp: Mlp | Unsupported, block: str, tensors: ModelTensors) -> Mlp | Unsupported:
    """An MLP whose files hold one tensor for each of its linear layers; a permutation could not be told to others."""
    if isinstance(mlp, Mixture):
        shared = [_stored_alike(each, block, tensors) for each in mlp.shared]
        refused = next((each for each in shared if isinstance(each, Unsupported)), None)
        named = refused or with_names(mlp.experts, block, tensors)
        return named if isinstance(named, Unsupported) else Mixture(named, mlp.shared)
    if isinstance(mlp, GatedMlp):
        for name in dict.fromkeys(mlp.projections.to_dict().values()):
            layer = f"{block}.{mlp.path}.{name}"
            parts = [part for part in tensors.parts_of(layer) if part in tensors.converted]
            if parts:
                return Unsupported(f"a gated MLP whose {layer} transformers makes of {', '.join(parts)}")
    return mlp
