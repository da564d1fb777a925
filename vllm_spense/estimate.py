"""What sparsity is worth before anything is pruned: the time of an output token and the bytes, from a roofline.

A decode step reads every weight once and every token of the KV cache once; of experts, those that have tokens. GEMMs
take what `roofline` says, with efficiencies as measured on an H100, those of mixtures on an H200 (docs/performance.md
says how far off that is). Where the plan cache of a machine knows how long its GEMMs take, its times replace this.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vllm_spense import hub
from vllm_spense.checkpoint_files import read_object
from vllm_spense.conformance import Annotated, read_annotated, require_extent
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import MIN_ALIGNMENT, SIDECAR, Regions
from vllm_spense.model_sizes import Mixture, Model, Pruned
from vllm_spense.roofline import (
    DENSE_EXPERTS,
    KV_CACHE,
    LM_HEAD,
    SPARSE_EXPERTS,
    SPENSE_ATTENTION,
    STOCK,
    STOCK_ATTENTION,
    STOCK_EXPERTS,
    Efficiency,
    Gemm,
    Gpu,
    cutlass_us,
    region_us,
)
from vllm_spense.shapes import MIXTURES, SHAPES

DEFAULT_SPARSITY = 0.375


@dataclass(frozen=True)
class _Engine:
    """What differs beside the MLPs: attention's GEMMs, and what a layer takes besides, µs for it and for each token:
    launches, norms, activation functions, quantization.

    Attributes:
        elementwise: of a layer with an MLP, at `_ELEMENTWISE_INTERMEDIATE`.
        around_experts: of a layer with experts, at `_AROUND_INTERMEDIATE` of all experts of a token together.
    """

    attention: Efficiency
    elementwise: tuple[float, float]
    around_experts: tuple[float, float]


#: Spense's GEMMs load weights while what is before them runs.
_STOCK = _Engine(STOCK_ATTENTION, (33.0, 0.44), (80.0, 0.24))
_SPENSE = _Engine(SPENSE_ATTENTION, (22.5, 0.5), (50.0, 0.28))
_ELEMENTWISE_INTERMEDIATE, _AROUND_INTERMEDIATE = 25600, 8 * 768
#: A size in a plan cache is less.
_MOST = 2**31
#: Of a GPU's memory, what vLLM takes unless told otherwise (`--gpu-memory-utilization`).
MEMORY_UTILIZATION = 0.92


@dataclass(frozen=True)
class Timed:
    """What a plan cache says: the time of a path for up to `tokens` rows of activations."""

    gpu: str
    gemm: Gemm
    tokens: int
    path: str
    us: float


@dataclass(frozen=True)
class Estimate:
    """
    Attributes:
        dense_ms, spense_ms: one decode step.
        dense_weight_bytes, spense_weight_bytes, kv_bytes: in the GPU's memory.
        calibrated: whether times of the plan cache went into it.
    """

    dense_ms: float
    spense_ms: float
    dense_weight_bytes: int
    spense_weight_bytes: int
    kv_bytes: int
    calibrated: bool

    @property
    def speed_up(self) -> float:
        return self.dense_ms / self.spense_ms

    def requests(self, gpu: Gpu, batch: int, weight_bytes: int) -> int | None:
        """How many requests' KV cache fits beside weights in what vLLM takes of a GPU, activations not counted; None
        where they take no room."""
        room = max(0, int(gpu.memory_bytes * MEMORY_UTILIZATION) - weight_bytes)
        return room * batch // self.kv_bytes if self.kv_bytes else None


def estimate(
    model: Model,
    pruned: Pruned,
    gpu: Gpu,
    batch: int,
    context: int,
    kv_cache_dtype: str = "auto",
    cache: Sequence[Timed] = (),
) -> Estimate:
    """One decode step of `batch` requests with `context` tokens each on one GPU: stock FP8 against Spense.

    Args:
        pruned: the others stay dense.
        cache: measured times; those of other GPUs are ignored.
    """
    kv_bytes = model.kv_bytes(batch * context, kv_cache_dtype)
    shared = (
        kv_bytes / (gpu.bytes_per_s * KV_CACHE) * 1e6
        # In BF16: twice the bytes, half the peak.
        + region_us(model.vocab_size * model.hidden_size, batch, gpu, LM_HEAD, weight_bytes=2, flops=2)
    )
    # Without a pruned layer, nothing is Spense's.
    ours = _SPENSE if pruned.mlps or pruned.experts else _STOCK
    dense = _beside_mlps_us(model, batch, gpu, _STOCK) + _dense_us(model, batch, gpu)
    spense, calibrated = _beside_mlps_us(model, batch, gpu, ours) + _dense_us(model, batch, gpu), False
    for regions, count in Counter(pruned.mlps).items():
        spense -= count * _stock_us(model.mlp_shapes(regions.intermediate), batch, gpu, STOCK)
        for gemm in gemms(model, regions):
            scale = calibration(cache, gpu, gemm, batch)
            calibrated |= scale is not None
            spense += count * gemm.us(batch, gpu) * (scale or 1)
    for regions, count in Counter(pruned.experts).items():
        assert model.mixture
        spense += count * (
            experts_us(model, model.mixture, regions, batch, gpu) - experts_us(model, model.mixture, None, batch, gpu)
        )
    return Estimate(
        (shared + dense) / 1e3,
        (shared + spense) / 1e3,
        model.weight_bytes(),
        model.weight_bytes(pruned),
        kv_bytes,
        calibrated,
    )


def gemms(model: Model, regions: Regions) -> tuple[Gemm, Gemm]:
    """gate_up and down of a pruned MLP."""
    (gate_up, hidden), (_, intermediate) = model.mlp_shapes(regions.intermediate)
    return (
        Gemm(gate_up, hidden, "output", 2 * regions.sparse, 2 * regions.dense),
        Gemm(hidden, intermediate, "input", regions.sparse, regions.dense),
    )


def experts_us(model: Model, mixture: Mixture, regions: Regions | None, tokens: int, gpu: Gpu) -> float:
    """Both GEMMs of a layer's routed experts, each of them as likely: weights of those that have tokens are read.

    Args:
        regions: None for stock.
    """
    active = mixture.active(tokens)
    each = tokens * mixture.top_k / active
    weights = active * sum(n * k for n, k in model.mlp_shapes(mixture.intermediate))
    if regions is None:
        return region_us(weights, each, gpu, STOCK_EXPERTS)
    share = regions.dense / regions.intermediate
    dense = region_us(weights * share, each, gpu, DENSE_EXPERTS)
    return dense + region_us(weights * (1 - share), each, gpu, SPARSE_EXPERTS, weight_bytes=0.625, flops=0.5)


def _dense_us(model: Model, batch: int, gpu: Gpu) -> float:
    """All MLPs and experts in stock."""
    us = sum(
        count * _stock_us(model.mlp_shapes(intermediate), batch, gpu, STOCK)
        for intermediate, count in Counter(model.mlps).items()
    )
    mixture = model.mixture
    return us + (mixture.layers * experts_us(model, mixture, None, batch, gpu) if mixture else 0)


def _beside_mlps_us(model: Model, batch: int, gpu: Gpu, engine: _Engine) -> float:
    """Attention's GEMMs, and what a layer takes outside of all."""
    mixture = model.mixture
    layers = model.num_hidden_layers - (mixture.layers if mixture else 0)
    us = model.num_hidden_layers * _stock_us(model.attention_shapes, batch, gpu, engine.attention)
    layer, token = engine.elementwise
    us += layers * (layer + token * batch * model.intermediate_size / _ELEMENTWISE_INTERMEDIATE)
    if mixture:
        layer, token = engine.around_experts
        us += mixture.layers * (layer + token * batch * mixture.top_k * mixture.intermediate / _AROUND_INTERMEDIATE)
    return us


