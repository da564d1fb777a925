"""The language model inside a multimodal one is pruned, and everything else of the checkpoint stays what it was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import contents, cut_off, run
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer
from torch import nn

from benchmarks.served_models import MODELS, make
from benchmarks.zoo import Architecture, tiny_model
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.healing.settings import Train
from offline_prune.healing.weights import trained_names
from offline_prune.model.loading import SourceModel
from offline_prune.model.safetensors_reader import SafetensorsReader
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

KINDS = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
#: Some weights of a draft head, as Qwen3.5's files have them and transformers' module tree does not.
MTP = {"mtp.fc.weight": (64, 128), "mtp.layers.0.mlp.gate_proj.weight": (128, 64), "mtp.norm.weight": (64,)}


@pytest.fixture(scope="module", params=KINDS)
def multimodal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal model with a draft head in its files."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(Architecture(request.param, KINDS[request.param]), folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.randn(shape).bfloat16() for name, shape in MTP.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pruned(multimodal: Path, text: Path) -> Path:
    out = multimodal.parent / f"{multimodal.name}-pruned"
    run(multimodal, out, text)
    return out


def test_all_but_the_language_model_is_untouched(multimodal: Path, pruned: Path) -> None:
    verify(pruned)
    before, after = SafetensorsReader(multimodal), SafetensorsReader(pruned)
    assert set(before) == {name for name in after if not name.endswith(".weight_scale")}
    changed = {name for name in before if before.dtype(name) != after.dtype(name)}
    assert all(re.search(r"(^|\.)layers\.\d+\..*\.weight$", name) for name in changed)
    assert not [name for name in changed if re.search(r"vis|mtp|project", name)]
    blocks = SourceModel(str(multimodal)).blocks
    assert len(changed) >= 7 * len(blocks)
    untouched = [name for name in before if re.search(r"vis|mtp|project|embed", name)]
    assert len(untouched) > len(MTP)
    assert all(torch.equal(before.read(name), after.read(name)) for name in untouched)
    assert (pruned / "preprocessor_config.json").exists()


def test_the_annotation_has_the_names_of_the_files(pruned: Path) -> None:
    checkpoint = open_checkpoint(pruned)
    for module in checkpoint.annotation.modules:
        assert f"{module}.down_proj.weight" in checkpoint.tensors


def test_whatever_is_not_quantized_is_ignored(multimodal: Path, pruned: Path) -> None:
    """In the files' names and in transformers'; vLLM's differ from these in what they begin with."""
    config = json.loads((pruned / "config.json").read_text())["quantization_config"]

    def ignored(name: str) -> bool:
        return any(
            bool(re.match(entry.removeprefix("re:"), name)) if entry.startswith("re:") else entry == name
            for entry in config["ignore"]
        )

    files = SafetensorsReader(pruned)
    for name in files:
        if name.endswith(".weight") and len(files.shape(name)) == 2 and "embed" not in name:
            layer = name.removesuffix(".weight")
            assert ignored(layer) == (files.dtype(name) != torch.float8_e4m3fn), name
    model = SourceModel(str(multimodal))
    for name, module in model.skeleton.named_modules():
        if isinstance(module, nn.Linear):
            stored = model.tensors.stored(f"{name}.weight")
            if stored in files:
                assert ignored(name) == (files.dtype(stored) != torch.float8_e4m3fn), name
    for name in ("model.mtp.layers.0.mlp.gate_proj", "mtp.fc"):
        assert ignored(name)


