"""A LoRA adapter of the original model, rewritten to fit the pruned one.

LoRA adds s·B·A to a weight W. With p(i), the original index of intermediate index i, the pruner moves the rows of gate
and up, W'[i] = W[p(i)], and the columns of down, W'[:, i] = W[:, p(i)]. So in an adapter B'[i] = B[p(i)] for gate and
up, and A'[:, i] = A[:, p(i)] for down. Whatever else has an entry for each row of gate and up goes along with B;
nothing else moves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

import vllm_spense
from offline_prune.checkpoint.journal import FILE as JOURNAL
from offline_prune.checkpoint.journal import Say, crc32_of
from offline_prune.checkpoint.output_folder import PARTIAL, OutputFolder
from offline_prune.checkpoint.permutations import read_permutations
from offline_prune.checkpoint.verify import Checkpoint, open_checkpoint
from offline_prune.checkpoint.writer import CheckpointWriter
from offline_prune.model.model_tensors import ModelTensors
from offline_prune.model.skeleton import empty_model
from vllm_spense.checkpoint_files import TensorHeader, read_headers, read_object
from vllm_spense.errors import SpenseError
from vllm_spense.format import PERMUTATION

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: In the metadata of the weights: to which permutation they were adapted.
MARK = "spense_permutation"
#: PEFT writes it before the name of every module.
_PREFIX = "base_model.model."
#: What an adapter may hold of a pruned layer → the dimension of its outputs, and of its inputs.
_DIMENSIONS = {
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_B.bias": (0, None),
    "lora_magnitude_vector": (0, None),
    "lora_magnitude_vector.weight": (0, None),
    "bias": (0, None),
}
#: Values of `init_lora_weights` that leave the weights of the model as they are.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
#: Settings of PEFT under which A and B are no longer added to a layer as B·A.
_OTHER_FORMS = ("layer_replication", "use_bdlora", "use_qalora")


@dataclass(frozen=True)
class Adapted:
    """What became of an adapter.

    Attributes:
        tensors: how many it has.
        moved: how many of them were reordered.
    """

    tensors: int
    moved: int


@dataclass(frozen=True)
class _Move:
    """How a tensor is reordered: `repeats` blocks of I along `dimension`, each as the module is."""

    module: str
    dimension: int
    repeats: int


def adapt(
    adapter: Path, pruned: Path, out: Path, say: Say = lambda _: None, trust_remote_code: bool = False
) -> Adapted:
    """Writes the adapter that does to the pruned model what `adapter` does to the original.

    Args:
        adapter: a PEFT folder of a LoRA, trained on the original model.
        pruned: a Spense checkpoint of that model.
        out: a folder to write; empty or not there yet.
        say: told about an adapter that names another base model.
        trust_remote_code: see `empty_model`.

    Raises:
        SpenseError: not a LoRA, one that cannot be rewritten or does not fit the model, a checkpoint without its
            permutations, or OUT is filled.
        FormatError: the checkpoint breaks the format.
    """
    # A run that was cut off while it moved files there is ended by the next one.
    if out.is_dir() and set(os.listdir(out)) - {PARTIAL} and not (out / PARTIAL / JOURNAL).exists():
        raise SpenseError(f"{out}: the folder is not empty; expected an empty one, or none")
    config = _read_config(adapter)
    file = adapter / WEIGHTS
    headers = read_headers([file])
    checkpoint = open_checkpoint(pruned)
    _compare_base(config, checkpoint, adapter, say)
    model = _Model(checkpoint, trust_remote_code)
    moves = {name: move for name, header in headers.items() if (move := model.move(name, header))}
    permutations = read_permutations(pruned, checkpoint.annotation) or {}
    if moves and not permutations:
        raise SpenseError(
            f"{pruned}: no {PERMUTATION}; an older version of Spense wrote this checkpoint, or the file was lost. "
            "Prune the original model again with the same settings, which report.json has"
        )
    metadata, tensors = _read_weights(file)
    if moves:
        metadata[MARK] = hashlib.sha256((pruned / PERMUTATION).read_bytes()).hexdigest()[:16]
    for name, move in moves.items():
        order = permutations[move.module]
        order = torch.cat([order + block * len(order) for block in range(move.repeats)])
        tensors[name] = tensors[name].index_select(move.dimension, order)
    run = {"adapter": str(adapter), "weights": crc32_of(file), "config": config, "permutations": metadata.get(MARK)}
    run |= {"pruned": str(pruned), "spense": vllm_spense.__version__}
    with OutputFolder(out, overwrite=False, resume=True) as folder, CheckpointWriter(folder, run, say) as writer:
        if not writer.complete:
            with writer.file(WEIGHTS) as path:
                path.write_bytes(save(tensors, metadata))
            # With its former base model PEFT would load it by itself, wrongly.
            writer.write_json(CONFIG, {**config, "base_model_name_or_path": str(pruned)})
            writer.copy_companions(adapter)
    return Adapted(len(tensors), len(moves))


class _Model:
    """The layers of a pruned model, under the names that its modules and its files have."""

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
        self._modules = dict(empty_model(checkpoint.folder, trust_remote_code).named_modules())
        root: Any = self._modules[""]
        targets = ModelTensors(checkpoint.tensors, root, checkpoint.config).targets
        #: Name of a module, in either spelling → in the model's.
        self._spelled = {name: name for name in self._modules}
        for stored, known in targets.items():
            self._spelled.setdefault(stored.rpartition(".")[0], known.rpartition(".")[0])
        self._folder = checkpoint.folder
        annotation = checkpoint.annotation
        repeats = 2 if annotation.projections.fused else 1
        #: Pruned layer → its module in the annotation, which side of it is the intermediate dimension, blocks of I.
        self._pruned: dict[str, tuple[str, int, int]] = {}
        for module in annotation.modules:
            gate, up, down = (self._spelled.get(layer, layer) for layer in annotation.layers(module))
            self._pruned |= {gate: (module, 0, repeats), up: (module, 0, repeats), down: (module, 1, 1)}
        self._parents = tuple({f"{layer.rpartition('.')[0]}." for layer in self._pruned})
        #: What holds routed experts, in either spelling.
        self._experts = tuple(annotation.experts) + tuple(
            known.rpartition(".")[0]
            for stored, known in targets.items()
            if stored.startswith(tuple(f"{name}." for name in annotation.experts))
        )

    def move(self, name: str, header: TensorHeader) -> _Move | None:
        """How a tensor of an adapter is reordered; None for one that stays as it is.

        Raises:
            SpenseError: it is of no layer of the model, has another shape, or is not understood.
        """
        layer, part = _split(name)
        if any(f"{layer}.".startswith(f"{experts}.") for experts in self._experts):
            raise SpenseError(
                f"{header.file}: {name}: found a tensor of routed experts, whose adapters are not rewritten; expected "
                "an adapter of other layers"
            )
        spelled = self._spelled.get(layer)
        if spelled is None:
            if part.startswith("lora_"):
                raise SpenseError(f"{header.file}: {name}: {self._folder} has no layer of that name")
            return None
        module = self._modules[spelled]
        if isinstance(module, nn.Linear) and part in _DIMENSIONS:
            self._require_shape(name, header, part, module)
        if spelled in self._pruned:
            if part not in _DIMENSIONS:
                raise SpenseError(
                    f"{header.file}: {name}: found {part} of a pruned layer, expected {' | '.join(_DIMENSIONS)}"
                )
            owner, side, repeats = self._pruned[spelled]
            dimension = _DIMENSIONS[part][side]
            return None if dimension is None else _Move(owner, dimension, repeats)
        if f"{spelled}.".startswith(self._parents):
            raise SpenseError(
                f"{header.file}: {name}: in a pruned MLP and of none of its projections, so how it would have to be "
                "reordered is unknown"
            )
        return None

    def _require_shape(self, name: str, header: TensorHeader, part: str, linear: nn.Linear) -> None:
        for dimension, size in zip(_DIMENSIONS[part], (linear.out_features, linear.in_features), strict=True):
            if dimension is not None and (len(header.shape) <= dimension or header.shape[dimension] != size):
                raise SpenseError(
                    f"{header.file}: {name}: found the shape {header.shape}, expected {size} in dimension {dimension} "
                    f"for {self._folder}; an adapter fits the model that it was trained on"
                )


def _split(name: str) -> tuple[str, str]:
    """Of a tensor's name in an adapter: the layer, and what it is of that layer."""
    # Names of wrappers around a layer are written by some versions of PEFT.
    found = re.fullmatch(r"(.+?)(?:\.base_layer|\.modules_to_save)?\.(lora_.+|[^.]+)", name.removeprefix(_PREFIX))
    return (found[1], found[2]) if found else ("", name)


