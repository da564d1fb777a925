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
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import positive, writable_folder
from benchmarks.multimodal_shapes import MULTIMODAL_SHAPES
from offline_prune.checkpoint.writer import fp8_config
from offline_prune.methods.regions import model_regions
from vllm_spense.errors import SpenseError
from vllm_spense.format import KEY, Annotation, Projections
from vllm_spense.shapes import MIXTURES, SHAPES

DENSE = "dense"
#: How tokens of a mixture choose experts: each is as likely, or some are likelier.
BALANCED, SKEWED = "balanced", "skewed"
#: Name → config.json of the unquantized model.
ALL_SHAPES: Mapping[str, Mapping[str, Any]] = {**SHAPES, **MIXTURES, **MULTIMODAL_SHAPES}
#: Tokens in a block of vLLM's KV cache.
_KV_BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", choices=ALL_SHAPES)
    parser.add_argument("out", type=writable_folder, help="folder to write")
    parser.add_argument("--sparsity", default="0.375", help="share of zeros in the MLP weights, 0 to 0.5, or `dense`")
    parser.add_argument("--layers", type=positive, help="fewer layers than published")
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
        SpenseError: no layers at all, or no regions have that sparsity.
    """
    config = shape_config(shape, layers)
    text = text_config(config)
    ignore, prefix = ["lm_head"], "model.layers"
    if text is not config:
        ignore, prefix = [*ignore, r"re:(.*\.)?visual(\..*)?$"], "model.language_model.layers"
    routers = [f"{name.removesuffix('.experts')}.gate" for name in expert_counts(text, prefix)]
    config["quantization_config"] = quantization = fp8_config([*ignore, *routers])
    if sparsity is not None:
        quantization[KEY] = annotation(text, sparsity, prefix).to_dict()
    return write_config(config, out)


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of one of `ALL_SHAPES` in BF16, with as many layers as published or fewer.

    Raises:
        SpenseError: no layers at all.
    """
    if layers is not None and layers < 1:
        raise SpenseError(f"--layers: found {layers}, expected at least 1")
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


def kv_token_bytes(config: dict[str, Any], kv: str) -> int:
    """Of the keys and values of one token in all layers of a config.json.

    Args:
        kv: type of the KV cache, `fp8` or `auto` for that of a 16-bit model.
    """
    text = text_config(config)
    item = 1 if kv == "fp8" else 2
    return 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * item


def state_bytes(config: dict[str, Any]) -> int:
    """At most, of what one gated delta net of a config.json keeps of a request: 0 if there is none.

    vLLM's KV cache then gives every layer pages of this size, attention's too.
    """
    text = text_config(config)
    if "linear_num_value_heads" not in text:
        return 0
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    convolution = 2 * (2 * keys + values) * (text["linear_conv_kernel_dim"] - 1)
    return convolution + 4 * values * text["linear_key_head_dim"]


def kv_cache_bytes(config: dict[str, Any], kv: str, batches: Iterable[tuple[int, int]]) -> int:
    """Of a KV cache with room for the largest of some batches, its requests' last blocks full.

    Args:
        kv: as `kv_token_bytes` has it.
        batches: requests of each, and their tokens at the end.
    """
    token, state = kv_token_bytes(config, kv), state_bytes(config)
    if not state:
        return token * (max(batch * (length + _KV_BLOCK) for batch, length in batches) + 2 * _KV_BLOCK)
    in_all_layers = text_config(config)["num_hidden_layers"] * state
    return in_all_layers * max((batch + 1) * (1 + -(-length * token // in_all_layers)) for batch, length in batches)


def annotation(config: dict[str, Any], sparsity: float, prefix: str = "model.layers") -> Annotation:
    """What the pruner would write for such a model, had it pruned one.

    Raises:
        SpenseError: no regions have that sparsity.
    """
    if not 0 <= sparsity <= 0.5:
        raise SpenseError(f"--sparsity: found {sparsity}, expected 0 to 0.5")
    projections = Projections("gate_proj", "up_proj", "down_proj")
    experts = expert_counts(config, prefix)
    sizes = mlp_sizes(config, prefix)
    regions, alignment = model_regions(sizes, sparsity, None, dense_first=False, required=False, experts=experts)
    default = Counter(regions.values()).most_common(1)[0][0]
    return Annotation(
        method="none: dummy weights",
        settings={},
        calibration=None,
        alignment=alignment,
        projections=projections,
        modules=tuple(name for name in sizes if name not in experts),
        default=default,
        overrides={name: found for name, found in regions.items() if found != default},
        experts=experts,
        expert_projections=projections if experts else None,
    )


def expert_counts(config: dict[str, Any], prefix: str) -> dict[str, int]:
    """What holds the routed experts of a layer → how many these are; empty for a model without."""
    count = config.get("num_experts") or config.get("n_routed_experts")
    layers = range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
    return {f"{prefix}.{layer}.mlp.experts": count for layer in layers} if count else {}


def mlp_sizes(config: dict[str, Any], prefix: str) -> dict[str, int]:
    """MLPs and what stands for all routed experts of a layer → their intermediate size, in the model's order."""
    sizes = {}
    experts = expert_counts(config, prefix)
    for layer in range(config["num_hidden_layers"]):
        module = f"{prefix}.{layer}.mlp"
        if f"{module}.experts" in experts:
            sizes[f"{module}.experts"] = size = config["moe_intermediate_size"]
            if shared := config.get("n_shared_experts"):
                sizes[f"{module}.shared_experts"] = shared * size
        else:
            sizes[module] = config["intermediate_size"]
    return sizes


if __name__ == "__main__":
    main()
