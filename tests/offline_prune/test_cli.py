"""The `spense` command as a user meets it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import run
from tiny_models import tiny_model

from offline_prune import cli
from offline_prune.cli import PRUNE_EXTRA
from vllm_spense.errors import SpenseError
from vllm_spense.format import SIDECAR


def spense(*arguments: object, module: str = "offline_prune.cli") -> subprocess.CompletedProcess[str]:
    code = f"import sys; from {module} import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "300"})


Spense = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def _unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command changes in its process is as it was after the test."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in ("OMP_WAIT_POLICY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def spense_here(_unchanged: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spense:
    """The command in this process, which has long imported what a new one needs ten seconds for."""
    # A temporary folder's name would break the lines of a table, a longer one elsewhere.
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        assert isinstance(end.value.code, int)
        return subprocess.CompletedProcess(arguments, end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def out(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    options = ["--calibration", text, "--samples", 8, "--length", 64, "--device", "cpu", "--quantize", "none"]
    result = spense("prune", llama, out, *options)
    assert result.returncode == 0, result.stderr
    assert "GiB" in result.stderr
    assert "37.5" in result.stdout
    assert (out / SIDECAR).exists()
    return out


def test_verify(out: Path, spense_here: Spense) -> None:
    result = spense_here("verify", out)
    assert result.returncode == 0
    assert "2 MLPs: sparse regions 2:4" in result.stdout


def test_a_signal_that_comes_out_of_c_code_as_something_else_is_no_traceback() -> None:
    code = """
import os, signal, sys
import offline_prune.cli as cli

# Ignored in the background jobs of a shell, and so by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

def app(arguments):
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    except KeyboardInterrupt:
        pass
    raise ValueError("could not determine the shape")