def _read_config(adapter: Path) -> dict[str, Any]:
    """The adapter's settings.

    Raises:
        SpenseError: not a folder of PEFT's, not a LoRA, or one that cannot be rewritten.
    """
    if not adapter.exists():
        raise SpenseError(f"{adapter}: no such folder")
    if not (adapter / CONFIG).is_file():
        raise SpenseError(f"{adapter}: no {CONFIG}; expected the folder of a PEFT adapter")
    config = read_object(adapter / CONFIG)
    file = adapter / CONFIG
    if config.get("peft_type") != "LORA":
        raise SpenseError(f"{file}: peft_type: found {config.get('peft_type')}, expected LORA")
    for key in _OTHER_FORMS:
        if config.get(key):
            raise SpenseError(f"{file}: {key}: found {json.dumps(config[key])}, which cannot be adapted")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise SpenseError(
            f"{file}: init_lora_weights: found {start}, which changes the weights of the model itself; expected a "
            "plain LoRA: PEFT's save_pretrained makes one of it with path_initial_model_for_weight_conversion"
        )
    if not (adapter / WEIGHTS).is_file():
        others = [path.name for path in sorted(adapter.glob("adapter_model.*"))]
        raise SpenseError(
            f"{adapter}: found {', '.join(others) or 'no weights'}, expected {WEIGHTS}, which PEFT's save_pretrained "
            "writes"
        )
    return config


def _read_weights(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors.

    Raises:
        SpenseError: they were adapted before.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
        if MARK in metadata:
            raise SpenseError(f"{file}: already adapted to a pruned model; adapt the original adapter instead")
        return metadata, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _compare_base(config: Mapping[str, Any], checkpoint: Checkpoint, adapter: Path, say: Say) -> None:
    """Compares the model that the adapter was trained on with the one that was pruned, where both are known.

    Raises:
        SpenseError: the adapter was trained on the pruned model itself.
    """
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return
    if Path(base).is_dir() and Path(base).samefile(checkpoint.folder):
        raise SpenseError(f"{adapter}: was trained on {base}, the pruned model itself, and fits it as it is")
    report = checkpoint.folder / "report.json"
    model = read_object(report).get("model") if report.is_file() else None
    if isinstance(model, str) and not set(_names(base)) & set(_names(model)):
        say(f"warning: the adapter was trained on {base}, and {checkpoint.folder} was pruned from {model}")


def _names(model: str) -> Iterator[str]:
    """Of a model on the hub or on the disk: what it may be recognized by."""
    yield model
    yield os.path.realpath(model)
    yield Path(model).name.lower()
