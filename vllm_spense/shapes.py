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
    "qwen2.5-1.5b": _COMMON
    | _QWEN3
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
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

#: The same for mixtures of experts.
MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-30b-a3b": _COMMON
    | _QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        # Of layers without experts, of which there are none.
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "glm-4.5-air": _COMMON
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "bos_token_id": None,
        "eos_token_id": 151329,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": False,
        "hidden_size": 4096,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "intermediate_size": 10944,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
}
