"""Elementwise parts of decoder blocks as transformers computes them, beside the kernels; for a CPU and a GPU alike."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from offline_prune.model.block_forward import find_split, forward
from offline_prune.model.fused_ops import find_elementwise
from offline_prune.model.fused_ops_triton import rms_norm, rotate, silu_mul
from offline_prune.model.gated_mlp import Unsupported
from offline_prune.model.loading import SourceModel

_NORMS = ["input_layernorm", "post_attention_layernorm"]
#: What is found in each family: norms, whether the MLP, whether the rotary embedding. Gemma multiplies by 1 + weight
#: and has GELU; Phi-3 keeps gate and up in one layer.
FAMILIES = {
    "llama": (_NORMS, True, True),
    "llama with biases": (_NORMS, True, True),
    "qwen3": (["self_attn.q_norm", "self_attn.k_norm", *_NORMS], True, True),
    "seed-oss": (_NORMS, True, True),
    "granite": (_NORMS, True, True),
    "phi3": (_NORMS, False, True),
    "gemma2": ([], False, True),
}


def compare(device: torch.device, dtype: torch.dtype) -> None:
    """Checks each kernel's values, at sizes that fill its tiles and at others.

    They are the same to the bit, but for some that another exponential or order of sums makes round the other way. A
    rounding in another place would change tens of percent.
    """
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(device, dtype)

    def same(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert int((found != expected).sum()) <= max(1, expected.numel() // 500)

    for height, width in ((3, 5120), (70, 128), (5, 80)):
        norm = LlamaRMSNorm(width, 1e-6).to(device, dtype)
        norm.weight.data = normal(width)
        x = normal(height, width)
        same(rms_norm(x, norm.weight.data, 1e-6), norm(x).detach())
    for size in ((2, 4096), (7, 1000)):
        gate, up = 3 * normal(*size), normal(*size)
        same(silu_mul(gate, up), torch.nn.functional.silu(gate) * up)
    for heads, kv_heads, width, sequences in ((20, 4, 128, 1), (5, 16, 32, 2)):
        q, k = (normal(2, 9, count, width).transpose(1, 2) for count in (heads, kv_heads))
        angles = 6 * torch.rand(sequences, 9, width, device=device)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            same(rotate(x, cos, sin), expected)


class _Gated(LlamaRMSNorm):
    """A norm that may be given more than its input, as linear attention's are."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normalized = super().forward(hidden_states)
        return normalized if gate is None else normalized * torch.nn.functional.silu(gate)


def look_alikes(device: torch.device, dtype: torch.dtype) -> None:
    """Checks that of several norms only the one that the kernel computes is found."""
    block = torch.nn.Module()
    block.plain, block.gated = LlamaRMSNorm(4096), _Gated(4096)
    block.centered = torch.nn.LayerNorm(4096, bias=False)
    block.to(device, dtype)
    assert [*find_elementwise(block, Unsupported("")).norms] == ["plain"]


def find_and_run(family: str, folder: Path, device: torch.device, dtype: torch.dtype) -> float:
    """Checks what is found in a tiny model's block, and how it runs.

    Returns:
        How far the block's output is from what it is without kernels, relative to its norm.
    """
    model = SourceModel(str(tiny_model(family, folder)))
    name, mlp = model.blocks[1].name, model.blocks[1].mlp
    block = model.load(name, device, dtype)
    found = find_elementwise(block, mlp)
    assert (sorted(found.norms), found.mlp is not None, found.rotary is not None) == (
        sorted(FAMILIES[family][0]),
        *FAMILIES[family][1:],
    )
    hidden = torch.randn(2, 24, 64).to(device, dtype)
    angles = torch.cat([6 * torch.rand(1, 24, 8, device=device)] * 2, -1)
    kwargs = {"position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)), "attention_mask": None}
    plain = forward(block, hidden, kwargs)
    split = find_split(block, mlp, hidden, kwargs)
    with found.replaced(block):
        kernels = forward(block, hidden, kwargs)
        # It is entered after its attention as without the kernels, and leaving that leaves them in place.
        assert split is not None
        assert find_split(block, mlp, hidden, kwargs) == split
        assert torch.equal(forward(block, hidden, kwargs), kernels)
    assert torch.equal(forward(block, hidden, kwargs), plain), "something was left behind"
    return ((kernels.float() - plain.float()).norm() / plain.float().norm()).item()
