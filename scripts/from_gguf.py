"""A language model in a GGUF file as an ordinary Hugging Face folder, its weights unpacked to BF16."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock


def convert(file: Path, out: Path, end: str | None = None) -> None:
    """Writes config, weights, tokenizer and generation config into a folder that is there.

    Args:
        end: the token that ends a turn, where some versions of transformers read another one out of the file.
    """
    # transformers shows bars of its own, and tqdm's own for GGUF, which reads this when it is imported.
    os.environ["TQDM_DISABLE"] = "1"
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file three times, for seconds each, and makes the table of names for every module anew.
    once = {"GGUFReader": cache(gguf.GGUFReader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    with mock.patch.multiple(gguf, **once):
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        begins = gguf.GGUFReader(str(file)).fields.get("tokenizer.ggml.add_bos_token")
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if begins is not None and begins.contents():
        # transformers does not read it, and Gemma makes nothing of a text that does not begin with it.
        tokenizer.add_bos_token = True
    if end is not None:
        tokenizer.eos_token = end
    config = model.config
    # save_pretrained refuses a model that was read from GGUF.
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def perplexity_of(folder: Path, text: str) -> float:
    """A model's perplexity on a short text, from transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss.exp().item()
