"""What sparsity is worth before anything is pruned: the time of an output token and the bytes, from a roofline.

A decode step reads every weight once and every token of the KV cache once. A region of a GEMM takes about the longer of

    bytes / (memory bandwidth · efficiency)    and    FLOPs / (tensor core peak · efficiency),

with efficiencies as measured on an H100 (docs/performance.md says how far off that is). Where the plan cache of a
machine knows how long its GEMMs take, its times replace this.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vllm_spense.checkpoint_files import read_object
from vllm_spense.conformance import read_annotated, require_extent
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import MIN_ALIGNMENT, Regions
from vllm_spense.shapes import SHAPES


@dataclass(frozen=True)
class Gpu:
    """By its data sheet.

    Attributes:
        name: as part of what the driver calls it.
        memory_bytes: capacity.
        bytes_per_s: memory bandwidth.
        fp8_flops: of dense FP8 tensor cores; 2:4 doubles it, BF16 halves it.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    fp8_flops: float


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu("H100", 80e9, 3.35e12, 1979e12),
    "h200": Gpu("H200", 141e9, 4.8e12, 1979e12),
    "b200": Gpu("B200", 180e9, 8e12, 4500e12),
}


@dataclass(frozen=True)
class Efficiency:
    """Share of the data sheet's figures that kernels reach."""

    memory: float
    tensor_cores: float


#: Of FP8 GEMMs in MLPs and, smaller, in attention: stock's and Spense's; of the last layer in BF16; and of reading the
#: KV cache.
STOCK = Efficiency(0.81, 0.68)
STOCK_ATTENTION = Efficiency(0.6, 0.68)
DENSE_REGION = Efficiency(0.79, 0.66)
SPARSE_REGION = Efficiency(0.77, 0.46)
SPENSE_ATTENTION = Efficiency(0.74, 0.42)
LM_HEAD = Efficiency(0.83, 0.68)
KV_CACHE = 0.74
#: Near the knee of the roofline both limits add to the time: its sum is that of powers with this exponent.
_KNEE = 4
#: Time of a layer outside its GEMMs and beyond reading the KV cache, in stock and in Spense, whose GEMMs load weights
#: meanwhile: launches, and for each token what norms, activation functions and quantization take at
#: `_ELEMENTWISE_INTERMEDIATE`.
_STOCK_ELEMENTWISE, _SPENSE_ELEMENTWISE, _ELEMENTWISE_INTERMEDIATE = (33.0, 0.44), (22.5, 0.5), 25600

DEFAULT_SPARSITY = 0.375
KV_BYTES = {"auto": 2, "fp8": 1}
_NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_MAY_BE_MISSING = ("num_key_value_heads", "head_dim")
#: No model has more of anything; products of sizes stay finite.
_MOST = 2**31


@dataclass(frozen=True)
class Model:
    """The sizes that matter, as config.json spells them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], file: object = None) -> Model:
        """
        Raises:
            SpenseError: a size is missing or is no such number, or the MLPs are experts.
        """
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if config.get(key):
                raise SpenseError(f"{file}: the estimate does not know experts (key: {key}; found: {config[key]})")
        for key in (*_NUMBERS, *_MAY_BE_MISSING):
            found = config.get(key)
            optional = found is None and key in _MAY_BE_MISSING
            if optional or (type(found) is int and 0 < found < _MOST):
                continue
            raise SpenseError(
                f"{file}: a size is missing or wrong (key: {key}; found: {str(found)[:60]}; expected: a number above 0)"
            )
        numbers = {key: config[key] for key in _NUMBERS}
        heads = numbers["num_attention_heads"]
        return cls(
            **numbers,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or max(1, numbers["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def attention_shapes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of qkv and o."""
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return (heads + 2 * kv, self.hidden_size), (self.hidden_size, heads)

    @property
    def mlp_shapes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of gate_up and down."""
        return (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)

    def weight_bytes(self, layers: Sequence[Regions] = ()) -> int:
        """Of all weights: FP8 linear layers with a float32 scale for each output, BF16 embeddings and lm_head.

        Args:
            layers: regions of the pruned MLPs.
        """
        linear = sum(n * k + 4 * n for n, k in (*self.attention_shapes, *self.mlp_shapes))
        saved = sum(3 * self.hidden_size * regions.sparse * 3 // 8 for regions in layers)
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size * 2
        return self.num_hidden_layers * linear - saved + embeddings

    def kv_bytes(self, tokens: int, kv_cache_dtype: str) -> int:
        """Of the KV cache of that many tokens."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * KV_BYTES[kv_cache_dtype] * tokens


@dataclass(frozen=True)
class Gemm:
    """A GEMM (N, K) of two regions, as the plan cache spells it."""

    n: int
    k: int
    split: str
    sparse: int
    dense: int

    def us(self, tokens: int, gpu: Gpu) -> float:
        """Time for M = `tokens`, by the roofline."""
        share = self.dense / (self.sparse + self.dense)
        dense = region_us(self.n * self.k * share, tokens, gpu, DENSE_REGION)
        return dense + region_us(
            self.n * self.k * (1 - share), tokens, gpu, SPARSE_REGION, weight_bytes=0.625, flops=0.5
        )


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


