"""Whether a decoder layer of vLLM is plainly qkv(norm(x)) and gate_up(norm(x)), in a model of such layers alone.

A norm may hand FP8 to the layer after it, and down its GEMM to the next norm, only where nothing else reads either.
That is decided by the classes whose code runs, whichever model they are in: multimodal ones have language models of
these.
"""

from __future__ import annotations

import weakref

from torch import nn

from vllm_spense.plugin.parents import parent_of, registered

#: The files of vLLM's models whose classes are so, and how the names of these begin. Their decoder layers build, in
#: this order, qkv_proj, gate_up_proj, the norm before qkv_proj and the norm before gate_up_proj, and give each norm's
#: output to that layer alone; their models give a decoder layer's output to the next one's norm or their own.
PLAIN = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "seed_oss": "SeedOss"}
#: The modules of such a decoder layer. Mistral's may have one more, between a norm and the MLP.
MODULES = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
#: By the list that a model's decoder layers are in: whether all are such, and `registered` when they were looked at.
#: Each layer asks about all of them.
_looked_at: weakref.WeakKeyDictionary[nn.Module, tuple[bool, int]] = weakref.WeakKeyDictionary()


def is_in_plain(layer: nn.Module) -> bool:
    """Whether a linear layer is in the attention or the MLP of such a decoder layer. Known once the model is built."""
    layers = parent_of(parent_of(parent_of(layer)))
    if layers is None or not _is(parent_of(layers), "Model"):
        return False
    found, when = _looked_at.get(layers, (False, -1))
    if when != registered():
        # An identity stands for a layer of another process of a pipeline.
        found = all(_is_plain(each) for each in layers.children() if not isinstance(each, nn.Identity))
        _looked_at[layers] = found, registered()
    return found


def _is_plain(decoder_layer: nn.Module) -> bool:
    modules = dict(decoder_layer.named_children())
    return _is(decoder_layer, "DecoderLayer") and modules.keys() == MODULES and _is(modules["self_attn"], "Attention")


def _is(module: nn.Module | None, kind: str) -> bool:
    """Of such a class itself: what derives from it may do more."""
    package, _, file = type(module).__module__.rpartition(".")
    return package == "vllm.model_executor.models" and type(module).__qualname__ == f"{PLAIN.get(file)}{kind}"
