"""`spense adapt`: what an adapter does to the original, its rewritten form does to the pruned model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, merge, write_adapter
from runs import Cut, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, INTERMEDIATE, LAYERS, tiny_model

from offline_prune.checkpoint.adapter import CONFIG, WEIGHTS, adapt
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.checkpoint.permutations import read_permutations
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.cli import main
from vllm_spense.errors import FormatError, SpenseError
from vllm_spense.format import PERMUTATION

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
FIRST = "model.layers.0.mlp"
SPARSE = 96
LAYER = f"{PREFIX}model.layers.1.mlp"


@pytest.fixture(scope="module", params=["llama with biases", "phi3"])
def pair(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what became of it; gate and up apart, and in one tensor."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_model(request.param, folder / "model")
    run(model, folder / "pruned", text)
    return model, folder / "pruned"


@pytest.fixture(scope="module")
def pruned(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    run(llama, out, text)
    return out


def permutations_of(pruned: Path) -> dict[str, torch.Tensor]:
    found = read_permutations(pruned, open_checkpoint(pruned).annotation)
    assert found is not None
    return found


def reordered(model: torch.nn.Module, orders: dict[str, torch.Tensor]) -> torch.nn.Module:
    """With each MLP's intermediate indices in another order."""
    for name, order in orders.items():
        for leaf, layer in model.get_submodule(name).named_children():
            if isinstance(layer, torch.nn.Linear):
                if leaf == "down_proj":
                    layer.weight.data = layer.weight[:, order]
                    continue
                rows = torch.cat([order + first for first in range(0, layer.out_features, len(order))])
                layer.weight.data = layer.weight[rows]
                if layer.bias is not None:
                    layer.bias.data = layer.bias[rows]
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=tokens).logits


def closest(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For each row the one among others that points the same way most nearly."""
    normalize = torch.nn.functional.normalize
    return (normalize(rows) @ normalize(others).T).argmax(1)


def test_the_record_is_how_weights_moved(pair: tuple[Path, Path]) -> None:
    """Whatever pruning does to a row, of the original's rows it stays most like its own."""
    model, pruned = (load_dense(folder)[0] for folder in pair)
    orders = permutations_of(pair[1])
    assert set(orders) == {f"model.layers.{i}.mlp" for i in range(LAYERS)}
    for name, order in orders.items():
        assert not torch.equal(order, torch.arange(INTERMEDIATE))
        first = next(leaf for leaf, _ in model.get_submodule(name).named_children() if leaf.startswith("gate"))
        found, original = (m.get_parameter(f"{name}.{first}.weight")[:INTERMEDIATE] for m in (pruned, model))
        assert torch.equal(closest(found, original), order)
        found, original = (m.get_parameter(f"{name}.down_proj.weight").T for m in (pruned, model))
        # Of a column, unlike a row, 2:4 may leave next to nothing.
        assert torch.equal(closest(found[SPARSE:], original), order[SPARSE:])


@pytest.mark.parametrize("weights", ["dense", "pruned"])
@pytest.mark.parametrize("form", [{}, {"dora": True}, {"bias": True}], ids=["plain", "dora", "bias"])
def test_the_pruned_model_with_the_adapted_adapter_is_the_original_with_the_original_one(
    pair: tuple[Path, Path], weights: str, form: dict[str, bool], tmp_path: Path
) -> None:
    """For the original's weights in the pruned model's order, and for the pruned weights in the original's order."""
    orders = permutations_of(pair[1])
    backwards = {name: order.argsort() for name, order in orders.items()}
    before, after = (load_dense(pair[0 if weights == "dense" else 1], dtype=torch.float64)[0] for _ in range(2))
    if weights == "dense":
        reordered(after, orders)
    else:
        reordered(before, backwards)
    plain = logits(before)
    assert torch.allclose(plain, logits(after), rtol=0, atol=1e-4)

    adapter = write_adapter(tmp_path / "adapter", before, [*ATTENTION, *MLP, "gate_up_proj"], **form)
    adapt(adapter, pair[1], tmp_path / "adapted")
    wrong = load_dense(pair[0 if weights == "dense" else 1], dtype=torch.float64)[0]
    if weights == "dense":
        reordered(wrong, orders)
    merge(before, adapter)
    merge(after, tmp_path / "adapted")
    merge(wrong, adapter)
    expected = logits(before)
    assert (expected - plain).abs().max() > 1
    assert torch.allclose(logits(after), expected, rtol=0, atol=1e-4)
    assert (logits(wrong) - expected).abs().max() > 0.5


def test_everything_else_stays_as_it_was(pruned: Path, llama: Path, tmp_path: Path) -> None:
    model = load_dense(llama)[0]
    adapter = write_adapter(tmp_path / "adapter", model, [*ATTENTION, *MLP], rank_pattern={"q_proj": 8})
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "optimizer.pt").write_bytes(b"much")
    tensors = load_file(adapter / WEIGHTS)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.randn(8, 258).half()
    tensors[f"{PREFIX}lm_head.weight"] = torch.randn(258, HIDDEN).bfloat16()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    result = adapt(adapter, pruned, tmp_path / "out")
    assert (result.tensors, result.moved) == (len(tensors), 3 * LAYERS)
    adapted = load_file(tmp_path / "out" / WEIGHTS)
    assert adapted.keys() == tensors.keys()
    orders = permutations_of(pruned)
    for name, tensor in tensors.items():
        expected = tensor
        if ".mlp." in name and ("down_proj.lora_A" in name or "lora_B" in name.replace("down_proj.lora_B", "")):
            order = orders[name.removeprefix(PREFIX).rpartition(".mlp.")[0] + ".mlp"]
            expected = tensor[:, order] if "lora_A" in name else tensor[order]
            assert not torch.equal(expected, tensor)
        assert adapted[name].dtype == tensor.dtype
        assert torch.equal(adapted[name], expected)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config == json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(pruned)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        CONFIG,
        WEIGHTS,
        "tokenizer_config.json",
        "report.jsonl",
    }


