"""What a checkpoint and a command line must agree on, checked before vLLM starts a worker.

An error in a worker reaches the user as one line amid hundreds of traceback; here it is the last line of the command.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from vllm.config import VllmConfig

from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import Annotation
from vllm_spense.layout import shard
from vllm_spense.ops.dispatch import GRANT, SWITCH, forced_path, granted_bytes

#: Formats whose loader hands a checkpoint's tensors to the layers' own weight loaders; others restore what vLLM made
#: of the tensors on some earlier run, or expect another checkpoint.
LOAD_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
    "npcache",
    "pt",
    "dummy",
)


def check_engine(annotation: Annotation, engine: VllmConfig) -> None:
    """Refuses what the engine's settings and the regions cannot do together.

    Raises:
        SpenseError: an unknown path in `SPENSE_PATH`, no number in `SPENSE_DENSE_COPY_GIB`, an unsupported load format,
            or LoRA with tensor parallelism.
        FormatError: the tensor parallel size does not divide a region.
    """
    forced_path(os.environ.get(SWITCH))
    granted_bytes(os.environ.get(GRANT))
    load_format, size = str(engine.load_config.load_format), engine.parallel_config.tensor_parallel_size
    if load_format not in LOAD_FORMATS:
        raise SpenseError(
            "Spense cannot load its regions with this load format "
            f"(key: --load-format; found: {load_format}; expected: {' | '.join(LOAD_FORMATS)})"
        )
    if engine.lora_config is not None and size > 1:
        # vLLM gives each rank a contiguous chunk of an adapter, which is not the rank's part of the regions.
        raise SpenseError(
            "LoRA adapters do not work with Spense on more than one rank "
            f"(key: --tensor-parallel-size with --enable-lora; found: {size}; expected: 1)"
        )
    for module in annotation.modules:
        shard(annotation.regions(module), 0, size, module)


@dataclass(frozen=True)
class _Tensor:
    file: Path
    dtype: str
    shape: tuple[int, ...]


def check_files(annotation: Annotation, folder: Path) -> None:
    """Compares the annotation with the headers of the safetensors files in `folder`; reads no weights.

    Raises:
        FormatError: a file is missing or damaged, or a tensor of a pruned module is missing, has the wrong dtype, or
            a shape that contradicts the regions.
    """
    tensors = _read_headers(folder)
    if not tensors:
        return  # nothing to compare: another weight format, or configuration files only
    projections = annotation.projections
    parts = 2 if projections.fused else 1
    for module in annotation.modules:
        intermediate = annotation.regions(module).intermediate
        for projection, dim, extent in (
            (projections.gate, 0, parts * intermediate),
            (projections.up, 0, parts * intermediate),
            (projections.down, 1, intermediate),
        ):
            name = f"{module}.{projection}.weight"
            weight, scale = _expect(tensors, name, folder), _expect(tensors, f"{name}_scale", folder)
            if weight.dtype != "F8_E4M3":
                raise FormatError(
                    "a pruned weight is not FP8", file=weight.file, layer=name, found=weight.dtype, expected="F8_E4M3"
                )
            if weight.shape[dim] != extent:
                raise FormatError(
                    "the regions do not add up to the intermediate size",
                    file=weight.file,
                    layer=name,
                    key="regions",
                    found=f"{weight.shape[dim]} {('rows', 'columns')[dim]}",
                    expected=extent,
                )
            if scale.shape != (weight.shape[0], 1):
                raise FormatError(
                    "a scale does not fit its weight",
                    file=scale.file,
                    layer=f"{name}_scale",
                    found=scale.shape,
                    expected=(weight.shape[0], 1),
                )


def _expect(tensors: dict[str, _Tensor], name: str, folder: Path) -> _Tensor:
    if name not in tensors:
        raise FormatError(
            "a tensor of a pruned module is missing", file=folder, layer=name, key="modules", found="nothing"
        )
    return tensors[name]


def _read_headers(folder: Path) -> dict[str, _Tensor]:
    files = set(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files |= {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    tensors = {}
    for file in sorted(files):
        if not file.exists():
            raise FormatError(
                "a weight file is missing", file=file, expected=f"the file, because {index.name} names it"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    header = opened.get_slice(name)
                    tensors[name] = _Tensor(file, header.get_dtype(), tuple(header.get_shape()))
        except SafetensorError as error:
            raise FormatError("a weight file is damaged", file=file, found=error) from None
    return tensors
