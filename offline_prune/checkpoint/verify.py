"""Reopens a checkpoint and proves that it is what its annotation says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from offline_prune.checkpoint.permutations import read_permutations
from offline_prune.model.conversion import Conversions
from offline_prune.model.safetensors_reader import SafetensorsReader
from offline_prune.model.skeleton import empty_model
from vllm_spense.checkpoint_files import read_object
from vllm_spense.conformance import (
    SCALE_SUFFIX,
    WEIGHT_DTYPE,
    Ignored,
    check_tensors,
    read_annotated,
    require_sane_depth,
)
from vllm_spense.errors import FormatError
from vllm_spense.format import KEY, Annotation
from vllm_spense.layout import excess_groups, require_2of4


@dataclass(frozen=True)
class Checkpoint:
    """An opened Spense checkpoint.

    Attributes:
        config: the content of config.json.
        ignored: linear layers that are not FP8; None for a checkpoint without FP8.
    """

    folder: Path
    annotation: Annotation
    config: dict[str, Any]
    ignored: Ignored | None
    tensors: SafetensorsReader

    @property
    def fp8(self) -> bool:
        """Whether linear layers are FP8."""
        return self.ignored is not None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's configuration and the headers of its weights, and checks them against each other.

    Raises:
        SpenseError: not a checkpoint folder.
        FormatError: no annotation, or files that break the format.
    """
    config_file = folder / "config.json"
    config = read_object(config_file)
    found = read_annotated(folder, config)
    if found is None:
        raise FormatError(
            "not a Spense checkpoint", file=config_file, key=f"quantization_config.{KEY}", found="nothing", expected=KEY
        )
    tensors = SafetensorsReader(folder)
    quantization = found.quantization
    check_tensors(found.annotation, tensors.headers, folder, quantized=quantization is not None)
    ignored = None if quantization is None else Ignored.read(quantization, found.file)
    return Checkpoint(folder, found.annotation, config, ignored, tensors)


@dataclass(frozen=True)
class Verified:
    """What was proven.

    Attributes:
        tensors: how many tensors were read.
        mlps: how many MLPs are in the Spense format, each expert one.
        sparse_zeros, dense_zeros: share of zeros in all sparse and in all dense regions.
        also_2of4: projections whose dense region is 2:4 from end to end. The format allows it, and where the model
            was pruned before it is right; no file tells that from an annotation that counts too few sparse indices.
    """

    tensors: int
    mlps: int
    sparse_zeros: float
    dense_zeros: float
    also_2of4: tuple[str, ...] = ()


def verify(folder: Path, trust_remote_code: bool = False) -> Verified:
    """Checks every tensor and every region.

    Sparse regions are 2:4, shapes agree with the annotation, every weight that the model's architecture has is there in
    the type that the configuration says, FP8 weights have finite positive scales of shape (N, 1), nothing is NaN or
    infinite, and no FP8 or pruned weight is −0.0. What the pruner recorded of its reordering are permutations.

    Args:
        trust_remote_code: see `empty_model`.

    Raises:
        FormatError: the first thing that is wrong, with file, layer, found and expected.
    """
    checkpoint = open_checkpoint(folder)
    files = checkpoint.tensors
    _refuse_strays(checkpoint)
    _check_architecture(checkpoint, trust_remote_code)
    read_permutations(folder, checkpoint.annotation)
    for name in files:
        _check_values(files, name)
    zeros = {"sparse": [0, 0], "dense": [0, 0]}
    also_2of4 = []
    for layer, part, sparse, dense in _regions(checkpoint):
        where, label = files.file_of(f"{layer}.weight"), f"{layer} ({part})"
        require_2of4(sparse, label, where)
        _refuse_negative_zeros(sparse, label, where)
        for key, region in (("sparse", sparse), ("dense", dense)):
            zeros[key][0] += int((region.float() == 0).sum())
            zeros[key][1] += region.numel()
        if dense.numel() and (dense.float() != 0).any() and not excess_groups(dense).any():
            also_2of4.append(label)
    shares = {key: (count / total if total else 0.0) for key, (count, total) in zeros.items()}
    mlps = sum(1 for _ in checkpoint.annotation.mlps())
    return Verified(len(files.headers), mlps, shares["sparse"], shares["dense"], tuple(also_2of4))


def _refuse_strays(checkpoint: Checkpoint) -> None:
    """Some readers take all weights in a folder, some those that the index names, some `model.safetensors` first."""
    named = {header.file.name for header in checkpoint.tensors.headers.values()}
    for file in sorted(checkpoint.folder.glob("*.safetensors")):
        if file.name not in named:
            raise FormatError(
                "weights that are not part of the checkpoint, and that some readers load",
                file=file,
                found=file.name,
                expected=" | ".join(sorted(named)),
            )


