"""Which parts of a decoder block one kernel each can stand for, found by trying them, and running the block so."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from offline_prune.model.block_forward import calling
from offline_prune.model.experts import Mlp
from offline_prune.model.gated_mlp import GatedMlp, Unsupported

#: How far a kernel's output may be from the part's, relative to its norm for one token. BF16 rounds by up to 2⁻⁹.
TOLERANCE = 2**-7
#: What transformers' attention calls the function, in the file of the model.
_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Elementwise:
    """What kernels stand for.

    Attributes:
        norms: RMS norms by path in the block, with their ε.
        mlp: the gated MLP with SiLU, or None.
        rotary: the Python module whose attention calls a rotary embedding by `_ROTARY`, or None.
    """

    norms: dict[str, float]
    mlp: GatedMlp | None
    rotary: ModuleType | None

    @contextmanager
    def replaced(self, block: nn.Module) -> Iterator[None]:
        """Inside, the block runs with the kernels. They have no gradients."""
        with ExitStack() as stack:
            for path, eps in self.norms.items():
                norm = block.get_submodule(path)
                stack.enter_context(calling(norm, _normalizing(norm, eps)))
            if self.mlp:
                stack.enter_context(calling(block.get_submodule(self.mlp.path), _gated(block, self.mlp)))
            if self.rotary:
                stack.enter_context(_rotating(self.rotary))
            yield


@torch.inference_mode()
def find_elementwise(block: nn.Module, mlp: Mlp | Unsupported) -> Elementwise:
    """Tries out what of a block, its weights in place, the kernels can stand for; the rest runs as it is."""
    norms: dict[str, float] = {}
    for path, module in block.named_modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weights = dict(module.named_parameters())
        if not isinstance(eps, float) or [*weights] != ["weight"] or not _takes_one(module):
            continue
        x = _probe(16, 4, weights["weight"].shape[-1], like=weights["weight"])
        if _alike(module(x), _normalizing(module, eps)(x)):
            norms[path] = eps
    return Elementwise(norms, _silu_gated(block, mlp), _rotary_home(block))


def _normalizing(norm: nn.Module, eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
    from offline_prune.model.fused_ops_triton import rms_norm

    return lambda x: rms_norm(x, norm.weight, eps)  # type: ignore[arg-type]


def _silu_gated(block: nn.Module, mlp: Mlp | Unsupported) -> GatedMlp | None:
    """The MLP if it computes down(silu(gate(x)) ⊙ up(x)) with three linear layers."""
    if not isinstance(mlp, GatedMlp) or mlp.projections.gate == mlp.projections.up:
        return None
    module = block.get_submodule(mlp.path)
    if not _takes_one(module):
        return None
    x = _probe(16, 4, mlp.hidden, like=mlp.down(block).weight)
    return mlp if _alike(module(x), _gated(block, mlp)(x)) else None


def _gated(block: nn.Module, mlp: GatedMlp) -> Callable[[torch.Tensor], torch.Tensor]:
    from offline_prune.model.fused_ops_triton import silu_mul

    gate, up = mlp.gate_up(block)
    down = mlp.down(block)
    return lambda x: down(silu_mul(gate(x), up(x)))


def _rotary_home(block: nn.Module) -> ModuleType | None:
    """The Python module of the block's code if its rotary embedding is the one that `rotate` computes."""
    from offline_prune.model.fused_ops_triton import rotate

    home = sys.modules[type(block).__module__]
    if not hasattr(home, _ROTARY):
        return None
    function = getattr(home, _ROTARY)
    parameters = inspect.signature(function).parameters.values()
    if [parameter.name for parameter in parameters if parameter.default is parameter.empty] != ["q", "k", "cos", "sin"]:
        return None
    like = next(block.parameters())
    q, k = (_probe(2, heads, 16, 128, like=like) for heads in (16, 8))
    angles = torch.arange(16.0 * 128, device=like.device).view(1, 16, 128)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    expected = function(q, k, cos, sin)
    same = all(_alike(a, rotate(b, cos, sin)) for a, b in zip(expected, (q, k), strict=True))
    return home if same else None


@contextmanager
def _rotating(home: ModuleType) -> Iterator[None]:
    """Inside, the module's attention rotates with the kernel whatever the kernel can rotate."""
    from offline_prune.model.fused_ops_triton import rotate

    original = getattr(home, _ROTARY)

    def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **more: Any) -> Any:
        width = q.shape[-1]
        plain = not rest and not more and q.ndim == 4 and cos.ndim == 3 and q.dtype == cos.dtype
        if not plain or cos.shape[1:] != q.shape[2:] or width & (width - 1) or q.stride(-1) != 1 or k.stride(-1) != 1:
            return original(q, k, cos, sin, *rest, **more)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    setattr(home, _ROTARY, rotated)
    try:
        yield
    finally:
        setattr(home, _ROTARY, original)


def _takes_one(module: nn.Module) -> bool:
    """Whether the module cannot be called with anything but its input."""
    return len(inspect.signature(module.forward).parameters) == 1


def _probe(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Random values whose size goes from 10⁻³ to 10³ along the first dimension, so that clamps and ε show.

    Their mean is not zero, so that it shows where it is subtracted.
    """
    values = 1 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (values * sizes).to(like.device, like.dtype)


def _alike(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether both are the same within `TOLERANCE`, token by token."""
    error = (found.float() - expected.float()).norm(dim=-1)
    return bool((error <= TOLERANCE * expected.float().norm(dim=-1)).all())
