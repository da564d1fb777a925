"""The card in a checkpoint: what it says, what becomes of the original's, and what `spense evaluate` adds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from runs import contents, run

from offline_prune.checkpoint.model_card import FILE, ORIGINAL, public_name, write_measured
from offline_prune.pipeline import prune
from offline_prune.settings import PruneSettings

CARD = """---
license: apache-2.0
license_link: https://example.com/LICENSE
tags: [chat]
---
# The original

Ask it anything.
"""


@pytest.fixture(scope="module")
def model(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "own-model"
    shutil.copytree(llama, folder)
    (folder / FILE).write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def out(model: Path, text: Path) -> Path:
    run(model, model.parent / "out", text)
    return model.parent / "out"


def test_the_card_says_what_the_checkpoint_is(out: Path, text: Path) -> None:
    card = (out / FILE).read_text()
    data = ModelCard(card).data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "license_link": "https://example.com/LICENSE",
        "base_model": "own-model",
        "library_name": "vllm",
        "tags": ["spense", "sparse", "fp8", "compressed-tensors"],
    }
    for words in (
        "# own-model, pruned by Spense",
        "vllm serve . --quantization spense",
        "| method | spensegpt+ |",
        "| MLP sparsity | 37.50% (dense ratio 0.25) |",
        "| regions | sparse 96 + dense 32 = 128 |",
        "8 × 64 tokens, seed 0",
        "damping=0.01",
        "| gate | 37.",
    ):
        assert words in card, words
    assert str(out) not in card


def test_the_original_card_is_kept(out: Path) -> None:
    assert (out / ORIGINAL).read_text() == CARD
    assert f"]({ORIGINAL})" in (out / FILE).read_text()


def test_equal_runs_write_equal_cards(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "again", text)
    assert contents(tmp_path / "again") == contents(out)


def test_overwrite_replaces_both_cards(llama: Path, model: Path, text: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", text)
    run(llama, tmp_path / "out", text, overwrite=True, quantize="none")
    assert not (tmp_path / "out" / ORIGINAL).exists()
    card = (tmp_path / "out" / FILE).read_text()
    assert "Spense does not serve them" in card
    assert ORIGINAL not in card
    assert "license" not in card


@pytest.mark.parametrize("front", ["---\nlicense: [\n---\n", "---\n- license\n---\n"])
def test_front_matter_that_cannot_be_read_is_said(front: str, llama: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / FILE).write_text(front)
    said: list[str] = []
    settings = PruneSettings(
        str(tmp_path / "model"), tmp_path / "out", "magnitude", calibration=str(text), samples=1, length=8, device="cpu"
    )
    prune(settings, say=said.append)
    assert [line for line in said if line.startswith(f"{tmp_path / 'model' / FILE}: its front matter cannot be read")]
    assert (tmp_path / "out" / ORIGINAL).read_text() == front


def test_a_model_is_named_without_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B/snapshots/abc"
    snapshot.mkdir(parents=True)
    assert public_name("Qwen/Qwen3-8B", snapshot) == "Qwen/Qwen3-8B"
    assert public_name(str(snapshot), snapshot) == "Qwen/Qwen3-8B"
    monkeypatch.chdir(snapshot.parent)
    assert public_name(".", Path(".")) == "Qwen/Qwen3-8B"
    monkeypatch.chdir(tmp_path)
    assert public_name(".", Path(".")) == tmp_path.name


def test_what_is_measured_again_replaces_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_bytes("# Mine\r\n\r\n\\1 ünd\r\n".encode())
    write_measured(tmp_path, ["| 1 |"])
    first = file.read_bytes()
    assert first.startswith("# Mine\r\n\r\n\\1 ünd\n\n<!-- spense evaluate -->\n| 1 |\n".encode())
    file.write_bytes(first + b"\nAnd more.\n")
    write_measured(tmp_path, [r"| \g<0> |", "2"])
    text = file.read_text()
    assert "| 1 |" not in text
    assert text.endswith("| \\g<0> |\n2\n<!-- end of spense evaluate -->\n\nAnd more.\n")
    assert text.count("<!-- spense evaluate -->") == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_card_that_is_missing_is_made(tmp_path: Path) -> None:
    write_measured(tmp_path, ["| 1 |"])
    assert (tmp_path / FILE).read_text() == "<!-- spense evaluate -->\n| 1 |\n<!-- end of spense evaluate -->\n"


def test_a_card_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(OSError, match="directory"):
        write_measured(tmp_path, ["| 1 |"])
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
