"""A random EAGLE-3 head for a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def eagle3_head(target: Path, out: Path) -> Path:
    """One decoder layer that reads three of the target's layers, as published heads are stored."""
    config = json.loads((target / "config.json").read_text())
    size, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = size // config["num_attention_heads"] * config["num_key_value_heads"]
    random = torch.Generator().manual_seed(0)
    shapes = {
        "fc.weight": (size, 3 * size),
        "midlayer.self_attn.q_proj.weight": (size, 2 * size),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * size),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, size),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "lm_head.weight": (vocabulary, size),
    }
    tensors = {name: torch.randn(shape, generator=random) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    norms = ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm")
    tensors |= {f"{name}.weight": torch.ones(size) for name in norms}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    kept = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    changes = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": vocabulary}
    (out / "config.json").write_text(json.dumps(kept | changes | {"eagle_config": layers, "dtype": "float32"}))
    return out
