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
from tiny_models import byte_tokenizer, tiny_model

from benchmarks.zoo import Architecture
from benchmarks.zoo import tiny_model as tiny_architecture
from offline_prune.checkpoint.verify import open_checkpoint, verify
from vllm_spense import estimate
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import Regions

MLP, ATTENTION, FP8 = "model.layers.1.mlp", "model.layers.0.self_attn", torch.float8_e4m3fn
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


def scale(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight_scale"][3] = value

    return change


def lost_scale(tensors: Tensors) -> None:
    del tensors[f"{MLP}.up_proj.weight_scale"]


def flat_scale(tensors: Tensors) -> None:
    tensors[f"{MLP}.up_proj.weight_scale"] = tensors[f"{MLP}.up_proj.weight_scale"].flatten()


def scale_of(dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        name = f"{MLP}.up_proj.weight_scale"
        tensors[name] = tensors[name].to(dtype)

    return change


def stored_as_bf16(layer: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float().bfloat16()
        del tensors[f"{layer}.weight_scale"]

    return change


def lost(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def orphan(tensors: Tensors) -> None:
    tensors["model.norm.weight_scale"] = torch.ones(64, 1, dtype=torch.bfloat16)
    del tensors["model.norm.weight"]


def narrow_attention(tensors: Tensors) -> None:
    for key in ("weight", "weight_scale"):
        tensors[f"{ATTENTION}.q_proj.{key}"] = tensors[f"{ATTENTION}.q_proj.{key}"][:32].clone()


def narrow_mlp(tensors: Tensors) -> None:
    tensors[f"{MLP}.up_proj.weight"] = tensors[f"{MLP}.up_proj.weight"].view(torch.uint8)[:, :32].clone().view(FP8)


def unsigned(tensors: Tensors) -> None:
    tensors[f"{MLP}.up_proj.weight_scale"] = torch.ones(128, 1, dtype=torch.uint16)


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
        (edit_bits("up_proj", 100, 3, 0x80), "up_proj", "−0.0"),
        (scale(0.0), "q_proj", "not positive"),
        (scale(-1.0), "q_proj", "not positive"),
        (scale(float("inf")), "q_proj", "NaN or infinity"),
        (lost_scale, "up_proj", "tensor of a pruned module is missing"),
        (lost(f"{ATTENTION}.q_proj.weight_scale"), "q_proj", "without its scales"),
        (orphan, "norm", "scales without their weight"),
        (flat_scale, "up_proj", r"do not fit.*found: \(128,\); expected: \(128, 1\)"),
        (scale_of(torch.float32), "up_proj", "wrong type.*found: F32; expected: BF16"),
        (scale_of(torch.float16), "up_proj", "wrong type.*found: F16; expected: BF16"),
        (unsigned, "up_proj", "wrong type.*found: U16; expected: BF16"),
        (stored_as_bf16(f"{MLP}.gate_proj"), "gate_proj", "tensor of a pruned module is missing"),
        (stored_as_bf16(f"{ATTENTION}.o_proj"), "o_proj", "a linear layer is not FP8.*found: BF16"),
        (lost(f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.q_proj.weight_scale"), "q_proj", "model is missing"),
        (lost("model.norm.weight"), "model.norm.weight", "model is missing"),
        (narrow_attention, "q_proj", r"wrong shape.*found: \(32, 64\); expected: \(64, 64\)"),
        (narrow_mlp, "up_proj", "hidden size.*32 columns, and 64 rows of down_proj"),
        (short_weight, "up_proj", "do not add up.*found: 96 rows; expected: 128"),
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
        (other_regions, "do not add up.*found: 128 rows; expected: 256"),
        (other_split, "not 2:4"),
        (unknown_module, "module is missing.*model.layers.2.mlp"),
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
    assert result.also_2of4 == ()


def edited(good: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda config: config["quantization_config"].update(quant_method="fp8"), "quant_method; found: fp8"),
        (lambda config: config["quantization_config"].update(format="pack-quantized"), "format; found: pack"),
        (lambda config: config["quantization_config"].update(quantization_status="frozen"), "quantization_status"),
        (lambda config: config["quantization_config"].update(sparsity_config={"targets": ["Linear"]}), "sparsity"),
        (lambda config: config["quantization_config"].update(transform_config={"a": 1}), "transform_config"),
        (lambda config: config["quantization_config"].update(ignore=["lm_head", "re:(a+)+$"]), r"ignore; found: re:"),
        (lambda config: config["quantization_config"].update(ignore=[f"{MLP}.up_proj"]), "ignore; found: model"),
        (lambda config: config["quantization_config"].update(ignore=["re:model\\.layers\\.1\\..*"]), "ignore"),
        (lambda config: config["quantization_config"].update(config_groups=None), "config_groups; found: nothing"),
        (lambda config: group(config)["weights"].update(num_bits=4), "weights.num_bits; found: 4; expected: 8"),
        (lambda config: group(config)["weights"].update(symmetric=False), "weights.symmetric"),
        (lambda config: group(config)["weights"].update(group_size=128), "weights.group_size; found: 128"),
        (lambda config: group(config)["input_activations"].update(dynamic=False), "dynamic; found: False"),
        (lambda config: group(config)["input_activations"].pop("dynamic"), "dynamic; found: False"),
        (lambda config: group(config).update(targets=["re:.*q_proj"]), '"Linear" among its targets'),
    ],
)
def test_quantization_that_vllm_would_refuse_or_garble(
    change: Callable[[dict[str, Any]], None], key: str, good: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=rf"config\.json.*key: quantization_config\..*{key}"):
        open_checkpoint(edited(good, tmp_path / "out", change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(quantization_config=None), "not a Spense checkpoint"),
        (lambda config: config.update(quantization_config=[1]), "another kind of quantization"),
        (lambda config: config.update(num_hidden_layers=10**9), "more layers than tensors"),
        (lambda config: config.update(num_hidden_layers="two"), "transformers cannot build this"),
        (lambda config: config.update(hidden_size=None), "transformers cannot build this"),
        (lambda config: config.update(num_attention_heads=0), "transformers cannot build this"),
        (lambda config: config.update(num_attention_heads=8), "wrong shape for the model"),
        (lambda config: config["quantization_config"].update(ignore=["model.layers.0.self_attn.q_proj"]), "FP8"),
        (lambda config: config["quantization_config"].update(ignore=[]), "lm_head.*not FP8|not FP8.*lm_head"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(
    change: Callable[[dict[str, Any]], None], words: str, good: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpenseError, match=words):
        verify(edited(good, tmp_path / "out", change))


def test_weights_beside_the_checkpoint_are_refused(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "out")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(FormatError, match=r"not part of the checkpoint.*other\.safetensors"):
        verify(folder)


@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
def test_a_model_that_had_zeros_makes_a_good_checkpoint(share: float, tmp_path: Path, text: Path) -> None:
    """Zeros in a dense region prove nothing: they may be the original's."""
    model = tiny_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "layers.0.mlp" in name:
            tensor *= torch.rand(tensor.shape, generator=generator) >= share
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run(model, tmp_path / "out", text, method="magnitude", sparsity=0.25)
    result = verify(tmp_path / "out")
    assert result.dense_zeros > 0.45 * share
    assert result.also_2of4 == ()


def test_a_model_that_was_pruned_before_makes_a_good_checkpoint(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.0.mlp" in name:
            tensor.unflatten(-1, (-1, 4))[..., 2:] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run(model, tmp_path / "out", text, method="magnitude", sparsity=0.25)
    mlp = "model.layers.0.mlp"
    assert verify(tmp_path / "out").also_2of4 == tuple(f"{mlp}.{name}_proj ({name})" for name in ("gate", "up", "down"))


def test_a_dense_region_that_is_2_of_4_is_reported(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MLP}.up_proj.weight"].view(torch.uint8)[96:, ::2] = 0
    save_file(tensors, folder / "model.safetensors")
    assert verify(folder).also_2of4 == (f"{MLP}.up_proj (up)",)


def test_code_that_came_with_a_model_runs_only_when_trusted(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked: transformers would, and whoever says yes blindly runs it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def custom(config: dict[str, Any]) -> None:
        config["model_type"] = "unheard-of"
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    folder = edited(good, tmp_path / "out", custom)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('code ran')\n")
    with pytest.raises(SpenseError, match=r"its code comes with the model; --trust-remote-code"):
        verify(folder)
    assert open_checkpoint(folder).annotation == open_checkpoint(good).annotation
    assert estimate.load(str(folder), None)[1].mlps == [Regions(96, 32)] * 2
    assert not (tmp_path / "ran").exists()
    with pytest.raises(SpenseError, match="code ran"):
        verify(folder, trust_remote_code=True)


def test_an_ordinary_model_is_not_a_spense_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a Spense checkpoint"):
        verify(tiny_model("llama", tmp_path / "model"))


def test_a_missing_folder_is_said() -> None:
    with pytest.raises(SpenseError, match=r"^/no/such/folder: no such folder$"):
        verify(Path("/no/such/folder"))


def test_a_file_is_no_folder(good: Path) -> None:
    with pytest.raises(SpenseError, match=r"config\.json: found a file, expected the folder"):
        verify(good / "config.json")


def test_one_tensor_of_the_files_may_be_several_of_transformers(text: Path, tmp_path: Path) -> None:
    """Step-3's vision tower has q, k and v in one tensor of the files, and apart in transformers."""
    tiny_architecture(Architecture("step3p7", "Step3p7ForConditionalGeneration"), tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    run(tmp_path / "model", out, text, skip_unsupported=True)
    verify(out)
    tensors = load_file(out / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("attn.in_proj_weight"))]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        FormatError, match=r"a tensor of the model is missing .*vision_model\.layers\.0\.self_attn\.[qkv]_proj"
    ):
        verify(out)
