"""What a checkpoint and a command line must agree on, checked before vLLM starts a worker.

An error in a worker reaches the user as one line amid hundreds of traceback; here it is the last line of the command.
"""

from __future__ import annotations

import os
from pathlib import Path

import vllm
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform

from vllm_spense.checkpoint_files import read_headers, tensor_headers
from vllm_spense.conformance import check_tensors
from vllm_spense.errors import SpenseError
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
#: Classes of vLLM that take the names of single experts from a release on; before it they end in a KeyError.
NAMED_SINCE = dict.fromkeys(("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"), (0, 29))


def check_engine(annotation: Annotation, engine: VllmConfig) -> None:
    """Refuses what the engine's settings and the regions cannot do together.

    Raises:
        SpenseError: an unknown path in `SPENSE_PATH`, no number in `SPENSE_DENSE_COPY_GIB`, an unsupported load format,
            weights offloaded to the host, CUDA graphs that garble, or experts with an option, or of a model, that this
            vLLM does not serve.
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
    # vLLM offloads what a layer has before its weights are packed, which is then dropped.
    for option, found in (
        ("--cpu-offload-gb", engine.offload_config.uva.cpu_offload_gb),
        ("--offload-group-size", engine.offload_config.prefetch.offload_group_size),
    ):
        if found:
            raise SpenseError(
                "Spense keeps the weights of pruned layers in GPU memory and cannot offload them to the host "
                f"(key: {option}; found: {found}; expected: 0)"
            )
    # Eager engines capture nothing, whatever the mode.
    full = engine.compilation_config.cudagraph_mode is CUDAGraphMode.FULL and not engine.model_config.enforce_eager
    if full and current_platform.is_cuda():
        raise SpenseError(
            "in this mode vLLM 0.26 garbles what it answers on a GPU, without Spense too; no newer one was tried; vLLM "
            "also takes it where splitting_ops is empty or fuse_attn_quant is set (key: cudagraph_mode; found: "
            "FULL; expected: FULL_AND_PIECEWISE, the default | FULL_DECODE_ONLY | PIECEWISE | NONE)"
        )
    for module in annotation.modules:
        shard(annotation.regions(module), 0, size, module)
    if annotation.experts:
        _check_experts(annotation, engine)


def _check_experts(annotation: Annotation, engine: VllmConfig) -> None:
    parallel = engine.parallel_config
    for option, found, expected in (
        ("--enable-eplb", parallel.enable_eplb, False),
        ("--data-parallel-size", parallel.data_parallel_size, 1),
        ("--enable-lora", engine.lora_config is not None, False),
    ):
        if found != expected:
            raise SpenseError(
                "Spense cannot serve pruned experts with this option; --quantization compressed-tensors serves the "
                f"same files as dense experts (key: {option}; found: {found}; expected: {expected})"
            )
    for architecture in engine.model_config.architectures:
        if vllm.__version_tuple__[:2] < (since := NAMED_SINCE.get(architecture, (0, 0))):
            raise SpenseError(
                f"vLLM's {architecture} does not load experts one by one in this release (found: vLLM "
                f"{vllm.__version__}; expected: {'.'.join(map(str, since))} or later)"
            )
    # Under expert parallelism every rank has whole experts.
    size = 1 if parallel.enable_expert_parallel else parallel.tensor_parallel_size
    for name in annotation.experts:
        shard(annotation.regions(name), 0, size, name)


def check_files(annotation: Annotation, folder: Path) -> None:
    """Compares the annotation with the headers of the safetensors files in `folder`; reads no weights.

    Raises:
        FormatError: a file is missing or damaged, or the headers break a rule of docs/format.md.
    """
    # vLLM loads whatever the files are called.
    headers = tensor_headers(folder) or read_headers(sorted(folder.glob("*.safetensors")))
    if headers:  # else nothing to compare: another weight format, or configuration files only
        check_tensors(annotation, headers, folder)
