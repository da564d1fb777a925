"""llmcompressor's SparseGPT or Wanda at 2:4 on the MLPs of a model: run by an environment that has llmcompressor.

    .peer/bin/python benchmarks/baselines/llmcompressor_prune.py MODEL TOKENS METHOD OUT

It stands alone, because that environment has nothing of this project; `benchmarks.peers` calls it.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main(model: str, tokens: str, method: str, out: str) -> None:
    """Writes the pruned model as BF16 to OUT; the last line printed is the version and the seconds it took.

    Args:
        model: folder of a dense model.
        tokens: safetensors file with `tokens`, int64 (samples, length).
        method: a key of `MODIFIERS`.
        out: folder to write.
    """
    ids = load_file(tokens)["tokens"]
    samples, length = ids.shape
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    start = time.perf_counter()
    oneshot(
        model=dense,
        dataset=data,
        recipe=MODIFIERS[method](sparsity=0.5, mask_structure="2:4", targets=[r"re:.*mlp\.(gate|up|down)_proj$"]),
        num_calibration_samples=samples,
        max_seq_length=length,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    dense.to(torch.bfloat16).save_pretrained(Path(out))
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    print(version("llmcompressor"), seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