def estimate(
    model: Model,
    layers: Sequence[Regions],
    gpu: Gpu,
    batch: int,
    context: int,
    kv_cache_dtype: str = "auto",
    cache: Sequence[Timed] = (),
) -> Estimate:
    """One decode step of `batch` requests with `context` tokens each on one GPU: stock FP8 against Spense.

    Args:
        layers: regions of the pruned MLPs; the others stay dense.
        cache: measured times; those of other GPUs are ignored.
    """

    def stock_us(shapes: Sequence[tuple[int, int]], efficiency: Efficiency) -> float:
        return sum(region_us(n * k, batch, gpu, efficiency) for n, k in shapes)

    def beside_mlp_us(efficiency: Efficiency, elementwise: tuple[float, float]) -> float:
        layer, token = elementwise
        elementwise_us = layer + token * batch * model.intermediate_size / _ELEMENTWISE_INTERMEDIATE
        return model.num_hidden_layers * (stock_us(model.attention_shapes, efficiency) + elementwise_us)

    kv_bytes = model.kv_bytes(batch * context, kv_cache_dtype)
    shared = (
        kv_bytes / (gpu.bytes_per_s * KV_CACHE) * 1e6
        # In BF16: twice the bytes, half the peak.
        + region_us(model.vocab_size * model.hidden_size, batch, gpu, LM_HEAD, weight_bytes=2, flops=2)
    )
    dense = stock_us(model.mlp_shapes, STOCK)
    # Without a pruned layer, nothing is Spense's.
    stock_beside = beside_mlp_us(STOCK_ATTENTION, _STOCK_ELEMENTWISE)
    spense = beside_mlp_us(SPENSE_ATTENTION, _SPENSE_ELEMENTWISE) if layers else stock_beside
    calibrated = False
    spense += (model.num_hidden_layers - len(layers)) * dense
    for regions, count in Counter(layers).items():
        (gate_up, hidden), (_, intermediate) = model.mlp_shapes
        for gemm in (
            Gemm(gate_up, hidden, "output", 2 * regions.sparse, 2 * regions.dense),
            Gemm(hidden, intermediate, "input", regions.sparse, regions.dense),
        ):
            scale = calibration(cache, gpu, gemm, batch)
            calibrated |= scale is not None
            spense += count * gemm.us(batch, gpu) * (scale or 1)
    return Estimate(
        (shared + (stock_beside + model.num_hidden_layers * dense)) / 1e3,
        (shared + spense) / 1e3,
        model.weight_bytes(),
        model.weight_bytes(layers),
        kv_bytes,
        calibrated,
    )


def region_us(
    weights: float, tokens: int, gpu: Gpu, efficiency: Efficiency, weight_bytes: float = 1, flops: float = 1
) -> float:
    """Time of one region of a GEMM.

    Args:
        weights: how many, N · K.
        weight_bytes: of each; 0.625 where they are 2:4.
        flops: relative to dense FP8; 0.5 where weights are 2:4.
    """
    memory = weights * weight_bytes / (gpu.bytes_per_s * efficiency.memory)
    tensor_cores = 2 * tokens * weights * flops / (gpu.fp8_flops * efficiency.tensor_cores)
    return (memory**_KNEE + tensor_cores**_KNEE) ** (1 / _KNEE) * 1e6


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


def load(model: str, sparsity: float | None) -> tuple[Model, list[Regions]]:
    """Sizes and regions of a published shape by its name, or of a folder with a config.json.

    Args:
        sparsity: of the MLPs; None for that of a Spense checkpoint, or 37.5%.

    Raises:
        SpenseError: there is no such model, its configuration lacks a size, or the sparsity is impossible.
    """
    folder = Path(model)
    if model in SHAPES:
        config, annotated = SHAPES[model], None
    elif folder.is_dir():
        config = read_object(folder / "config.json")
        annotated = read_annotated(folder, config)
    else:
        raise SpenseError(f"{model}: no such folder with a config.json, nor one of {', '.join(SHAPES)}")
    sizes = Model.from_config(config, model)
    if annotated and sparsity is None:
        annotation = annotated.annotation
        for module in annotation.modules:
            require_extent(
                annotation.regions(module), sizes.intermediate_size, module, "as intermediate_size", annotated.file
            )
        if len(annotation.modules) > sizes.num_hidden_layers:
            raise FormatError(
                "more pruned modules than layers",
                file=annotated.file,
                key="modules",
                found=len(annotation.modules),
                expected=f"at most {sizes.num_hidden_layers}",
            )
        return sizes, [annotation.regions(module) for module in annotation.modules]
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not 0 <= sparsity <= 0.5:
        raise SpenseError(f"--sparsity: found {sparsity}, expected 0 to 0.5")
    dense = round((1 - 2 * sparsity) * sizes.intermediate_size / MIN_ALIGNMENT) * MIN_ALIGNMENT
    return sizes, [Regions(sizes.intermediate_size - dense, dense)] * sizes.num_hidden_layers
