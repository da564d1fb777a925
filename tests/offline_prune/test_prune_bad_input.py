"""Bad input of every kind: the message names what is wrong, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from safetensors.torch import load_file, save_file
from tiny_models import UNSUPPORTED, byte_tokenizer, tiny_model

from benchmarks import zoo
from benchmarks.zoo import Architecture
from offline_prune.checkpoint.verify import open_checkpoint
from offline_prune.methods.regions import fit_regions
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError
from vllm_spense.format import Regions


def refused(words: str, out: Path, model: str | Path, text: Path, **options: Any) -> None:
    with pytest.raises(SpenseError, match=words):
        run(Path(model), out, text, **options)
    assert not (out / "config.json").exists()


def test_unknown_model_path(tmp_path: Path, text: Path) -> None:
    refused("/no/such/model: no such folder", tmp_path / "out", "/no/such/model", text)


def test_a_text_that_is_not_there_is_missed_before_the_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    out = tmp_path / "out"
    for missing in ("no/such.txt", "./text"):
        with pytest.raises(SpenseError, match=f"^{Path(missing)}: no such file or folder$"):
            prune(PruneSettings("some/model", out, calibration=("builtin", missing)))
    assert not out.exists()


def test_folder_without_config(tmp_path: Path, text: Path) -> None:
    (tmp_path / "model").mkdir()
    refused("no config.json", tmp_path / "out", tmp_path / "model", text)


def test_folder_without_weights(llama: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((llama / "config.json").read_bytes())
    refused("no weights", tmp_path / "out", tmp_path / "model", text)


def test_unknown_architecture(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "unheard-of"}')
    refused("transformers cannot build this", tmp_path / "out", model, text)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_without_gated_mlps(name: str, tmp_path: Path, text: Path) -> None:
    model = tiny_model(name, tmp_path / "model")
    for skip in (False, True):
        words = r"no block has a gated MLP .*nothing to prune; .*(layers?|blocks)\.0: found (no gated|a mixture)"
        refused(words, tmp_path / "out", model, text, skip_unsupported=skip)


def test_models_whose_blocks_share_their_mlp(tmp_path: Path, text: Path) -> None:
    zoo.tiny_model(Architecture("zamba", "ZambaForCausalLM"), tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = r"no block has a gated MLP \(gate, up, down\) of its own.*layers\.1: found a gated MLP that 2 blocks share"
    for skip in (False, True):
        refused(words, tmp_path / "out", tmp_path / "model", text, skip_unsupported=skip)


def test_skipping_is_advised_where_something_is_left(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama4 with a plain layer", tmp_path / "model")
    refused(
        r"layers\.0: found a mixture .*; expected one gated MLP .*--skip-unsupported", tmp_path / "out", model, text
    )


def test_already_quantized(llama: Path, tmp_path: Path, text: Path) -> None:
    run(llama, tmp_path / "first", text)
    refused("already quantized", tmp_path / "out", tmp_path / "first", text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.6}, "--sparsity: found 0.6, expected 0 to 0.5"),
        ({"sparsity": -0.1}, "--sparsity: found -0.1"),
        ({"sparsity": float("nan")}, "--sparsity: found nan"),
        ({"method": "spence"}, r"--method: found spence, expected spensegpt\+\+ \|"),
        ({"selection": "first"}, "--selection: found first"),
        ({"grouping": "four"}, "--grouping: found four, expected original | mixed"),
        ({"layout": "middle"}, "--layout: found middle"),
        ({"quantize": "int8"}, "--quantize: found int8"),
        ({"rounding": "before"}, "--fp8-rounding: found before, expected after | inside | everywhere"),
        ({"samples": 0}, "--samples: found 0"),
        ({"damping": 2.0}, "--damping: found 2"),
        ({"tune_steps": -1}, "--tune-steps: found -1"),
        ({"descent_passes": -1}, "--descent-passes: found -1"),
        ({"tune_rate": 0.0}, "--tune-rate: found 0, expected more than 0"),
        ({"alignment": 48}, "--alignment: found 48"),
        ({"alignment": 256}, "intermediate size 128 is not a multiple of the alignment 256; --alignment 128"),
        ({"alignment": 64, "sparsity": 0.375}, "values that fit nearby: 0, 0.25, 0.5"),
        ({"sparsity": 0.3}, "values that fit nearby: .*0.25, 0.375"),
        ({"device": "cuda:7"}, "--device: found cuda:7"),
        ({"device": "tpu"}, "--device: found tpu"),
        ({"calibration": "/no/text.txt"}, "/no/text.txt: no such file"),
        ({"samples": 4000}, "found [0-9]+ tokens, expected at least 256000"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, llama: Path, tmp_path: Path, text: Path) -> None:
    refused(words, tmp_path / "out", llama, text, **options)


def test_an_odd_intermediate_size_is_explained() -> None:
    with pytest.raises(SpenseError, match="mlp: intermediate size 1500 is not a multiple of the alignment 32"):
        fit_regions(1500, 0.375, None, "mlp")


@pytest.mark.parametrize(
    ("intermediate", "sparsity", "dense", "alignment"),
    [
        (25600, 0.375, 6400, 256),
        (27648, 0.375, 6912, 256),
        (1536, 0.375, 384, 128),
        (1536, 0.25, 768, 256),
        (128, 0.5, 0, 128),
    ],
)
def test_regions_of_real_sizes(intermediate: int, sparsity: float, dense: int, alignment: int) -> None:
    assert fit_regions(intermediate, sparsity, None, "mlp") == (Regions(intermediate - dense, dense), alignment)


def damaged(model: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_weights(llama: Path, tmp_path: Path, text: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    model = damaged(llama, tmp_path / "model", change)
    refused(r"model.layers.1.mlp.up_proj.weight holds NaN or infinity", tmp_path / "out", model, text)


def test_overflowing_activations(llama: Path, tmp_path: Path, text: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate", "up", "down"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 1e20

    model = damaged(llama, tmp_path / "model", change)
    refused(r"model\.layers\.[01]", tmp_path / "out", model, text)


def test_missing_tensor(llama: Path, tmp_path: Path, text: Path) -> None:
    model = damaged(llama, tmp_path / "model", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused("no tensor model.layers.1.mlp.up_proj.weight", tmp_path / "out", model, text)


def test_a_tokenizer_of_another_model(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", vocab_size=256, pad_token_id=None)
    refused("found token 256, expected 0 to 255", tmp_path / "out", model, text, samples=64)


def test_truncated_shard(llama: Path, tmp_path: Path, text: Path) -> None:
    model = damaged(llama, tmp_path / "model", lambda t: None)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(r"truncated.*model\.safetensors", tmp_path / "out", model, text)


def test_missing_shard(llama: Path, tmp_path: Path, text: Path) -> None:
    model = damaged(llama, tmp_path / "model", lambda t: None)
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"weight file is missing.*model-00001-of-00002\.safetensors", tmp_path / "out", model, text)


def test_out_exists(llama: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    run(llama, out, text, sparsity=0.25)
    with pytest.raises(SpenseError, match="not empty; --overwrite"):
        run(llama, out, text)
    assert open_checkpoint(out).annotation.default.mlp_sparsity == 0.25
    run(llama, out, text, overwrite=True)
    assert open_checkpoint(out).annotation.default.mlp_sparsity == 0.375
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
