"""`--quantization spense`: vLLM's compressed-tensors config, with the pruned layers run region by region."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.platforms import current_platform

from vllm_spense.conformance import FP8, read_quantization
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import KEY, SIDECAR, Annotation, Regions
from vllm_spense.ops.dense_copies import DenseCopies
from vllm_spense.ops.elementwise_ops import INDUCTOR_OPTIONS
from vllm_spense.plugin.activation import FusedSiluAndMul
from vllm_spense.plugin.cudagraph_sizes import capture_prefill
from vllm_spense.plugin.experts import DenseExpertsMethod, ExpertRegions, RegionExpertsMethod
from vllm_spense.plugin.layer_role import split_of
from vllm_spense.plugin.linear import InputSplitLinearMethod, OutputSplitLinearMethod
from vllm_spense.plugin.lora import arrangement
from vllm_spense.plugin.norms import FusedRMSNorm
from vllm_spense.plugin.pairing import Pairing, only_modules_read_layers
from vllm_spense.plugin.parents import note_parents
from vllm_spense.plugin.preflight import check_engine, check_files
from vllm_spense.plugin.unpruned_linear import UnprunedFp8
from vllm_spense.plugin.vllm_internals import (
    CompressedTensorsW8A8Fp8MoEMethod,
    RoutedExperts,
    arrange_loras,
    mapped_name,
    on_engine_completion,
    stand_in,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

NAME = "spense"

Method = type[OutputSplitLinearMethod] | type[InputSplitLinearMethod]


def register_config() -> None:
    """Makes `--quantization spense` known to vLLM. Idempotent."""
    register_quantization_config(NAME)(SpenseConfig)


class SpenseConfig(CompressedTensorsConfig):
    """Gives pruned linear layers their methods and leaves everything else to compressed-tensors.

    `get_name` is inherited: models ask it how the layers are stored that are not ours.
    """

    #: Regions and method of every pruned linear layer, by its name in vLLM's spelling.
    layers: dict[str, tuple[Regions, Method]]
    #: Regions and number of the experts of every layer that has some, by the name of what holds them.
    experts: dict[str, tuple[Regions, int]]
    #: What `layers` and `experts` have been renamed with.
    mappers: list[WeightsMapper]
    #: Of the model's modules; made when vLLM builds the first of them.
    pairing: Pairing | None = None
    copies: DenseCopies

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: PretrainedConfig | None = None
    ) -> Any:
        """ "spense" for a checkpoint with an annotation, unless the user asked for another method.

        vLLM asks this for every quantized checkpoint, whoever made it.

        Raises:
            FormatError: the annotation is broken, or the user asked for spense and there is none.
        """
        if user_quant not in (None, NAME) or not isinstance(hf_quant_cfg, Mapping):
            return None
        if user_quant is None and KEY not in hf_quant_cfg:
            return None
        # Nowhere else does vLLM say where the annotation comes from.
        folder = getattr(hf_config, "_name_or_path", None)
        read_quantization(hf_quant_cfg, file=folder and f"{folder}/config.json")
        on_engine_completion(getattr(hf_config, "architectures", None) or (), complete_engine)
        return NAME

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where vLLM looks for an annotation if `--quantization spense` meets a checkpoint that is not quantized."""
        return [SIDECAR]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SpenseConfig:
        """From a checkpoint's `quantization_config`.

        Raises:
            SpenseError: the checkpoint is not quantized (`spense prune --quantize none`).
            FormatError: the annotation is missing or broken.
        """
        if "quant_method" not in config:
            raise SpenseError(
                "this checkpoint was pruned but not quantized, and Spense runs FP8: write it with "
                "`spense prune --quantize fp8`, or serve it dense without `--quantization` "
                f"(file: {SIDECAR}; key: quantization_config in config.json; found: nothing)"
            )
        # First, because compressed-tensors ends in tracebacks on what it does not know.
        annotation = read_quantization(config)
        spense = cast(SpenseConfig, super().from_config(config))
        spense.layers = _pruned_layers(annotation)
        spense.experts = {name: (annotation.regions(name), count) for name, count in annotation.experts.items()}
        spense.mappers = []
        spense.copies = DenseCopies()
        return spense

    @property
    def annotation(self) -> Annotation:
        """Read anew from what vLLM keeps: an annotation cannot be pickled, and this object travels to the workers."""
        assert self.config is not None
        return Annotation.from_dict(self.config[KEY])

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Checks the checkpoint, in the process that the user started."""
        if (folder := Path(model_name)).is_dir():
            check_files(self.annotation, folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Renames layers as vLLM's model does, and then as the language model inside a multimodal one does.

        vLLM may call it twice with the same mapper.
        """
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if hf_to_vllm_mapper in self.mappers:
            return
        self.mappers.append(hf_to_vllm_mapper)
        named = ((mapped_name(hf_to_vllm_mapper, name), layer) for name, layer in self.layers.items())
        self.layers = {name: layer for name, layer in named if name is not None}
        holders = ((mapped_name(hf_to_vllm_mapper, name), found) for name, found in self.experts.items())
        self.experts = {name: found for name, found in holders if name is not None}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method for a pruned layer, otherwise what compressed-tensors gives.

        Raises:
            FormatError: a layer inside a pruned module is not one that the annotation names, or a pruned layer is not
                quantized to FP8 per channel and per token.
        """
        if isinstance(layer, RoutedExperts) and prefix in self.experts:
            return self._experts_method(layer, prefix)
        found = self._find(layer, prefix) if isinstance(layer, LinearBase) else None
        if found is None:
            return super().get_quant_method(layer, prefix)
        engine = get_current_vllm_config()
        # vLLM has checked these settings with `complete_engine`, but for models that it knows under another name.
        check_engine(self.annotation, engine)
        if engine.lora_config is not None:
            arrange_loras(arrangement)
        for option, value in INDUCTOR_OPTIONS.items():
            engine.compilation_config.inductor_compile_config.setdefault(option, value)
        self._require_fp8(layer, prefix)
        regions, method = found
        return method(regions, prefix, self._pairing(), self.copies)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase:
        engine = get_current_vllm_config()
        check_engine(self.annotation, engine)
        regions, count = self.experts[prefix]
        parts = ExpertRegions(regions, count, prefix, engine.load_config.load_format == "dummy")
        if current_platform.is_cpu():
            # vLLM has no dense FP8 experts with a scale for each channel there.
            return RegionExpertsMethod(layer, parts)
        stock = super().get_quant_method(layer, prefix)
        if not isinstance(stock, CompressedTensorsW8A8Fp8MoEMethod):
            raise FormatError(
                "pruned experts have the wrong quantization",
                layer=prefix,
                key="quantization_config.config_groups",
                found=type(stock).__name__,
                expected="FP8 per channel and per token",
            )
        if reason := parts.reason_against_kernel(layer, torch.device("cuda", torch.cuda.current_device())):
            return DenseExpertsMethod(stock, parts, reason)
        return RegionExpertsMethod(layer, parts, engine.scheduler_config.max_num_batched_tokens)

    def get_scheme(self, layer: torch.nn.Module, layer_name: str | None = None) -> Any:
        """vLLM's, for an unpruned layer; ours stands in for it where it can."""
        return UnprunedFp8.instead_of(super().get_scheme(layer, layer_name), layer_name, self._pairing())

    def _pairing(self) -> Pairing:
        if self.pairing is None:
            note_parents()
            alone = only_modules_read_layers(get_current_vllm_config())
            self.pairing = Pairing(
                activations=alone and stand_in(FusedSiluAndMul), norms=alone and stand_in(FusedRMSNorm)
            )
        return self.pairing

    def _find(self, layer: LinearBase, prefix: str) -> tuple[Regions, Method] | None:
        """The regions and method of a layer in a pruned module: by its name, or by what it is."""
        parent, _, leaf = prefix.rpartition(".")
        siblings = {name: each for name, each in self.layers.items() if name.rpartition(".")[0] == parent}
        if not siblings:
            return None
        merged = self.packed_modules_mapping.get(leaf, [leaf])
        named = {siblings.get(f"{parent}.{projection}") for projection in merged}
        if len(named) == 1 and None not in named:
            return named.pop()
        regions, _ = next(iter(siblings.values()))
        split = split_of(layer, regions, prefix)
        found = next((each for each in siblings.values() if each[1].split == split), None)
        # Going on dense would give the right answers, and no reason to notice.
        if found is None:
            raise FormatError(
                "vLLM has a layer in a pruned module that is not one of its projections",
                layer=prefix,
                key="projections",
                found=leaf,
                expected=" | ".join(siblings),
            )
        return found

    def _require_fp8(self, layer: torch.nn.Module, prefix: str) -> None:
        scheme = self.get_scheme_dict(layer, prefix) or {}
        for name, expected in FP8.items():
            args: Any = scheme.get(name)
            found = args and (args.num_bits, args.type, args.strategy, args.dynamic)
            if found != expected:
                raise FormatError(
                    "a pruned layer has the wrong quantization",
                    layer=prefix,
                    key=f"quantization_config.config_groups.….{name}",
                    found=found,
                    expected=expected,
                )


def complete_engine(engine: VllmConfig) -> None:
    """Checks an engine's settings against its checkpoint, and asks for what Spense wants of them.

    vLLM calls it as it constructs the configuration, in the process that the user started: it shows a quantization
    config the engine's other settings only when a worker builds the model.

    Raises:
        SpenseError, FormatError: as `check_engine`.
    """
    model = engine.model_config
    if model.quantization != NAME:
        return
    for hf_config in (model.hf_config, model.hf_text_config):
        config = getattr(hf_config, "quantization_config", None)
        if isinstance(config, Mapping) and KEY in config:
            check_engine(read_quantization(config), engine)
            break
    capture_prefill(engine)


def _pruned_layers(annotation: Annotation) -> dict[str, tuple[Regions, Method]]:
    projections = annotation.projections
    methods: dict[str, Method] = {
        projections.gate: OutputSplitLinearMethod,
        projections.up: OutputSplitLinearMethod,
        projections.down: InputSplitLinearMethod,
    }
    return {
        f"{module}.{projection}": (annotation.regions(module), method)
        for module in annotation.modules
        for projection, method in methods.items()
    }