cli.app = app
cli.main([])
"""
    for name, status in (("SIGTERM", 130), ("SIGINT", 130), ("SIGURG", 1)):
        result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60)
        assert result.returncode == status
        assert ("Traceback" in result.stderr) == (status == 1)


def test_inspect(out: Path, spense_here: Spense) -> None:
    result = spense_here("inspect", out)
    assert result.returncode == 0
    for words in ("spensegpt+", "sparse 96 + dense 32 = 128", "37.50%", "8 × 64 tokens", "research only"):
        assert words in result.stdout


def test_evaluate(out: Path, llama: Path, text: Path, tmp_path: Path, spense_here: Spense) -> None:
    pruned = shutil.copytree(out, tmp_path / "pruned")
    card = pruned / "README.md"
    before = card.read_text()
    sizes = ("--samples", 2, "--length", 32, "--device", "cpu")
    command = ("evaluate", pruned, "--against", llama, "--text", text, *sizes)
    result = spense_here(*command, "--json", tmp_path / "found.json", "--no-card")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["model", "pruned", "method", "device", "domains", "versions"]
    assert (found["model"], found["pruned"], found["method"]) == (str(llama), str(pruned), "spensegpt++")
    (loss,) = found["domains"]
    assert (loss["domain"], loss["sequences"], loss["length"]) == ("text", 2, 32)
    assert list(loss)[3:] == ["perplexity_model", "perplexity_pruned", "kl", "top1_agreement"]
    assert loss["kl"] > 0
    for shown in ("text", "2 × 32", f"{loss['perplexity_pruned']:.3f}", f"{loss['kl']:.4f}"):
        assert shown in result.stdout
    assert card.read_text() == before

    for _ in range(2):
        result = spense_here(*command)
        assert f"written into {card}" in result.stderr
        section = card.read_text().removeprefix(before.rstrip())
        assert section.count("## What pruning cost") == 1
        assert f"| text | 2 × 32 | {loss['perplexity_model']:.3f} | {loss['perplexity_pruned']:.3f} |" in section
        assert f"against `{llama.name}`" in section
        assert str(llama.parent) not in section

    card.unlink()
    card.mkdir()
    result = spense_here(*command)
    assert result.returncode == 0
    assert f"{loss['kl']:.4f}" in result.stdout
    assert [line for line in result.stderr.splitlines() if line.startswith(f"{card}: not written: ")]


def test_evaluate_leaves_the_card_of_a_plain_model_alone(
    llama: Path, text: Path, tmp_path: Path, spense_here: Spense
) -> None:
    plain = shutil.copytree(llama, tmp_path / "plain")
    result = spense_here("evaluate", plain, "--against", llama, "--text", text, "--samples", 1, "--length", 16)
    assert result.returncode == 0
    assert f"{plain}: not a Spense checkpoint; it is compared as it is" in result.stderr
    assert not (plain / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", "/no/such/model", "/tmp/never"), "error: /no/such/model: no such folder"),
        (("prune", "/no/such/model", "/tmp/never", "--sparsity", "0.7"), "error: --sparsity: found 0.7"),
        (("prune", "/no/such/model", "/tmp/never", "--sparsity", "much"), "Invalid value for '--sparsity'"),
        (("prune", "/no/such/model", "/tmp/never", "--sparsty", "0.3"), "No such option"),
        (("verify", "/no/such/folder"), "error: /no/such/folder: no such folder"),
        (("inspect", "/no/such/folder"), "error: /no/such/folder: no such folder"),
        (("heal", "/no/such/folder", "/tmp/never", "--teacher", "x"), "error: /no/such/folder: no such folder"),
        (("adapt", "/no/such/folder", "x", "/tmp/never"), "error: /no/such/folder: no such folder"),
        (("evaluate", "/no/such", "--against", "/no/such/model"), "error: /no/such/model: no such folder"),
        (("evaluate", "/no/such"), "Missing option '--against'"),
        (("evaluate", "x", "--against", "y", "--json", "/no/such/x.json"), "error: --json: /no/such: no such folder"),
        (("verify", __file__), "test_cli.py: found a file, expected the folder of a Hugging Face model"),
    ],
)
def test_mistakes_end_in_one_message(arguments: tuple[str, ...], words: str, spense_here: Spense) -> None:
    result = spense_here(*arguments)
    assert result.returncode != 0
    assert words in " ".join(result.stderr.split())


@pytest.mark.usefixtures("_unchanged")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model", "/tmp/never"], "error: /no/such/model: no such folder"),
        (["prune", "/no/such/model", "/tmp/never"], "error: /no/such/model: no such folder"),
        (["verify", "/no/such/checkpoint"], "error: /no/such/checkpoint: no such folder"),
    ],
)
def test_python_m_offline_prune_is_spense_and_prunes_by_itself(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["offline_prune", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("offline_prune", run_name="__main__")
    assert end.value.code == 1
    assert words in capsys.readouterr().err


def test_without_the_extra_for_pruning_a_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; from offline_prune.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "prune", str(tmp_path), str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "transformers is not installed; pip install 'vllm-spense[prune]'" in found.stderr.replace("\n", " ")
    assert "Traceback" not in found.stderr


def test_the_extra_for_pruning_is_what_the_commands_take_it_for() -> None:
    setup = ast.parse((Path(__file__).resolve().parents[2] / "setup.py").read_text(encoding="utf-8"))
    (extras,) = (
        word.value for word in ast.walk(setup) if isinstance(word, ast.keyword) and word.arg == "extras_require"
    )
    packages = {requirement.partition(">=")[0] for requirement in ast.literal_eval(extras)["prune"]}
    imported = {name: name.replace("-", "_") for name in packages} | {"pillow": "PIL"}
    assert set(imported.values()) == PRUNE_EXTRA


#: As rich would read them: a style, a closing tag of nothing, an emoji, a link.
ODD = ["run[v2]", "run[/x]out", ":smile: [link=http://x]", "[bold]"]


@pytest.mark.parametrize("odd", ODD)
def test_names_are_not_markup(odd: str, out: Path, tmp_path: Path, spense_here: Spense) -> None:
    folder = tmp_path / odd
    shutil.copytree(out, folder)
    annotation = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps({**annotation, "method": {**annotation["method"], "name": odd}}))
    said = spense_here("verify", folder)
    assert said.stdout.startswith(f"{folder}: good"), said.stderr
    said = spense_here("inspect", folder)
    assert said.returncode == 0, said.stderr
    assert str(folder) in said.stdout
    assert re.search(rf"method +│? *{re.escape(odd)} ", said.stdout)
    said = spense_here("verify", tmp_path / "missing" / odd)
    assert f"{tmp_path / 'missing' / odd}: no such folder" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_run_to_an_odd_name_ends_well(tmp_path: Path, llama: Path, text: Path, spense_here: Spense) -> None:
    out = tmp_path / "run[/x]out [red]:smile:"
    options = ["--calibration", text, "--samples", 8, "--length", 64, "--device", "cpu"]
    result = spense_here("prune", llama, out, *options)
    assert result.returncode == 0, result.stderr
    assert "run[/x]out [red]:smile:" in " ".join(result.stdout.split())
    assert (out / "config.json").exists()
    assert f"vLLM will serve it with LlamaForCausalLM; `spense verify '{out}' --serving` proves it" in result.stderr
    again = spense_here("prune", llama, out, *options)
    assert f"error: {out}: the folder is not empty" in again.stderr


def test_help_shows_five_options_first_and_research_ones_apart() -> None:
    panels = re.split("^╭─ ", spense("prune", "--help").stdout, flags=re.MULTILINE)
    options = {panel.partition(" ─")[0]: re.findall(r"^│ (--[\w-]+)", panel, re.MULTILINE) for panel in panels}
    assert options["Options"] == ["--sparsity", "--method", "--calibration", "--samples", "--length", "--help"]
    (research,) = (names for title, names in options.items() if title.startswith("Research"))
    assert {"--selection", "--tune-rate", "--damping", "--layout"} <= set(research)


def test_help_keeps_what_is_in_brackets() -> None:
    assert "[default: the method's]" in spense("prune", "--help").stdout


def test_a_log_gets_a_line_for_every_tenth_of_the_blocks(tmp_path: Path, text: Path) -> None:
    """And no bars, nor those of transformers."""
    model = tiny_model("llama4 with a plain layer", tmp_path / "model", num_hidden_layers=24, moe_layers=[*range(23)])
    options = ["--calibration", text, "--samples", 2, "--length", 16, "--device", "cpu", "--skip-unsupported"]
    result = spense("prune", model, tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    pruned = [line for line in lines if line.startswith("pruned ")]
    assert len(pruned) == 10
    assert re.fullmatch(r"pruned model\.layers\.23, 24 of 24 blocks, after [0-9:]+", pruned[-1])
    assert "\r" not in result.stderr
    assert "Loading weights" not in result.stderr
    assert "it/s" not in result.stderr


def test_a_terminal_gets_a_bar(tmp_path: Path, llama: Path, text: Path) -> None:
    ours, theirs = pty.openpty()
    code = "import sys; from offline_prune.cli import main; main(sys.argv[1:])"
    options = ["--calibration", str(text), "--samples", "2", "--length", "16", "--device", "cpu"]
    command = [sys.executable, "-c", code, "prune", str(llama), str(tmp_path / "out"), *options]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        said = b""
        # The other end's closing is an error here.
        with contextlib.suppress(OSError):
            while chunk := os.read(ours, 1 << 16):
                said += chunk
    os.close(ours)
    assert process.returncode == 0, said
    assert "━" in said.decode()
    assert b"2/2" in said


@pytest.mark.parametrize("relation", ["same", "inside", "around"])
def test_model_is_never_written_into(relation: str, tmp_path: Path, llama: Path, text: Path) -> None:
    model = shutil.copytree(llama, tmp_path / "around/model")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = {"same": model, "inside": model / "new", "around": tmp_path / "around"}[relation]
    with pytest.raises(SpenseError, match="expected folders of which neither holds the other"):
        run(model, out, text, overwrite=True)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]
