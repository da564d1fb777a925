"""A user's typo in a benchmark's command line is one clear line before anything is measured."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.command_line import at_least, mlp_sparsity, readable_folder, result_file, run_main, writable_folder
from benchmarks.envelope import ROOT, write_result
from vllm_spense.errors import SpenseError

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))}
#: What a value of each option cannot be: a folder, a file, or nothing.
WRONG = {
    "--out": ("folder", "found a folder, expected a file"),
    "--work": ("file", "found no folder, expected one to write into"),
    "--folder": ("file", "found no folder, expected one to write into"),
    "--texts": ("missing", "cannot be read as a folder"),
    "--task-folder": ("missing", "cannot be read as a folder"),
    "--model": ("missing", "cannot be read as a folder"),
    "--models": ("missing", "expected a folder or one of"),
}
#: Module, option: `add_out` and `add_data_options` add theirs to several.
CASES = [
    (module, option)
    for module, source in SOURCES.items()
    for option in WRONG
    if f'add_argument("{option}"' in re.sub(r"\(\s+", "(", source)
    or (option == "--out" and "add_out(parser" in source)
    or (option in ("--texts", "--models") and "add_data_options(parser" in source)
    if module != "command_line"
]
#: Folders that are positional.
POSITIONAL = {"make_shape": ["tiny"], "texts": [], "tiny_moe": [], "tasks": []}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    return {name: tmp_path / name for name in ("folder", "file", "missing")}


def said(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a program that refuses its arguments."""
    if module in ("gemm_sweep", "gemm_clocks"):
        pytest.importorskip("nvmath", reason="needs NVIDIA's libraries")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{module}").main()
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_all_path_options_are_found() -> None:
    assert len(CASES) >= 30
    assert {option for _, option in CASES} == {*WRONG}


@pytest.mark.parametrize("module", SOURCES)
def test_no_path_is_taken_unchecked(module: str) -> None:
    lines = [line for line in SOURCES[module].splitlines() if re.search(r"type=(Path|File)\b", line)]
    # Hidden, for a process of its own; and a program, which matters only where it is run.
    assert all("argparse.SUPPRESS" in line or '"--peer"' in line for line in lines)


@pytest.mark.parametrize(("module", "option"), CASES)
def test_every_path_option_is_checked(
    module: str,
    option: str,
    paths: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, words = WRONG[option]
    line = said(module, [option, str(paths[kind])], monkeypatch, capsys)
    assert str(paths[kind]) in line
    assert words in line


@pytest.mark.parametrize("module", POSITIONAL)
def test_folders_that_are_positional_are_checked(
    module: str, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(module, [*POSITIONAL[module], str(paths["file"])], monkeypatch, capsys)
    assert f"{paths['file']}: " in line


@pytest.mark.parametrize("option", ["--texts", "--model", "--work", "--out", "--folder"])
def test_paths_that_suit_are_taken(option: str, tmp_path: Path) -> None:
    check = {"--work": writable_folder, "--folder": writable_folder, "--out": result_file}.get(option, readable_folder)
    assert check(str(tmp_path) + ("/x.json" if option == "--out" else "")) == (
        tmp_path / "x.json" if option == "--out" else tmp_path
    )
    if option not in ("--texts", "--model"):
        assert check(str(tmp_path / "a/b/c")) == tmp_path / "a/b/c"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("check", [writable_folder, result_file])
def test_what_cannot_be_written_is_refused(check: object, paths: dict[str, Path]) -> None:
    assert callable(check)
    for path in (paths["file"] / "inside", paths["file"] / "far/inside", Path("/proc/spense/x"), paths["file"]):
        with pytest.raises(argparse.ArgumentTypeError):
            check(str(path))
    (paths["folder"] / "link").symlink_to(paths["missing"])
    with pytest.raises(argparse.ArgumentTypeError):
        check(str(paths["folder"] / "link"))
    with pytest.raises(argparse.ArgumentTypeError, match="File name too long"):
        check("x" * 300)
    assert paths["file"].read_text() == "mine"


def test_only_result_files_are_replaced(tmp_path: Path) -> None:
    """A run that was cut off while it wrote, and a file of something else, are not read as results, nor lost."""
    file = tmp_path / "x.json"
    write_result(file, "x", [{"a": 1}])
    before = file.read_text()
    assert result_file(str(file)) == file
    assert file.read_text() == before
    for text in (before[:20], json.dumps({"model_type": "llama"}), "[1]", "\udcff"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(argparse.ArgumentTypeError, match="found a file that no benchmark wrote"):
            result_file(str(file))
    with pytest.raises(argparse.ArgumentTypeError, match="a picture goes beside it"):
        result_file(str(tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("decode_speed", ["--batches", "8", "0"], "argument --batches: found 0, expected at least 1"),
        ("decode_speed", ["--batches", "many"], "argument --batches: found many, expected a whole number"),
        ("decode_speed", ["--steps", "7"], "--steps: found 7, expected at least 8"),
        ("decode_speed", ["--capture", "16"], "--capture: found 16, expected at least 512"),
        ("decode_speed", ["--sparsities", "37.5"], "--sparsities: found 37.5, expected a number from 0 to 0.5"),
        ("decode_speed", ["--dense-url", "http://localhost"], "--dense-url: found no --url"),
        ("serve_load", ["--sparsities", "nan"], "--sparsities: found nan, expected a number from 0 to 0.5"),
        ("serve_load", ["--sparsities", "0"], "--sparsities: found [0.0], expected above 0"),
        ("mma_limits", ["--steps", "14"], "--steps: found 14, expected a multiple of 6"),
        ("layer_timeline", ["--tokens", "-1"], "--tokens: found -1, expected at least 1"),
        ("peers", ["--peer", "no/such/python"], "--peer: found no program no/such/python, which llmcompressor"),
        ("tiny_moe", ["out", "--steps", "0"], "--steps: found 0, expected at least 1"),
        ("soak", ["--model", ".", "--random"], "--random: not allowed with argument --model"),
        ("zoo", ["llamma"], "found llamma, which transformers does not know"),
        ("zoo", ["--part", "3/2"], "--part: found 3/2, expected N/OF with N from 1 to OF"),
        ("zoo", ["--part", "2"], "--part: found 2, expected N/OF"),
        ("served", ["llamma"], "found llamma, expected names from "),
    ],
)
def test_other_typos(
    module: str,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in said(module, arguments, monkeypatch, capsys)


def test_numbers() -> None:
    assert at_least(0)("0") == 0
    assert mlp_sparsity("0.375") == 0.375
    for text in ("0.6", "-0.1", "nan", "half"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"found {text}, expected a number from 0 to 0.5"):
            mlp_sparsity(text)


def test_errors_of_a_program_are_one_line() -> None:
    def fail() -> None:
        raise SpenseError("x.json: wrong")

    with pytest.raises(SystemExit, match=r"^x\.json: wrong$"):
        run_main(fail)
    with pytest.raises(SystemExit, match="returned non-zero exit status 1"):
        run_main(lambda: subprocess.run(["false"], check=True))  # type: ignore[arg-type, return-value]
    # What nobody foresaw keeps its traceback.
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("module", ["expert_gemm", "expert_mixture", "gemm_sweep", "layer_breakdown", "mma_limits"])
def test_without_a_gpu_one_line_says_so(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if module in ("gemm_sweep", "gemm_clocks"):
        pytest.importorskip("nvmath", reason="needs NVIDIA's libraries")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module, "--out", str(tmp_path / "x.json")])
    with pytest.raises(SpenseError, match="this measures an NVIDIA GPU, and torch sees none"):
        importlib.import_module(f"benchmarks.{module}").main()
