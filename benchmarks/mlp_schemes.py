"""One MLP and the norms around it, run three ways: stock FP8, Spense's regions, and SlideSparse's expanded 6:8.

What surrounds the GEMMs is ordinary torch, for Inductor to fuse, as vLLM compiles it; in Spense it is the plugin's own
ops: add · norm · quantize → gate_up → SiLU · mul · quantize → down → add · norm · quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vllm_spense.format import GROUP, KEPT, Regions
from vllm_spense.kernels.region_gemm.problem import Problem
from vllm_spense.kernels.region_gemm.reference import quantize
from vllm_spense.kernels.tuning.synthetic import random_fp8, random_weight
from vllm_spense.ops import elementwise_ops, gemm, path_kernels
from vllm_spense.ops.dispatch import Path
from vllm_spense.ops.layer_plan import pack, plan_of
from vllm_spense.plugin.loaders import dummy_scale

FP8 = torch.float8_e4m3fn
_EPSILON = 1e-6
#: Of SlideSparse: 6 of 8 are kept, and three windows of 4 columns, 2 apart, hold them.
SLIDE_GROUP, SLIDE_STEP = 8, 2
SLIDE_EXPANSION = 1.5

Part = Literal["gate_up", "down"]
#: By part, one copy of both weights as the scheme's GEMMs read them.
Weights = Mapping[Part, Any]


@dataclass(frozen=True)
class Sizes:
    hidden: int
    intermediate: int

    def shape(self, part: Part) -> tuple[int, int]:
        """(N, K) of the weight."""
        return (2 * self.intermediate, self.hidden) if part == "gate_up" else (self.hidden, self.intermediate)


class Stock:
    """Dense FP8 through vLLM's CUTLASS kernel, which applies the scales. The other schemes override what differs."""

    name = "stock"
    #: Inductor's, for the elementwise kernels.
    options: Mapping[str, int] = {}

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        self.device = device
        self.norm = torch.ones(sizes.hidden, dtype=torch.bfloat16, device=device)
        self.scales: dict[Part, torch.Tensor] = {}
        for part in ("gate_up", "down"):
            n, k = sizes.shape(part)
            self.scales[part] = torch.full((n, 1), dummy_scale(k), device=device)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights."""
        return 0.0

    @property
    def weight_bytes(self) -> int:
        """Of both weights."""
        return sum(n * k for n, k in map(self.sizes.shape, ("gate_up", "down")))

    def padded(self, tokens: int) -> int:
        """Rows that the scheme's quantization writes."""
        return tokens

    def weights(self) -> Weights:
        """A new random copy."""
        return {part: random_fp8(*self.sizes.shape(part), self.device) for part in ("gate_up", "down")}

    def gemm(self, part: Part, x: torch.Tensor, x_scale: torch.Tensor, weights: Weights) -> torch.Tensor:
        """(M, K) FP8 and its scales (M, 1) → (M, N) as the scheme's kernel leaves it."""
        from vllm._custom_ops import cutlass_scaled_mm

        return cutlass_scaled_mm(x, weights[part].t(), x_scale, self.scales[part], torch.bfloat16)

    def scaled(self, part: Part, y: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
        """What `gemm` left → outputs in bfloat16."""
        return y

    def gate_and_up(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return y.chunk(2, -1)

    def lift(self, x: torch.Tensor) -> torch.Tensor:
        """Activations (M, K) as the scheme's GEMM expects their columns, before they are quantized."""
        return x

    def enter(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(M, hidden) twice → FP8 input of gate_up, its scales, residual."""
        residual = x + residual
        return *quantize(self.lift(rms_norm(residual, self.norm))), residual

    def between(self, y: torch.Tensor, x_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What gate_up's GEMM left → FP8 input of down, its scales."""
        gate, up = self.gate_and_up(self.scaled("gate_up", y, x_scale))
        return quantize(self.lift(F.silu(gate) * up))

    def leave(
        self, y: torch.Tensor, x_scale: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What down's GEMM left → FP8 input of the next layer, its scales."""
        return quantize(rms_norm(self.scaled("down", y, x_scale) + residual, self.norm))

    @cached_property
    def compiled(self) -> tuple[Any, Any, Any]:
        return tuple(compiled(function, self.options) for function in (self.enter, self.between, self.leave))

    def run(self, x: torch.Tensor, residual: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole MLP with compiled elementwise kernels.

        Args:
            x, residual: (M, hidden) bfloat16.

        Returns:
            (M, hidden) FP8 and its scales, float32 (M, 1).
        """
        enter, between, _ = self.compiled
        quantized, scale, residual = enter(x, residual)
        y = self.gemm("gate_up", quantized, scale, weights)
        return self.down_and_leave(*between(y, scale), residual, weights)

    def down_and_leave(
        self, x: torch.Tensor, x_scale: torch.Tensor, residual: torch.Tensor, weights: Weights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input of down's GEMM and its scales → as `leave`."""
        _, _, leave = self.compiled
        return leave(self.gemm("down", x, x_scale, weights), x_scale, residual)

    def run_gemms(self, inputs: Mapping[Part, torch.Tensor], scale: torch.Tensor, weights: Weights) -> None:
        """Both GEMMs and nothing else, on the inputs that `gemm_inputs` made."""
        for part, x in inputs.items():
            self.gemm(part, x, scale, weights)

    def gemm_inputs(self, tokens: int) -> Mapping[Part, torch.Tensor]:
        """Random FP8 activations (M, K) of both GEMMs."""
        return {part: random_fp8(tokens, self.columns(part), self.device) for part in ("gate_up", "down")}

    def columns(self, part: Part) -> int:
        """K of the scheme's GEMM."""
        return self.sizes.shape(part)[1]


class Spense(Stock):
    """A 2:4 and a dense region, through the plugin's own ops."""

    name = "spense"
    options = elementwise_ops.INDUCTOR_OPTIONS

    def __init__(self, sizes: Sizes, device: torch.device, regions: Regions) -> None:
        super().__init__(sizes, device)
        self.regions = regions
        self.problems: dict[Part, Problem] = {
            "gate_up": Problem(*sizes.shape("gate_up"), regions, "output", projections=2),
            "down": Problem(*sizes.shape("down"), regions, "input"),
        }
        #: Whether kernels of our own stand around the GEMMs.
        self.fuses = elementwise_ops.fuses_activation(self.problems["gate_up"], device) and elementwise_ops.fuses_norm(
            sizes.hidden, torch.bfloat16, device
        )
        if self.fuses:
            self.problems["gate_up"] = self.problems["gate_up"].region_major()
            self.problems["down"] = replace(self.problems["down"], separate_outputs=True)

    @property
    def sparsity(self) -> float:
        return self.regions.mlp_sparsity

    @property
    def weight_bytes(self) -> int:
        return sum(problem.weight_bytes for problem in self.problems.values())

    def prepare(self, tokens: int) -> None:
        """Searches for kernels, as the plugin does while a model loads."""
        for problem in self.problems.values():
            plan_of(problem.op_key, self.device).prepare(tokens)

    def weights(self) -> Weights:
        return {part: pack(random_weight(problem, self.device), problem) for part, problem in self.problems.items()}

    def gemm(self, part: Part, x: torch.Tensor, x_scale: torch.Tensor, weights: Weights) -> torch.Tensor:
        return gemm.region_gemm(x, *gemm.op_arguments(weights[part], self.problems[part]))

    def enter(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.fuses:
            return elementwise_ops.add_norm_quant(x, residual, self.norm, _EPSILON)
        return super().enter(x, residual)

    def between(self, y: torch.Tensor, x_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fuses:
            return elementwise_ops.silu_mul_quant(y, x_scale, self.scales["gate_up"], self.regions.sparse)
        return super().between(y, x_scale)

    def down_and_leave(
        self, x: torch.Tensor, x_scale: torch.Tensor, residual: torch.Tensor, weights: Weights
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.fuses:
            return super().down_and_leave(x, x_scale, residual, weights)
        scales = x_scale, self.scales["down"]
        quantized, scale, _ = elementwise_ops.gemm_add_norm_quant(
            x, *gemm.op_arguments(weights["down"], self.problems["down"]), scales, residual, self.norm, _EPSILON
        )
        return quantized, scale

    def run_gemms(self, inputs: Mapping[Part, torch.Tensor], scale: torch.Tensor, weights: Weights) -> None:
        # As they run before a norm that adds up separate outputs.
        for part, x in inputs.items():
            tensors, key = gemm.op_arguments(weights[part], self.problems[part])
            plan_of(key, x.device).run(x, tensors)

    def scaled(self, part: Part, y: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
        return (y * x_scale * self.scales[part].t()).to(torch.bfloat16)


class SlideSparse(Spense):
    """SlideSparse's scheme (arXiv 2603.05232) at 6:8: three 2:4 windows hold a group of 8 weights, activations are
    expanded 1.5 times to meet them, and cuSPARSELt multiplies.

    Expanding is fused with quantizing, as its authors do; scales are fused with what follows, which they are not there.
    """

    name = "slidesparse 6:8"

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        super().__init__(sizes, device, Regions(sizes.intermediate, 0))
        for part, split in (("gate_up", "output"), ("down", "input")):
            n, k = sizes.shape(part)
            expanded = int(k * SLIDE_EXPANSION)
            self.problems[part] = Problem(n, expanded, Regions(n if split == "output" else expanded, 0), split)
        # Its expansion is the compiler's to fuse.
        self.fuses = False

    run_gemms = Stock.run_gemms

    @property
    def sparsity(self) -> float:
        return 1 - 6 / SLIDE_GROUP

    def padded(self, tokens: int) -> int:
        if self.device.type != "cuda":
            return tokens
        from vllm_spense.kernels.region_gemm.library import padded

        return padded(tokens)

    def prepare(self, tokens: int) -> None:
        """Nothing: `gemm` searches."""

    def weights(self) -> Weights:
        return {
            part: self.pack(part, expand_weight(random_6of8(*self.sizes.shape(part), self.device)))
            for part in self.problems
        }

    def pack(self, part: Part, expanded: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return self._kernel.pack(expanded, self.problems[part])

    @cached_property
    def _kernel(self) -> path_kernels.Kernel:
        # Its own choice of library, whatever the policy makes of these shapes.
        return path_kernels.kernel(Path.LIBRARY if self.device.type == "cuda" else Path.REFERENCE)

    def gemm(self, part: Part, x: torch.Tensor, x_scale: torch.Tensor, weights: Weights) -> torch.Tensor:
        return self._kernel.run(x, weights[part], self.problems[part])

    def lift(self, x: torch.Tensor) -> torch.Tensor:
        # Before quantizing, so that the scales' reduction and the rest are one kernel.
        columns = torch.arange(int(x.shape[-1] * SLIDE_EXPANSION), device=x.device)
        windows = SLIDE_GROUP // SLIDE_STEP - 1
        window, column = columns // GROUP, columns % GROUP
        return x[:, window // windows * SLIDE_GROUP + window % windows * SLIDE_STEP + column]

    def columns(self, part: Part) -> int:
        return self.problems[part].k


def compiled(function: Callable[..., Any], options: Mapping[str, int]) -> Callable[..., Any]:
    """One graph for every number of tokens, as in vLLM; the sizes of the layer are constants."""
    graph = torch.compile(function, fullgraph=True, options=dict(options))

    def call(*arguments: torch.Tensor) -> Any:
        for argument in arguments:
            torch._dynamo.maybe_mark_dynamic(argument, 0)
        return graph(*arguments)

    return call


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(M, K) → (M, K) in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(x.dtype) * weight


def random_6of8(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) float8_e4m3fn, two random columns of every group of eight zero."""
    weight = random_fp8(rows, columns, device)
    for rows_of_weight in weight.view(torch.uint8).split(4096):
        groups = rows_of_weight.unflatten(1, (-1, SLIDE_GROUP))
        pruned = torch.rand(groups.shape, device=device).topk(2, dim=-1).indices
        groups.scatter_(-1, pruned, 0)
    return weight


def expand_weight(weight: torch.Tensor) -> torch.Tensor:
    """The same product from 2:4 windows: window w of a group of eight holds columns 2·w … 2·w + 3 of it.

    Each window takes what it can from the left, which suffices for six weights in any place.

    Args:
        weight: (N, K) float8_e4m3fn, 6:8 along K.

    Returns:
        (N, 1.5·K) float8_e4m3fn, 2:4 along its columns.
    """
    expanded = []
    for rows in weight.view(torch.uint8).split(4096):
        left = rows.unflatten(1, (-1, SLIDE_GROUP)).clone()
        windows = []
        for start in range(0, SLIDE_GROUP - GROUP + 1, SLIDE_STEP):
            window = left[..., start : start + GROUP]
            taken = (window != 0) & ((window != 0).cumsum(-1) <= KEPT)
            windows.append(window * taken)
            window.masked_fill_(taken, 0)
        assert not left.any(), "a group of eight holds more than six weights"
        expanded.append(torch.stack(windows, -2).flatten(1))
    return torch.cat(expanded).view(FP8)
