"""Tiny random models of many architectures, saved as ordinary Hugging Face folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, LAYERS = 64, 128, 2
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "pad_token_id": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
#: Configuration class and what differs from the common sizes.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama with biases": ("LlamaConfig", {"mlp_bias": True, "attention_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "seed-oss": ("SeedOssConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.5, "logits_scaling": 0.5}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "phi3": ("Phi3Config", {}),
}
UNSUPPORTED = {
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {}),
    "rwkv": ("RwkvConfig", {}),
    "xlnet": ("XLNetConfig", {"d_model": HIDDEN, "n_layer": LAYERS, "n_head": 4, "d_inner": INTERMEDIATE}),
}
_QWEN3_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE}
_GRANITE_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5}
EXPERTS = {
    "qwen3-moe": ("Qwen3MoeConfig", _QWEN3_MOE),
    "qwen3-moe with a plain layer": ("Qwen3MoeConfig", {**_QWEN3_MOE, "mlp_only_layers": [1]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    # Its files hold all experts of a layer in one tensor, the next one's too.
    "granite-moe": ("GraniteMoeConfig", _GRANITE_MOE),
    "granite-moe-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **_GRANITE_MOE,
            "shared_intermediate_size": INTERMEDIATE,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    # Its router is a linear layer.
    "jamba": ("JambaConfig", {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 8}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": INTERMEDIATE,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}
#: One block that can be pruned, and one that cannot.
MIXED = {
    "llama4 with a plain layer": (
        "Llama4TextConfig",
        {"head_dim": 16, "num_local_experts": 4, "moe_layers": [0], "intermediate_size_mlp": INTERMEDIATE},
    ),
}
#: Between the model and its output head is another layer.
BEFORE_HEAD = {"modernbert-decoder": ("ModernBertDecoderConfig", {"local_attention": 16})}


def tiny_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    """Saves a random model of the family, with a tokenizer of single bytes, to `folder`."""
    kind, special = (FAMILIES | UNSUPPORTED | EXPERTS | MIXED | BEFORE_HEAD)[name]
    config = getattr(transformers, kind)(**{**_SIZES, **special, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Larger than the usual initialization, so that the layers matter.
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stacked(model: Path, folder: Path) -> Path:
    """A copy of a Qwen3-MoE whose files hold all experts of a layer in one tensor, under the parameter's name."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    layers = {name.partition(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}
    for layer in sorted(layers):
        each = [
            [tensors.pop(f"{layer}.{expert}.{leaf}.weight") for leaf in ("gate_proj", "up_proj", "down_proj")]
            for expert in range(4)
        ]
        tensors[f"{layer}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        tensors[f"{layer}.down_proj"] = torch.stack([down for _, _, down in each])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<eos>": 256, "<pad>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
