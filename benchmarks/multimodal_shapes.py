"""Shapes of published models whose language model is one part of several, beside those of `vllm_spense.shapes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_spense.shapes import SHAPES

_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 5120,
    "patch_size": 16,
}
_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_ROPE = {"rope_type": "default", "mrope_interleaved": True}

#: Name → config.json of the unquantized model; `text_config` is the language model's.
MULTIMODAL_SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Three of four layers are gated delta nets.
    "qwen3.5-27b": {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": False,
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "vision_config": {**_VISION, "model_type": "qwen3_5"},
        "text_config": {
            "model_type": "qwen3_5_text",
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 64,
            "full_attention_interval": 4,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "attn_output_gate": True,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 48,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "vocab_size": 248320,
            "bos_token_id": 248044,
            "eos_token_id": 248044,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "rope_parameters": {
                **_ROPE,
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
            },
        },
    },
    "qwen3-vl-32b": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": False,
        **_TOKENS,
        "vision_config": {**_VISION, "model_type": "qwen3_vl", "deepstack_visual_indexes": [8, 16, 24]},
        "text_config": {
            **{
                key: value
                for key, value in SHAPES["qwen3-32b"].items()
                if key not in ("architectures", "rope_theta", "torch_dtype")
            },
            "model_type": "qwen3_vl_text",
            "dtype": "bfloat16",
            "max_position_embeddings": 262144,
            "rope_parameters": {**_ROPE, "rope_theta": 5000000.0, "mrope_section": [24, 20, 20]},
        },
    },
}
