"""Shapes of published models: what measuring and estimating need to know of a model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Alike in all of them.
_COMMON = {
    "hidden_act": "silu",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_size": 5120,
}

#: Name → config.json of the unquantized model, as its authors published it.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-32b": _COMMON | _QWEN3 | {"intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
    "qwen3-14b": _COMMON | _QWEN3 | {"intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "seed-oss-36b": _COMMON
    | {
        "architectures": ["SeedOssForCausalLM"],
        "model_type": "seed_oss",
        "vocab_size": 155136,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000000.0,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
    },
    "llama-3.1-8b": _COMMON
    | _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.3-70b": _COMMON
    | _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    # Published by nobody: small enough to try a measurement on a CPU.
    "tiny": _COMMON
    | _LLAMA
    | {
        "vocab_size": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
