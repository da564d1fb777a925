"""llmcompressor's SparseGPT or Wanda at 2:4 on the MLPs of a model, or its GPTQ in four bits on all linear layers but
lm_head: run by an environment that has llmcompressor, 0.11 or later.

    .peer/bin/python benchmarks/baselines/llmcompressor_oneshot.py MODEL TOKENS METHOD OUT

It stands alone, because that environment has nothing of this project; `benchmarks.peers` calls it.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

PRUNERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main(model: str, tokens: str, method: str, out: str) -> None:
    """Writes the model as BF16 to OUT; the last line printed is the version and the seconds the method took.

    Args:
        model: folder of a dense model.
        tokens: safetensors file with `tokens`, int64 (samples, length).
        method: a key of `PRUNERS`, or gptq-G for W4A16 with a scale for each G weights along K.
        out: folder to write.
    """
    ids = load_file(tokens)["tokens"]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = {name for name, _ in dense.named_parameters()}
    start = time.perf_counter()
    oneshot(model=dense, dataset=batches(ids), recipe=recipe(method))
    seconds = time.perf_counter() - start
    # GPTQ leaves each weight at the value that its four bits stand for, beside scales that this format has no use for.
    weights = {name: value.to(torch.bfloat16) for name, value in dense.named_parameters() if name in names}
    folder = Path(out)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    print(version("llmcompressor"), seconds)


def batches(ids: torch.Tensor) -> DataLoader:
    """The sequences in order, each a batch of its own: `input_ids` and `attention_mask`, int64 (1, length).

    A `datasets.Dataset` would pickle its table to name its cache, which fails with some versions of dill and pyarrow.

    Args:
        ids: int64 (samples, length).
    """
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=1)


def recipe(method: str) -> Modifier:
    """What `main` calls a method."""
    if method in PRUNERS:
        return PRUNERS[method](sparsity=0.5, mask_structure="2:4", targets=[r"re:.*mlp\.(gate|up|down)_proj$"])
    group = int(method.removeprefix("gptq-"))
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


if __name__ == "__main__":
    main(*sys.argv[1:])
