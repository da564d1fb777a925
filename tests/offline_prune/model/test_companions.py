"""What travels along with the weights, from a folder and from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from offline_prune.model.companions import companions
from offline_prune.model.safetensors_reader import resolve_model

TRAVEL = [
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "COPYING",
    "LICENSE",
    "LICENSE-MODEL",
    "LICENSES/MIT.txt",
    "Llama-LICENSE.txt",
    "NOTICE.md",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template_tools.jinja",
    "generation_config.json",
    "license.txt",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
CODE = ["configuration_own.py", "modeling_own.py"]
WEIGHTS = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json"]
STAY = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "original/params.json",
    "original/tokenizer.model",
    "params.json",
    "pytorch_model.bin",
    "training_args.bin",
    "weights.pth",
]


def folder_of(path: Path, names: list[str]) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json", None])
def test_what_travels_from_a_folder(config: str | None, tmp_path: Path) -> None:
    hidden = [".git/config.json", ".cache/x.json", ".hidden.json", "consolidated.safetensors.index.json"]
    own = ["spense.json", "report.json", "runs/1/2.json", "pytorch_model.bin.index.json"]
    model = folder_of(tmp_path, TRAVEL + CODE + WEIGHTS + STAY + hidden + own)
    if config:
        (model / config).write_text('{"auto_map": {"AutoConfig": "configuration_own.Config"}}')
    expected = TRAVEL + (CODE if config else [])
    assert list(map(str, companions(model))) == sorted(expected, key=Path)


def test_what_is_downloaded_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: str, allow_patterns: Any, ignore_patterns: Any) -> str:
        names = TRAVEL + CODE + WEIGHTS + STAY
        found = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        folder_of(tmp_path, list(found))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = resolve_model("some/model")
    found = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    # Its front matter says the licence, and it is kept beside the pruned model's own.
    assert found == {*TRAVEL, *CODE, *WEIGHTS, "README.md"}
