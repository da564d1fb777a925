"""Reopens a checkpoint and proves that it is what its annotation says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from offline_prune.model.safetensors_reader import TensorFiles, read_json
from vllm_spense.errors import FormatError
from vllm_spense.format import KEY, SIDECAR, Annotation, Regions
from vllm_spense.layout import require_2of4

#: A dense region with more zeros than this was pruned too; rounding to FP8 alone makes about one in a hundred.
MAX_DENSE_ZEROS = 0.25


@dataclass(frozen=True)
class Checkpoint:
    """An opened Spense checkpoint.

    Attributes:
        annotation_file: config.json, or spense.json for a checkpoint without FP8.
        fp8: whether linear layers are FP8.
    """

    folder: Path
    annotation: Annotation
    annotation_file: Path
    fp8: bool
    tensors: TensorFiles


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads and validates the annotation of a checkpoint.

    Raises:
        SpenseError: not a checkpoint folder.
        FormatError: no annotation, or one that breaks the format.
    """
    config_file, sidecar = folder / "config.json", folder / SIDECAR
    quantization = read_json(config_file).get("quantization_config")
    if isinstance(quantization, dict) and KEY in quantization:
        annotation = Annotation.from_dict(quantization[KEY], config_file)
        return Checkpoint(folder, annotation, config_file, True, TensorFiles(folder))
    if quantization is None and sidecar.exists():
        annotation = Annotation.from_json(sidecar.read_text(encoding="utf-8"), sidecar)
        return Checkpoint(folder, annotation, sidecar, False, TensorFiles(folder))
    raise FormatError(
        "not a Spense checkpoint", file=config_file, key=f"quantization_config.{KEY}", found="nothing", expected=KEY
    )


@dataclass(frozen=True)
class Verified:
    """What was proven.

    Attributes:
        tensors: how many tensors were read.
        mlps: how many MLPs are in the Spense format.
        sparse_zeros, dense_zeros: share of zeros in all sparse and in all dense regions.
    """

    tensors: int
    mlps: int
    sparse_zeros: float
    dense_zeros: float


def verify(folder: Path) -> Verified:
    """Checks every tensor and every region.

    Sparse regions are 2:4, dense regions are not pruned, shapes agree with the annotation, FP8 weights have finite
    positive scales of shape (N, 1), nothing is NaN or infinite, and no pruned weight is −0.0.

    Raises:
        FormatError: the first thing that is wrong, with file, layer, found and expected.
    """
    checkpoint = open_checkpoint(folder)
    files = checkpoint.tensors
    for name in files:
        _check_values(files, name)
    zeros = {"sparse": [0, 0], "dense": [0, 0]}
    for module in checkpoint.annotation.modules:
        regions = checkpoint.annotation.regions(module)
        for layer, part, (sparse, dense) in _regions(checkpoint, module, regions):
            where = files.file_of(f"{layer}.weight")
            label = f"{layer} ({part})"
            require_2of4(sparse, label, where)
            if (_bits(sparse) == _negative_zero(sparse)).any():
                raise FormatError("a pruned weight is −0.0", file=where, layer=label, found="-0.0", expected="0.0")
            for key, region in (("sparse", sparse), ("dense", dense)):
                zeros[key][0] += int((region.float() == 0).sum())
                zeros[key][1] += region.numel()
            if dense.numel() and (share := float((dense.float() == 0).float().mean())) > MAX_DENSE_ZEROS:
                raise FormatError(
                    "the dense region has been pruned",
                    file=where,
                    layer=label,
                    found=f"{share:.1%} zeros",
                    expected=f"at most {MAX_DENSE_ZEROS:.0%}",
                )
    shares = {key: (count / total if total else 0.0) for key, (count, total) in zeros.items()}
    return Verified(len(list(files)), len(checkpoint.annotation.modules), shares["sparse"], shares["dense"])


def _check_values(files: TensorFiles, name: str) -> None:
    tensor = files.read(name)
    where = files.file_of(name)
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise FormatError("NaN or infinity", file=where, layer=name, found="not finite", expected="finite values")
    if tensor.dtype == torch.float8_e4m3fn:
        scale = f"{name}_scale"
        if scale not in files:
            raise FormatError("an FP8 weight without scales", file=where, layer=name, found="nothing", expected=scale)
        if files.shape(scale) != (len(tensor), 1):
            raise FormatError(
                "wrong shape", file=where, layer=scale, found=files.shape(scale), expected=(len(tensor), 1)
            )
    if name.endswith(".weight_scale") and not (tensor > 0).all():
        raise FormatError(
            "a scale is not positive", file=where, layer=name, found=float(tensor.min()), expected="above 0"
        )


def _regions(
    checkpoint: Checkpoint, module: str, regions: Regions
) -> list[tuple[str, str, tuple[torch.Tensor, torch.Tensor]]]:
    """(layer, which projection, (sparse region, dense region)) of gate, up and down."""
    names = checkpoint.annotation.projections
    whole = {
        name: _weight(checkpoint, f"{module}.{name}") for name in dict.fromkeys((names.gate, names.up, names.down))
    }
    rows = regions.intermediate * (2 if names.fused else 1)
    for name in dict.fromkeys((names.gate, names.up)):
        _check_extent(checkpoint, f"{module}.{name}", "rows", whole[name].shape[0], rows, regions)
    _check_extent(
        checkpoint, f"{module}.{names.down}", "columns", whole[names.down].shape[1], regions.intermediate, regions
    )
    gate, up = whole[names.gate].chunk(2) if names.fused else (whole[names.gate], whole[names.up])
    down = whole[names.down]
    s = regions.sparse
    return [
        (f"{module}.{names.gate}", "gate", (gate[:s], gate[s:])),
        (f"{module}.{names.up}", "up", (up[:s], up[s:])),
        (f"{module}.{names.down}", "down", (down[:, :s], down[:, s:])),
    ]


def _weight(checkpoint: Checkpoint, layer: str) -> torch.Tensor:
    name = f"{layer}.weight"
    if name not in checkpoint.tensors:
        raise FormatError(
            "the annotation names a layer that the checkpoint does not have",
            file=checkpoint.annotation_file,
            layer=layer,
            key="modules",
            found="nothing",
            expected=name,
        )
    return checkpoint.tensors.read(name)


def _check_extent(checkpoint: Checkpoint, layer: str, what: str, found: int, expected: int, regions: Regions) -> None:
    if found != expected:
        raise FormatError(
            f"the regions do not add up to the {what} of the weight",
            file=checkpoint.annotation_file,
            layer=layer,
            key="regions",
            found=f"{found} {what}",
            expected=f"{expected} (sparse {regions.sparse} + dense {regions.dense})",
        )


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[weight.element_size()])


def _negative_zero(weight: torch.Tensor) -> int:
    bits = 8 * weight.element_size()
    return 0x80 if bits == 8 else -(1 << (bits - 1))