def test_a_run_that_was_cut_off_ends_the_same(multimodal: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    """Parts have the files' names, blocks the modules'."""
    cut_off(multimodal, tmp_path / "out", text, 1)
    run(multimodal, tmp_path / "out", text, resume=True)
    assert contents(tmp_path / "out") == contents(pruned)


def test_transformers_loads_it_as_it_loads_the_original(multimodal: Path, pruned: Path) -> None:
    architecture = json.loads((multimodal / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, architecture)
    # In the type of the files, to which compressed-tensors decompresses.
    model, problems = kind.from_pretrained(pruned, dtype=torch.bfloat16, output_loading_info=True)
    assert not problems["missing_keys"]
    tokens = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    original = kind.from_pretrained(multimodal, dtype=torch.bfloat16)
    with torch.inference_mode():
        found, expected = (each(input_ids=tokens, use_cache=False).logits for each in (model, original))
    assert found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(found.float(), expected.float(), dim=-1).mean() > 0.3


def test_images_are_seen_as_before(text: Path, tmp_path: Path) -> None:
    """At sparsity 0 the logits of an image and a text are the original's."""
    tiny_model(Architecture("llava", KINDS["llava"]), tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "same", text, sparsity=0.0, selection="random", quantize="none")
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = []
    for name in ("model", "same"):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32)
        tokens = torch.tensor([[5, *4 * [model.config.image_token_id], 7, 9]])
        with torch.inference_mode():
            logits.append(model(input_ids=tokens, pixel_values=image, use_cache=False).logits)
            blind = model(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(*logits, atol=1e-3 * logits[0].abs().max().item())
    assert not torch.allclose(logits[1], blind, atol=1e-2)


def require_untouched(folder: Path, prefix: str, some: set[str]) -> list[str]:
    """Every tensor of a draft layer is there and as it was, `some` among them; returns what is not quantized."""
    before, after = SafetensorsReader(folder / "model"), SafetensorsReader(folder / "out")
    head = [name for name in before if name.startswith(prefix)]
    assert {f"{prefix}{name}" for name in some} <= set(head)
    assert all(torch.equal(before.read(name), after.read(name)) for name in head)
    assert set(before) == {name for name in after if not name.endswith(".weight_scale")}
    return json.loads((folder / "out/config.json").read_text())["quantization_config"]["ignore"]


def test_a_draft_head_after_the_last_layer_is_untouched(text: Path, tmp_path: Path) -> None:
    """As DeepSeek and GLM store theirs: a layer more than the model has."""
    make(MODELS["GLM-4.5 with MTP"], tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text, sparsity=0.5)
    ignore = require_untouched(tmp_path, "model.layers.2.", {"eh_proj.weight", "self_attn.q_proj.weight"})
    (pattern,) = [entry.removeprefix("re:") for entry in ignore if re.search(r"layers.{1,2}2", entry)]
    for name in ("model.layers.2.eh_proj", "model.layers.2.mlp.experts", "layers.2.self_attn.qkv_proj"):
        assert re.match(pattern, name), name
    for name in ("model.layers.0.mlp.gate_up_proj", "model.layers.20.mlp.gate_up_proj"):
        assert not re.match(pattern, name), name


def test_draft_layers_of_remote_code_are_untouched(text: Path, tmp_path: Path) -> None:
    """MiMo's are modules beside the decoder's, which vLLM calls as if they came after them."""
    make(MODELS["MiMo with MTP"], tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text, sparsity=0.5, trust_remote_code=True)
    verify(tmp_path / "out", trust_remote_code=True)
    # Nor would `heal` train them, whose norms get no gradient on text.
    pruned = SourceModel(str(tmp_path / "out"), True, as_stored=True)
    trained = trained_names(pruned, open_checkpoint(tmp_path / "out"), Train.ALL)
    assert "model.layers.1.input_layernorm.weight" in trained
    assert not [name for name in trained if "mtp_layers" in name]
    ignore = require_untouched(tmp_path, "model.mtp_layers.0.", {"input_proj.weight", "mlp.up_proj.weight"})
    patterns = [entry.removeprefix("re:") for entry in ignore if entry.startswith("re:")]
    for name in ("model.mtp_layers.0.input_proj", "model.layers.2.mlp.gate_up_proj", "model.layers.2.self_attn.o_proj"):
        assert [pattern for pattern in patterns if re.match(pattern, name)], name
    for name in ("model.layers.1.mlp.gate_up_proj", "model.layers.20.mlp.gate_up_proj"):
        assert not [pattern for pattern in patterns if re.match(pattern, name)], name


def remote(llama: Path, folder: Path) -> Path:
    """A model whose code lies beside its weights."""
    shutil.copytree(llama, folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_remote_code_runs_only_where_it_is_trusted(llama: Path, text: Path, tmp_path: Path) -> None:
    model = remote(llama, tmp_path / "model")
    with pytest.raises(SpenseError, match="its code comes with the model; --trust-remote-code runs it"):
        run(model, tmp_path / "out", text)
    run(model, tmp_path / "out", text, trust_remote_code=True)
    verify(tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "out/modeling_own.py").read_bytes() == (model / "modeling_own.py").read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"


def test_an_adapter_does_not_travel_along(llama: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text("{}")
    run(tmp_path / "model", tmp_path / "out", text)
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_a_checkpoint_of_the_model_without_its_head(llama: Path, text: Path, tmp_path: Path) -> None:
    """As `AutoModel.save_pretrained` writes it: names without `model.`, and no head. By default it cannot write text,
    and nothing says which channels matter."""
    shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(llama / "model.safetensors")
    bare = {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    run(tmp_path / "model", tmp_path / "named", text)
    said: list[str] = []
    options: dict[str, Any] = {"samples": 8, "length": 64, "tune_steps": 2, "device": "cpu"}
    prune(PruneSettings(str(tmp_path / "model"), tmp_path / "out", **options), say=said.append)
    found = [line for line in said if "because the dense model has no way to generate text" in line]
    assert len(found) == said.count("tuning weighs all channels alike, because the model has no output head") == 1
    verify(tmp_path / "out")
    names = set(SafetensorsReader(tmp_path / "out"))
    assert {name for name in names if not name.endswith("_scale")} == set(bare)