def test_attention_alone_needs_no_permutation(pruned: Path, llama: Path, tmp_path: Path) -> None:
    old = shutil.copytree(pruned, tmp_path / "old")
    (old / PERMUTATION).unlink()
    verify(old)
    model = load_dense(llama)[0]
    adapter = write_adapter(tmp_path / "attention", model, ATTENTION)
    assert adapt(adapter, old, tmp_path / "out").moved == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    with pytest.raises(SpenseError, match=f"no {PERMUTATION}; an older version .* Prune the original"):
        adapt(write_adapter(tmp_path / "mlp", model, MLP), old, tmp_path / "second")


def setting(**settings: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(config | settings))

    return change


def tensor(name: str, *shape: int, instead_of: str = "") -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        tensors.pop(instead_of, None)
        save_file(tensors | {name: torch.zeros(shape)}, adapter / WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda adapter: (adapter / CONFIG).unlink(), "no adapter_config.json; expected the folder of a PEFT adapter"),
        (lambda adapter: (adapter / CONFIG).write_text("{"), "adapter_config.json"),
        (setting(peft_type="LOHA"), "peft_type: found LOHA, expected LORA"),
        (setting(layer_replication=[[0, 2]]), r"layer_replication: found \[\[0, 2\]\], which cannot be adapted"),
        (setting(init_lora_weights="pissa"), "init_lora_weights: found pissa, which changes the weights"),
        (
            lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"),
            "found adapter_model.bin, expected adapter_model.safetensors",
        ),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(b"short"), "a weight file is damaged"),
        (
            tensor(f"{LAYER}.up_proj.lora_B.weight", INTERMEDIATE + 32, 8),
            r"up_proj.lora_B.weight: found the shape \(160, 8\), expected 128 in dimension 0",
        ),
        (tensor(f"{LAYER}.down_proj.lora_A.weight", 8), r"found the shape \(8,\)"),
        (tensor(f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight", 8, 1), "expected 64 in dimension 1"),
        (
            tensor(f"{PREFIX}model.layers.7.mlp.up_proj.lora_B.weight", INTERMEDIATE, 8),
            r"model.layers.7.mlp.up_proj.lora_B.weight: .* has no layer of that name",
        ),
        (tensor(f"{LAYER}.gate_up_proj.lora_B.weight", 2 * INTERMEDIATE, 8), "has no layer of that name"),
        (
            tensor(f"{LAYER}.down_proj.weight", HIDDEN, INTERMEDIATE),
            r"down_proj.weight: found weight of a pruned layer, expected lora_A.weight \| lora_B.weight",
        ),
        (
            tensor(f"{LAYER}.down_proj.modules_to_save.weight", HIDDEN, INTERMEDIATE),
            "found weight of a pruned layer",
        ),
        (tensor(f"{LAYER}.up_proj.lora_C.weight", 8), "found lora_C.weight of a pruned layer"),
        (tensor(f"{LAYER}.act_fn.weight", 8), "in a pruned MLP and of none of its projections"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    change: Callable[[Path], object], words: str, pruned: Path, llama: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", load_dense(llama)[0], MLP)
    change(adapter)
    with pytest.raises(SpenseError, match=words):
        adapt(adapter, pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_and_folders_that_do_not_fit(pruned: Path, llama: Path, tmp_path: Path) -> None:
    said: list[str] = []
    model, _ = load_dense(llama)
    adapter = write_adapter(tmp_path / "adapter", model, MLP, base_model_name_or_path="somebody/another")
    with pytest.raises(SpenseError, match=r"no config\.json"):
        adapt(adapter, tmp_path, tmp_path / "out")
    with pytest.raises(FormatError, match="not a Spense checkpoint"):
        adapt(adapter, llama, tmp_path / "out")
    with pytest.raises(SpenseError, match="the folder is not empty"):
        adapt(adapter, pruned, adapter)
    adapt(adapter, pruned, tmp_path / "out", said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: the adapter was trained on somebody/another, and ")
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
    setting(base_model_name_or_path="somebody/another")(tmp_path / "out")
    with pytest.raises(SpenseError, match="already adapted to a pruned model"):
        adapt(tmp_path / "out", pruned, tmp_path / "twice")
    for number, base in enumerate((str(llama), f"somebody/{llama.name}")):
        setting(base_model_name_or_path=base)(adapter)
        adapt(adapter, pruned, tmp_path / f"{number}", said.append)
    assert len(said) == 1
    setting(base_model_name_or_path=str(pruned))(adapter)
    with pytest.raises(SpenseError, match="the pruned model itself, and fits it as it is"):
        adapt(adapter, pruned, tmp_path / "needless")


def test_the_command(
    pruned: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    adapter = write_adapter(tmp_path / "adapter", load_dense(llama)[0], MLP)
    for code, last in ((0, "6 of 12 tensors were reordered"), (1, "expected an empty one, or none")):
        with pytest.raises(SystemExit) as ended:
            main(["adapt", *map(str, (adapter, pruned, tmp_path / "out"))])
        assert ended.value.code == code
        assert last in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FIRST), rf"other modules .*found: nothing more; expected: \['{FIRST}'\]"),
        (lambda t: t.update(x=t[FIRST].clone()), r"other modules .*found: \['x'\]"),
        (lambda t: t[FIRST][:2].fill_(5), rf"not a permutation.*layer: {FIRST}; found: 12[67] different indices"),
        (lambda t: t[FIRST].add_(1), "not a permutation.*found: 128 different indices, from 1 to 128"),
        (lambda t: t.update({FIRST: t[FIRST].long()}), "wrong type or shape.*I64"),
        (lambda t: t.update({FIRST: t[FIRST][1:].clone()}), r"wrong type or shape.*127,"),
    ],
)
def test_verify_looks_at_the_permutations(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, pruned: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned, tmp_path / "edited")
    tensors = load_file(folder / PERMUTATION)
    change(tensors)
    save_file(tensors, folder / PERMUTATION)
    with pytest.raises(FormatError, match=words):
        verify(folder)


def test_methods_that_move_nothing_say_so(llama: Path, text: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "out", text, method="magnitude")
    assert all(torch.equal(order, torch.arange(INTERMEDIATE)) for order in permutations_of(tmp_path / "out").values())


@pytest.mark.parametrize("moved", range(5))
def test_a_run_cut_off_while_it_moves_files_is_ended_by_the_next(
    moved: int, pruned: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, left = write_adapter(tmp_path / "adapter", load_dense(llama)[0], MLP), moved
    (adapter / "tokenizer_config.json").write_text("{}")
    replace = os.replace

    def cut(source: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise Cut
        left -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(Cut):
            adapt(adapter, pruned, tmp_path / "out")
    adapt(adapter, pruned, tmp_path / "whole")
    adapt(adapter, pruned, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    found, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
