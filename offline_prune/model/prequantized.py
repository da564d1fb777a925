"""Weights that a source checkpoint stores in FP8 with scales, and the refusal of whatever else comes with scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from offline_prune.model.safetensors_reader import SafetensorsReader
from vllm_spense.checkpoint_files import read_object
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY

#: What an FP8 weight W₈ is multiplied by, under the names that DeepSeek, ModelOpt and compressed-tensors give it.
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
#: Scales of activations and of the KV cache: how a server rounds at run time, nothing that the weights depend on.
_RUN_TIME_SCALES = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale", "prob_scale")
#: Endings of tensors that belong to a packed or scaled weight; the model itself has none of these names.
_PACKED = ("_scale", "_scale_inv", "_scales", "_scale_2", "_zero_point", "_packed", "_blocks", "_g_idx", "_shape")
_PACKED_LEAVES = ("scales", "qweight", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "k_proj_scale")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Keys of config.json that say how weights are stored.
CONFIG_KEYS = ("quantization_config", "compression_config")
#: ModelOpt says it in a file of its own.
HF_QUANT_CONFIG = "hf_quant_config.json"


class Fp8Weights:
    """Which tensors of some files are FP8 weights, which are their scales, and the weights themselves.

    W = W₈ · s, with s one value, one for each output channel, or one for each block of `weight_block_size`.

    Args:
        files: the checkpoint.
        parameters: names in the files that the model has parameters or buffers for.
        config: its config.json.
        dtype: of the weights after they are multiplied; None for the one that the config names.

    Attributes:
        dtype: of the weights after they are multiplied.
        hidden: names of tensors that say how others are stored, or round at run time: no reader of the result needs
            them.

    Raises:
        SpenseError: a packed or scaled tensor that is not understood; its name is in the message.
    """

    def __init__(
        self,
        files: SafetensorsReader,
        parameters: Iterable[str],
        config: Mapping[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._files = files
        found = config.get("quantization_config") or config.get("compression_config") or {}
        self._block = _block_size(found)
        self.dtype = dtype or _dtype(config)
        known = set(parameters)
        self._scale_of = {name: self._find_scale(name) for name in files if files.dtype(name) in _FP8}
        self.hidden = set(self._scale_of.values())
        for name in files:
            if name not in known | self.hidden and _says_how(name):
                if name.rpartition(".")[2] not in _RUN_TIME_SCALES:
                    raise SpenseError(
                        f"{files.file_of(name)}: found the tensor {name}, part of a quantized weight that Spense does "
                        f"not read{_method(found)}; expected FP8 weights with weight_scale or weight_scale_inv, "
                        "or the original BF16 model"
                    )
                self.hidden.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._scale_of

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The weight of a name that is in here, (N, K) in `dtype`; or of a weight (E, N, K) the matrix of an index,
        (1, N, K)."""
        part = None if index is None else (slice(index, index + 1),)
        scaled = self._scale_of[name]
        # A scale of fewer dimensions is that of every matrix.
        of_scale = part if len(self._files.shape(scaled)) == len(self._files.shape(name)) else None
        weight, scale = self._files.read(name, part), self._files.read(scaled, of_scale).float()
        if scale.numel() == 1:
            spread = scale.reshape(1)
        elif scale.ndim == 1:
            spread = scale.unsqueeze(1)
        else:
            rows, columns = self._blocks(weight.shape, scale.shape, name)
            spread = scale.repeat_interleave(rows, -2)[..., : weight.shape[-2], :]
            if scale.shape[-1] > 1:
                spread = spread.repeat_interleave(columns, -1)[..., : weight.shape[-1]]
        return (weight.float() * spread).to(self.dtype)

    def _find_scale(self, name: str) -> str:
        stem = name.removesuffix("weight")
        candidates = [f"{stem}{scale}" for scale in _WEIGHT_SCALES] if stem != name else [f"{name}_scale_inv"]
        candidates += [f"{name}_scale"] if stem == name else []
        for scale in candidates:
            if scale in self._files:
                self._blocks(self._files.shape(name), self._files.shape(scale), name)
                return scale
        raise SpenseError(
            f"{self._files.file_of(name)}: {name} is FP8 and has no scale; expected {' or '.join(candidates)}"
        )

    def _blocks(self, weight: tuple[int, ...], scale: tuple[int, ...], name: str) -> tuple[int, int]:
        """Rows and columns of the weight that one value of the scale is for.

        Raises:
            SpenseError: the shapes do not fit.
        """
        n, k = weight[-2], weight[-1]
        if math.prod(scale) == 1:
            return n, k
        if tuple(scale) in {(n,), (*weight[:-2], n, 1)}:
            return 1, k
        rows, columns = self._block
        if tuple(scale) == (*weight[:-2], math.ceil(n / rows), math.ceil(k / columns)):
            return rows, columns
        raise SpenseError(
            f"{self._files.file_of(name)}: the scale of {name} has shape {tuple(scale)}; expected one value, one for "
            f"each of {n} rows, or one for each block of {rows} × {columns}"
        )


def config_of_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what says how the source's weights are stored."""
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def refuse_unreadable(folder: Path, config: Mapping[str, Any], pruned_too: bool = False) -> None:
    """Raises SpenseError for a checkpoint whose config says that its weights are stored in a way Spense cannot read.

    Args:
        pruned_too: takes what Spense wrote, which is not to be pruned again.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found and (folder / HF_QUANT_CONFIG).exists():
        found = read_object(folder / HF_QUANT_CONFIG).get("quantization")
    if not found:
        return
    if not isinstance(found, Mapping):
        raise SpenseError(
            f"{folder}/config.json: quantization_config: found {type(found).__name__}, expected an object"
        )
    if KEY in found and not pruned_too:
        raise SpenseError(
            f"{folder}: already quantized and pruned by Spense; expected the dense model that it was made from"
        )
    if not _is_fp8(found):
        raise SpenseError(
            f"{folder}: already quantized{_method(found)}; prune the original BF16 model instead, or its FP8 version"
        )


def _is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether it may be FP8; the tensors themselves decide."""
    method = str(config.get("quant_method") or "").lower()
    if method == "compressed-tensors":
        return config.get("format") in ("float-quantized", "naive-quantized")
    algorithm = str(config.get("quant_algo") or _nested(config, "quantization", "quant_algo") or "fp8").lower()
    return method in ("fp8", "fbgemm_fp8", "modelopt", "") and algorithm.startswith("fp8")


def _nested(config: Mapping[str, Any], *keys: str) -> Any:
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _method(config: Mapping[str, Any]) -> str:
    said = [config.get(key) for key in ("quant_method", "quant_algo", "format")]
    return f" ({', '.join(str(each) for each in said if each)})" if any(said) else ""


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """From DeepSeek's key or compressed-tensors'; 128 × 128 is what everybody uses."""
    groups = config.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, Mapping) else {}
    rows, columns = config.get("weight_block_size") or _nested(first, "weights", "block_structure") or (128, 128)
    return int(rows), int(columns)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else {}
    said = [place.get(key) for place in (config, text) for key in ("dtype", "torch_dtype")]  # type: ignore[union-attr]
    found = getattr(torch, str(next((each for each in said if each), "bfloat16")), torch.bfloat16)
    return found if found in (torch.float16, torch.float32) else torch.bfloat16


def _says_how(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in _PACKED_LEAVES or leaf.endswith(_PACKED) or leaf in _RUN_TIME_SCALES