def _check_architecture(checkpoint: Checkpoint, trust_remote_code: bool) -> None:
    """Every parameter of the model that config.json describes is there, in the right shape and type."""
    headers, folder = checkpoint.tensors.headers, checkpoint.folder
    require_sane_depth(checkpoint.config, len(headers), folder / "config.json")
    model = empty_model(folder, trust_remote_code)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rename = _Renaming(model)
    found = set()
    for name, header in headers.items():
        if name.endswith(f".weight{SCALE_SUFFIX}"):
            continue
        names, converted = rename(name)
        held = [known for known in names if known in parameters]
        if not held:
            continue
        found |= {id(parameters[known]) for known in held}
        shape = tuple(parameters[held[0]].shape)
        if not converted and header.shape != shape:
            raise FormatError(
                "wrong shape for the model of config.json",
                file=header.file,
                layer=name,
                found=header.shape,
                expected=shape,
            )
        if held[0] in linears or (converted and len(header.shape) == 2):
            _check_linear(checkpoint, name)
    head = model.get_output_embeddings()
    if type(model).__name__ not in (checkpoint.config.get("architectures") or [type(model).__name__]):
        # A model saved without its head: transformers gives the skeleton one all the same.
        found |= {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    for name, parameter in parameters.items():
        if id(parameter) not in found:
            raise FormatError(
                "a tensor of the model is missing", file=folder, layer=name, found="nothing", expected=name
            )


class _Renaming:
    """The names under which transformers keeps a tensor of the files, and whether it converts it on the way.

    Converted, one tensor may become several: a vision tower's qkv, say, three weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._conversions = Conversions(model)

    def __call__(self, name: str) -> tuple[list[str], bool]:
        known, pattern = self._conversions.renamed(name)
        if pattern is None:
            return [known], False
        for rule in self._conversions.converters:
            # The name has the first of the targets in it.
            first, *others = rule.target_patterns
            if pattern in rule.source_patterns and first in known:
                before, _, after = known.partition(first)
                return [known, *(f"{before}{other}{after}" for other in others)], True
        return [known], True


def _check_linear(checkpoint: Checkpoint, name: str) -> None:
    """An FP8 weight if the configuration says so, and only then. Scales go with FP8 everywhere (`check_tensors`)."""
    header, ignored = checkpoint.tensors.headers[name], checkpoint.ignored
    fp8 = ignored is not None and name.removesuffix(".weight") not in ignored
    if fp8 != (header.dtype == WEIGHT_DTYPE):
        raise FormatError(
            "the weight of a linear layer is not FP8"
            if fp8
            else "a linear layer that is not quantized has FP8 weights",
            file=header.file,
            layer=name,
            key="quantization_config.ignore",
            found=header.dtype,
            expected=WEIGHT_DTYPE if fp8 else "BF16 | F16 | F32",
        )


def _check_values(files: SafetensorsReader, name: str) -> None:
    tensor, where = files.read(name), files.file_of(name)
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise FormatError("NaN or infinity", file=where, layer=name, found="not finite", expected="finite values")
    if tensor.dtype == torch.float8_e4m3fn:
        _refuse_negative_zeros(tensor, name, where)
    if name.endswith(f".weight{SCALE_SUFFIX}") and not (tensor > 0).all():
        raise FormatError(
            "a scale is not positive", file=where, layer=name, found=float(tensor.min()), expected="above 0"
        )


def _refuse_negative_zeros(weight: torch.Tensor, layer: str, where: Path) -> None:
    zero = weight.float() == 0
    if (zero & torch.signbit(weight.float())).any():
        raise FormatError("a weight is −0.0", file=where, layer=layer, found="-0.0", expected="0.0")


def _regions(checkpoint: Checkpoint) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """(layer, which projection, sparse region, dense region) of every pruned gate, up and down."""
    annotation, files = checkpoint.annotation, checkpoint.tensors
    for module in annotation.mlps():
        s = annotation.regions(module).sparse
        names = annotation.layers(module)
        gate, up, down = (files.read(f"{layer}.weight") for layer in names)
        if names[0] == names[1]:
            gate, up = gate.chunk(2)
        yield names[0], "gate", gate[:s], gate[s:]
        yield names[1], "up", up[:s], up[s:]
        yield names[2], "down", down[:, :s], down[:, s:]
