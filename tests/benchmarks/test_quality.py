"""The paper's order of methods, on the first blocks of a real model and a small calibration text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from offline_prune.calibration.data import heldout_tokens
from offline_prune.checkpoint.dense_model import load_dense, perplexity
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings

CASES = {
    "wanda 2:4": ("wanda", 0.5, "fp8"),
    "sparsegpt 2:4": ("sparsegpt", 0.5, "fp8"),
    "spensegpt 37.5%": ("spensegpt", 0.375, "fp8"),
    "spensegpt+ 37.5%": ("spensegpt+", 0.375, "fp8"),
    "spensegpt+ 25%": ("spensegpt+", 0.25, "fp8"),
    "spensegpt+ 37.5% BF16": ("spensegpt+", 0.375, "none"),
}
#: Of thirty. The pruner goes from block to block, so that they become what they become in the whole model, in a sixth
#: of the time; the demo prunes all.
BLOCKS = 5


@pytest.fixture(scope="module")
def beginning(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 without the blocks after the first five."""
    out = tmp_path_factory.mktemp("beginning") / "model"
    shutil.copytree(smollm2_folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    behind = tuple(f"model.layers.{index}." for index in range(BLOCKS, config["num_hidden_layers"]))
    weights = load_file(smollm2_folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(behind)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def perplexities(smollm2_folder: Path, beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of the whole model with its first blocks pruned."""
    model, tokenizer = load_dense(smollm2_folder)
    heldout = heldout_tokens(tokenizer, 4, 256)
    found = {"dense": perplexity(model, heldout)}
    folder = tmp_path_factory.mktemp("pruned")
    for name, (method, sparsity, quantize) in CASES.items():
        given = {"method": method, "sparsity": sparsity, "quantize": quantize, "calibration": "builtin"}
        prune(PruneSettings(str(beginning), folder / name, samples=16, length=256, device="cpu", **given))
        pruned, _ = load_dense(folder / name)
        for index, block in enumerate(pruned.model.layers):
            model.model.layers[index] = block
        found[name] = perplexity(model, heldout)
    return found


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("dense", "spensegpt+ 25%"),
        ("spensegpt+ 25%", "spensegpt+ 37.5%"),
        ("spensegpt+ 37.5%", "spensegpt 37.5%"),
        ("spensegpt 37.5%", "sparsegpt 2:4"),
        ("sparsegpt 2:4", "wanda 2:4"),
    ],
)
def test_order(better: str, worse: str, perplexities: dict[str, float]) -> None:
    assert perplexities[better] < perplexities[worse], perplexities


def test_fp8_adds_little(perplexities: dict[str, float]) -> None:
    """One to three percent: other roundings, of another CPU too, lead to other masks of so small a text.

    Scales that saturate, or are another row's, cost a hundred times; finer faults are test_quantize's to find.
    """
    assert perplexities["spensegpt+ 37.5%"] < 1.1 * perplexities["spensegpt+ 37.5% BF16"], perplexities
