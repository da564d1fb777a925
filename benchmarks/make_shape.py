"""Writes the configuration of a published model, without weights, for vLLM's `--load-format dummy`.

    python benchmarks/make_shape.py qwen3-32b /tmp/qwen3-32b --sparsity 0.375
    vllm serve /tmp/qwen3-32b --load-format dummy --skip-tokenizer-init

`--sparsity dense` writes the FP8 baseline: the same `quantization_config` without an annotation.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.multimodal_shapes import MULTIMODAL_SHAPES
from offline_prune.checkpoint.writer import fp8_config
from offline_prune.methods.regions import fit_regions
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, Annotation, Projections
from vllm_spense.shapes import SHAPES

DENSE = "dense"
ALL_SHAPES = {**SHAPES, **MULTIMODAL_SHAPES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=ALL_SHAPES)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--sparsity", default="0.375", help="share of zeros in the MLP weights, 0 to 0.5, or `dense`")
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    options = parser.parse_args()
    try:
        sparsity = None if options.sparsity == DENSE else float(options.sparsity)
        make_shape(options.shape, options.out, sparsity, options.layers)
    except (SpenseError, ValueError) as error:
        parser.error(str(error))


def make_shape(shape: str, out: Path, sparsity: float | None, layers: int | None = None) -> Path:
    """Writes config.json and generation_config.json.

    Args:
        shape: a key of `ALL_SHAPES`.
        out: the folder, created where it is missing.
        sparsity: MLP sparsity, or None for the dense baseline.
        layers: None for as many as published.

    Raises:
        SpenseError: no regions have that sparsity.
    """
    config = shape_config(shape, layers)
    text = text_config(config)
    ignore, prefix = ["lm_head"], "model.layers"
    if text is not config:
        ignore, prefix = [*ignore, r"re:(.*\.)?visual(\..*)?$"], "model.language_model.layers"
    config["quantization_config"] = quantization = fp8_config(ignore)
    if sparsity is not None:
        quantization[KEY] = annotation(text, sparsity, prefix).to_dict()
    return write_config(config, out)


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of one of `ALL_SHAPES` in BF16, with as many layers as published or fewer."""
    config: dict[str, Any] = copy.deepcopy({**ALL_SHAPES[shape]})
    text = text_config(config)
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    return config


def write_config(config: dict[str, Any], out: Path) -> Path:
    """Writes config.json and generation_config.json into a folder, which is created where it is missing."""
    text = text_config(config)
    out.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": text["bos_token_id"], "eos_token_id": text["eos_token_id"]}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model: all of it, unless there are others."""
    return config.get("text_config", config)


def annotation(config: dict[str, Any], sparsity: float, prefix: str = "model.layers") -> Annotation:
    """What the pruner would write for such a model, had it pruned one."""
    modules = tuple(f"{prefix}.{layer}.mlp" for layer in range(config["num_hidden_layers"]))
    regions, alignment = fit_regions(config["intermediate_size"], sparsity, None, modules[0])
    return Annotation(
        method="none: dummy weights",
        settings={},
        calibration=None,
        alignment=alignment,
        projections=Projections("gate_proj", "up_proj", "down_proj"),
        modules=modules,
        default=regions,
    )


if __name__ == "__main__":
    main()
