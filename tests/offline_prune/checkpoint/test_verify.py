"""`spense verify` finds every way in which files and annotation can disagree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from offline_prune.checkpoint.verify import verify
from vllm_spense.errors import FormatError, SpenseError

MLP = "model.layers.1.mlp"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "out"
    run(llama, out, text)
    return out


def edit_bits(layer: str, row: int, column: int, bits: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MLP}.{layer}.weight"].view(torch.uint8)[row, column] = bits

    return change


def third_nonzero(layer: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        group = tensors[f"{MLP}.{layer}.weight"].view(torch.uint8)[5, 8:12]
        group[:] = 0x38

    return change


def negative_zero(tensors: Tensors) -> None:
    group = tensors[f"{MLP}.down_proj.weight"].view(torch.uint8)[0, :4]
    group[int((group == 0).nonzero()[0])] = 0x80


def pruned_dense(tensors: Tensors) -> None:
    tensors[f"{MLP}.up_proj.weight"].view(torch.uint8)[96:, ::2] = 0


def scale(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight_scale"][3] = value

    return change


def lost_scale(tensors: Tensors) -> None:
    del tensors[f"{MLP}.up_proj.weight_scale"]


def flat_scale(tensors: Tensors) -> None:
    tensors[f"{MLP}.up_proj.weight_scale"] = tensors[f"{MLP}.up_proj.weight_scale"].flatten()


def short_weight(tensors: Tensors) -> None:
    for key in ("weight", "weight_scale"):
        tensors[f"{MLP}.up_proj.{key}"] = tensors[f"{MLP}.up_proj.{key}"][:-32].clone()


@pytest.mark.parametrize(
    ("change", "layer", "words"),
    [
        (third_nonzero("gate_proj"), "gate_proj", "row 5, columns 8 to 11"),
        (third_nonzero("up_proj"), "up_proj", "not 2:4"),
        (third_nonzero("down_proj"), "down_proj", "not 2:4"),
        (edit_bits("down_proj", 0, 127, 0x7F), "down_proj", "NaN or infinity"),
        (negative_zero, "down_proj", "−0.0"),
        (pruned_dense, "up_proj", "dense region has been pruned"),
        (scale(0.0), "q_proj", "not positive"),
        (scale(-1.0), "q_proj", "not positive"),
        (scale(float("inf")), "q_proj", "NaN or infinity"),
        (lost_scale, "up_proj", "without scales"),
        (flat_scale, "up_proj", "wrong shape"),
        (short_weight, "up_proj", "do not add up to the rows"),
    ],
)
def test_damaged_tensors(change: Callable[[Tensors], None], layer: str, words: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=words) as caught:
        verify(folder)
    assert caught.value.file is not None
    assert layer in str(caught.value.layer)
    assert caught.value.found is not None
    assert caught.value.expected is not None


def other_regions(spense: dict[str, Any]) -> None:
    spense["regions"]["default"] = {"sparse": 128, "dense": 128}


def other_split(spense: dict[str, Any]) -> None:
    spense["regions"]["default"] = {"sparse": 128, "dense": 0}


def unknown_module(spense: dict[str, Any]) -> None:
    spense["modules"].append("model.layers.2.mlp")


def unknown_key(spense: dict[str, Any]) -> None:
    spense["speed"] = "fast"


def future(spense: dict[str, Any]) -> None:
    spense["version"] = 9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_regions, "do not add up to the rows.*found: 128 rows; expected: 256"),
        (other_split, "not 2:4"),
        (unknown_module, "does not have.*model.layers.2.mlp"),
        (unknown_key, "unknown key"),
        (future, "a newer vllm-spense may read it"),
    ],
)
def test_edited_annotations(change: Callable[[dict[str, Any]], None], words: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["spense"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=words):
        verify(folder)


def test_a_good_checkpoint_is_good(good: Path) -> None:
    result = verify(good)
    assert result.mlps == 2
    assert result.sparse_zeros == pytest.approx(0.5, abs=0.01)
    assert result.dense_zeros < 0.02


def test_an_ordinary_model_is_not_a_spense_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a Spense checkpoint"):
        verify(tiny_model("llama", tmp_path / "model"))


def test_a_missing_folder_is_said() -> None:
    with pytest.raises(SpenseError, match=r"no config\.json"):
        verify(Path("/no/such/folder"))