def _stock_us(shapes: Sequence[tuple[int, int]], batch: int, gpu: Gpu, efficiency: Efficiency) -> float:
    return sum(cutlass_us(n, k, batch, gpu, efficiency) for n, k in shapes)


def calibration(cache: Sequence[Timed], gpu: Gpu, gemm: Gemm, tokens: int) -> float | None:
    """Measured over estimated time: of the GEMM itself, else the median of others that split the same way.

    None where the cache holds nothing for this GPU and number of tokens.
    """
    # Searches are for powers of two: from 8 on for the one-launch path, from 16 on for the library path.
    bucket = 1 << (tokens - 1).bit_length()
    buckets = {max(bucket, 8), max(bucket, 16)}
    best: dict[tuple[Gemm, int], float] = {}
    for timed in cache:
        if gpu.name in timed.gpu and timed.gemm.split == gemm.split and timed.tokens in buckets:
            key = (timed.gemm, timed.tokens)
            best[key] = min(timed.us, best.get(key, timed.us))
    ratios = {key: us / key[0].us(key[1], gpu) for key, us in best.items()}
    own = [ratio for (other, _), ratio in ratios.items() if other == gemm]
    return min(own) if own else median(ratios.values()) if ratios else None


def read_cache(folder: Path) -> list[Timed]:
    """Every time in a plan cache; where paths were timed against each other, that rather than what their searches kept.

    Files that are about something else, or hold no time, are passed over. Of several versions the latest counts.
    """
    searched: dict[tuple[str, Gemm, int, str], float] = {}
    compared: dict[tuple[str, Gemm, int, str], float] = {}
    for file in sorted(folder.glob("*.json"), key=os.path.getmtime):
        try:
            entry = read_object(file)
            key, us = entry["key"], entry["found"]["us"]
            sparse, dense = (_count(key[name]) for name in ("sparse", "dense"))
            projections, n, k, tokens = (_count(key[name], least=1) for name in ("projections", "n", "k", "tokens"))
            gemm = Gemm(n, k, str(key["split"]), projections * sparse, projections * dense)
            together = isinstance(us, dict)
            for path, time in (us if together else {str(key["path"]): us}).items():
                if 0 < time < math.inf and gemm.sparse + gemm.dense:
                    place = str(key["gpu"]), gemm, tokens, path
                    (compared if together else searched)[place] = float(time)
        except (SpenseError, KeyError, TypeError):
            continue
    return [Timed(*place, us) for place, us in (searched | compared).items()]


