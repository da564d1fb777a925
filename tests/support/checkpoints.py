"""Small models for the engine tests, and what else the tests do to checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedTokenizerFast

from offline_prune import pipeline
from offline_prune.settings import PruneSettings
from vllm_spense.format import KEY, Annotation
from vllm_spense.layout import rank_order

#: Changes a `quantization_config` in place.
Edit = Callable[[dict[str, Any]], object]

TINY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Larger than usual: the logits of a random model lie close together.
    "initializer_range": 0.1,
}


def tiny_llama(out: Path, **settings: Any) -> Path:
    """A random Llama with gate and up apart on disk, and a tokenizer of bytes."""
    return _write_dense(LlamaConfig(**TINY | settings), out)


def tiny_phi3(out: Path) -> Path:
    """A random Phi-3: gate and up in one tensor on disk."""
    return _write_dense(Phi3Config(**TINY), out)


def prune_tiny(dense: Path, out: Path, **settings: Any) -> Path:
    """Prunes with the real pruner, a third of the intermediate indices dense.

    In float32, whatever this CPU is fastest in: the tests compare engines that add in other orders, and whether an
    activation lies so close to the middle between two FP8 numbers that this matters depends on the weights.
    """
    given = {"method": "spensegpt+", "sparsity": 1 / 3, "calibration": "builtin", "samples": 2, "length": 64}
    with patch.object(pipeline, "compute_dtype", lambda device: torch.float32):
        pipeline.prune(PruneSettings(str(dense), out, device="cpu", **given | settings))
    return out


def rank_ordered(spense: Path, out: Path, ranks: int) -> Path:
    """The same model with its intermediate indices ordered [rank 0: sparse, dense | rank 1: sparse, dense | …].

    vLLM's own contiguous chunks of this file are the parts that Spense gives each rank of the original, so stock vLLM
    sums and quantizes the same numbers on the same rank.
    """
    config = json.loads((spense / "config.json").read_text())
    regions = Annotation.from_dict(config["quantization_config"].pop(KEY)).default
    order = rank_order(regions, ranks)
    weights = load_file(spense / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(".mlp.down_proj.weight"):
            weights[name] = tensor[:, order].contiguous()
        elif ".mlp." in name and ".down_proj." not in name:
            weights[name] = torch.cat([part[order] for part in tensor.split(regions.intermediate)])
    shutil.copytree(spense, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def _write_dense(config: Any, out: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(out)
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    return out
