"""The texts of the accuracy benchmark: that they are what they are called, and that all are there before it begins."""

from __future__ import annotations

import ast
import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import accuracy, peers, texts
from benchmarks.command_line import run_main
from offline_prune.calibration.heldout import HELDOUT
from offline_prune.calibration.python_text import LONGEST_CODE
from offline_prune.checkpoint.dense_model import load_dense
from vllm_spense.errors import SpenseError


def test_a_folder_written_here_is_read_as_what_is_installed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (texts.CALIBRATION, texts.CALIBRATION_CODE, *HELDOUT)
    few = {name: list(islice(texts.documents(name), 3)) for name in names}
    few[texts.HANDBOOK] = ["Read the fine manual. " * 20]
    monkeypatch.setattr(texts, "documents", lambda name: iter(few[name]))
    texts.write(tmp_path)
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(few)
    tokenizer = load_dense(llama)[1]
    for domain in texts.DOMAINS:
        here, there = (texts.heldout(domain, tokenizer, 2, 64, folder) for folder in (None, tmp_path))
        assert torch.equal(here, there)
    with pytest.raises(SpenseError, match=r"nowhere: found no reference\.jsonl; expected what `python"):
        texts.heldout("reference", tokenizer, 2, 64, tmp_path / "nowhere")


def test_code_is_code_and_the_reference_is_not() -> None:
    whole = (text for text in texts.documents(texts.CALIBRATION_CODE) if len(text) < LONGEST_CODE)
    for text in (*islice(texts.documents("code"), 5), *islice(whole, 5)):
        assert ast.get_docstring(ast.parse(text)) is None
    with pytest.raises(SyntaxError):
        ast.parse(next(texts.documents("reference")))


def test_a_page_of_the_handbook_is_its_paragraphs() -> None:
    page = """<title>No</title><h2 class="title">9.3. Rights</h2><div class="para">
\t\tEach file has <code class="literal">rights</code>:
\t</div><ul><li><div class="para">its owner <pre class="screen">$ ls</pre>(“<em>user</em>”);<div class="note">
\t<div class="para">and more &amp; more</div></div></div></li></ul><p>No</p><div class="para"> </div>"""
    assert texts.paragraphs(page) == "Each file has rights:\n\nits owner (“user”); and more & more"


def test_the_handbook_needs_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CACHE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpenseError, match=r"handbook: `apt-get download debian-handbook` does not work here: .*"):
        list(texts.documents(texts.HANDBOOK))
    assert not (tmp_path / "debian-handbook").exists()


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts that an older version wrote. It is not read: the test fails if a model is loaded."""

    def loaded(*_: object) -> None:
        raise AssertionError("loaded before all texts were found")

    for module in (accuracy, peers):
        monkeypatch.setattr(module, "load_dense", loaded)
    folder = tmp_path / "older"
    folder.mkdir()
    for name in (texts.CALIBRATION, *texts.DOMAINS):
        (folder / f"{name}.jsonl").touch()
    return folder


def given(monkeypatch: pytest.MonkeyPatch, folder: Path, *command: str | Path) -> None:
    """A command line with this folder of texts."""
    shared = ("--texts", folder, "--device", "cpu", "--out", folder / "x.json")
    monkeypatch.setattr(sys, "argv", ["x", *map(str, (*command, *shared))])


@pytest.mark.parametrize(
    ("module", "command", "missing"),
    [
        (accuracy, "--methods wanda --variants seed=1 calibration=generated,calibration=builtin-code", True),
        (accuracy, "--methods wanda --heal calibration=builtin-code", True),
        (accuracy, "--methods wanda --variants calibration=generated", False),
        (accuracy, "--methods dense --heal calibration=builtin-code", False),
        (peers, "--methods magnitude", False),
    ],
)
def test_a_folder_of_an_older_version_is_refused_if_the_command_reads_what_it_lacks(
    module: ModuleType, command: str, missing: bool, llama: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, older, *command.split(), "--models", llama)
    if missing:
        line = f"{older}: found no calibration-code.jsonl; expected what `python -m benchmarks.texts {older}` writes"
        with pytest.raises(SystemExit, match=f"^{re.escape(line)}$"):
            run_main(module.main)
    else:
        with pytest.raises(AssertionError, match="loaded before"):
            module.main()


@pytest.mark.parametrize("module", [accuracy, peers])
def test_all_texts_that_a_folder_lacks_are_named(
    module: ModuleType, llama: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, older, "--methods", "magnitude", "--domains", "code", "handbook", "--models", llama)
    for name in (texts.HANDBOOK, texts.CALIBRATION, "reference"):
        (older / f"{name}.jsonl").unlink()
    with pytest.raises(SpenseError, match=r"older: found no handbook\.jsonl, calibration\.jsonl; expected what `"):
        module.main()


def test_files_of_a_variant_are_missed_before_anything_is_measured(
    llama: Path, older: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = f"calibration={tmp_path}/{{model}}.txt,calibration={older}/code.jsonl,calibration=some/name"
    given(monkeypatch, older, "--methods", "wanda", "--variants", variant, "--models", llama, older)
    (tmp_path / f"{llama.name}.txt").touch()
    line = f"--variants, --heal: found no {tmp_path}/{older.name}.txt; expected files to calibrate on"
    with pytest.raises(SpenseError, match=f"^{re.escape(line)}$"):
        accuracy.main()