def _count(value: object, least: int = 0) -> int:
    """Raises TypeError where a file holds something else than a count."""
    if type(value) is not int or not least <= value < _MOST:
        raise TypeError(value)
    return value


def load(model: str, sparsity: float | None) -> tuple[Model, Pruned]:
    """Sizes and regions of a published shape by its name, of a folder with a config.json, or of a model of the hub.

    Args:
        sparsity: of the MLPs; None for that of a Spense checkpoint, or 37.5%.

    Raises:
        SpenseError: there is no such model, its configuration lacks a size, or the sparsity is impossible: where MLPs
            are not cut into multiples of 32, `spense prune` refuses them too.
    """
    published = {**SHAPES, **MIXTURES}
    if model in published:
        config, annotated = published[model], None
    else:
        folder = _folder(model)
        config = read_object(folder / "config.json")
        annotated = read_annotated(folder, config)
    sizes = Model.from_config(config, model)
    if annotated and sparsity is None:
        return sizes, _annotated(sizes, annotated)
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not 0 <= sparsity <= 0.5:
        raise SpenseError(f"--sparsity: found {sparsity}, expected 0 to 0.5")

    def regions(intermediate: int) -> Regions:
        if intermediate % MIN_ALIGNMENT:
            raise SpenseError(
                f"{model}: found intermediate size {intermediate}, expected a multiple of {MIN_ALIGNMENT}; "
                "`spense prune` cannot prune such MLPs"
            )
        dense = round((1 - 2 * sparsity) * intermediate / MIN_ALIGNMENT) * MIN_ALIGNMENT
        return Regions(intermediate - dense, dense)

    mixture = sizes.mixture
    experts = [regions(mixture.intermediate)] * mixture.layers if mixture else []
    return sizes, Pruned([regions(intermediate) for intermediate in sizes.mlps], experts)


def _folder(model: str) -> Path:
    """Where the configuration of a folder's or the hub's model lies.

    Raises:
        SpenseError: neither a folder nor a model that the hub, or its local cache, has.
    """
    if Path(model).is_dir():
        return Path(model)
    missing = f"{model}: no such folder with a config.json, nor one of {', '.join([*SHAPES, *MIXTURES])}"
    if not hub.is_hub_name(model):
        raise SpenseError(f"{missing}, nor a hub name such as {hub.EXAMPLE}")
    return hub.snapshot(model, f"{missing};", allow_patterns=["config.json", SIDECAR])


def _annotated(model: Model, annotated: Annotated) -> Pruned:
    """
    Raises:
        FormatError: the annotation does not fit the model's sizes.
    """
    annotation, mixture = annotated.annotation, model.mixture
    most = {"modules": len(model.mlps), "experts": mixture.layers if mixture else 0}
    for key, found in (("modules", annotation.modules), ("experts", annotation.experts)):
        if len(found) > most[key]:
            raise FormatError(
                "more pruned modules than layers",
                file=annotated.file,
                key=key,
                found=len(found),
                expected=f"at most {most[key]}",
            )
    intermediates = {*model.mlps}
    for module in annotation.modules:
        if annotation.regions(module).intermediate not in intermediates:
            require_extent(
                annotation.regions(module), model.intermediate_size, module, "as intermediate_size", annotated.file
            )
    for name in annotation.experts:
        # Without a mixture there is none: see above.
        intermediate = mixture.intermediate if mixture else 0
        require_extent(
            annotation.regions(name), intermediate, name, "as each expert's intermediate size", annotated.file
        )
    return Pruned(*([annotation.regions(name) for name in names] for names in (annotation.modules, annotation.experts)))
