"""The script that runs llmcompressor: what it hands over, and where llmcompressor is installed, what it makes of it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from benchmarks.envelope import ROOT

SCRIPT = "benchmarks.baselines.llmcompressor_oneshot"
TOKENS = torch.randint(0, 256, (6, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imported without llmcompressor, whose modifiers only keep their settings here, and without `datasets`."""
    modules = {
        "llmcompressor": ["oneshot"],
        "llmcompressor.modifiers": ["Modifier"],
        "llmcompressor.modifiers.gptq": ["GPTQModifier"],
        "llmcompressor.modifiers.pruning": ["SparseGPTModifier", "WandaPruningModifier"],
    }
    for module, names in modules.items():
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        for name in names:
            setattr(sys.modules[module], name, SimpleNamespace)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, SCRIPT, raising=False)
    script = importlib.import_module(SCRIPT)
    # Nobody else shall find it.
    del sys.modules[SCRIPT]
    monkeypatch.setattr(script, "version", lambda name: "0.11")
    return script


def test_it_calibrates_on_each_sequence_in_order(
    script: ModuleType, llama: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(script, "oneshot", lambda **settings: given.update(settings))
    script.main(str(llama), str(tokens), "wanda", str(tmp_path / "out"))
    assert given["recipe"].mask_structure == "2:4"
    assert isinstance(given["dataset"], DataLoader)
    # llmcompressor looks at the first batch before it reads all.
    for _ in range(2):
        batches = list(given["dataset"])
        assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)
        assert torch.equal(torch.stack([batch["input_ids"] for batch in batches]), TOKENS[:, None])
        assert all(torch.equal(batch["attention_mask"], torch.ones(1, 48, dtype=torch.int64)) for batch in batches)
    dense, written = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert written.keys() == dense.keys()
    assert all(torch.equal(written[name], dense[name].to(torch.bfloat16)) for name in dense)


@pytest.mark.skipif(importlib.util.find_spec("llmcompressor") is None, reason="llmcompressor is not installed")
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "gptq-32"])
def test_what_llmcompressor_makes_of_it(method: str, llama: Path, tokens: Path, tmp_path: Path) -> None:
    file = ROOT / f"{SCRIPT.replace('.', '/')}.py"
    command = [sys.executable, file, llama, tokens, method, tmp_path / "out"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    dense, written = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert written.keys() == dense.keys()
    changed = {name for name in dense if not torch.equal(written[name], dense[name].to(torch.bfloat16))}
    linears = {name for name in dense if name.endswith("_proj.weight")}
    if method == "gptq-32":
        assert changed == linears
        assert max(len(group.unique()) for name in linears for group in written[name].view(-1, 32)) <= 16
    else:
        assert changed == {name for name in linears if ".mlp." in name}
        assert all(((written[name].unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all() for name in changed)
