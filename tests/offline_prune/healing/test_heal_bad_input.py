"""What `heal` refuses, and in which words."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_runs import Pair, healed, settings
from tiny_models import tiny_model

from offline_prune.healing import pipeline, plan
from offline_prune.runtime import distributed
from vllm_spense.errors import SpenseError

#: Options, in the order in which they are named together.
LESS_MEMORY = "--batch-tokens 64", "--checkpointing", "--optimizer adamw8bit"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "attention"}, "--train: found attention, expected mlp | all"),
        ({"optimizer": "sgd"}, "--optimizer: found sgd, expected adamw | adamw8bit"),
        ({"samples": 1}, "--samples: found 1, expected at least 2"),
        ({"step_tokens": 0}, "--step-tokens: found 0, expected at least 1"),
        ({"heldout": 0.0}, "--heldout: found 0, expected more than 0 and at most 0.5"),
        ({"rate": 2.0}, "--rate: found 2, expected more than 0 and at most 1"),
        ({"warm_up": 1.0}, "--warm-up: found 1, expected at least 0 and less than 1"),
        ({"save_minutes": -1.0}, "--save-minutes: found -1, expected at least 0"),
        ({"teacher": "/no/such/model"}, "/no/such/model: no such folder"),
        ({"samples": 9}, "expected at least 13, which is one step; or a smaller --step-tokens"),
        ({"samples": 4096}, "tokens, expected at least 262144 (4096 samples × 64)"),
        ({"calibration": "/no/such.txt"}, "/no/such.txt: no such file"),
    ],
)
def test_options(options: dict[str, Any], words: str, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SpenseError) as error:
        healed(pair, tmp_path / "out", **{"step_tokens": 768, **options})
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda folder: tiny_model("qwen2", folder), "architecture: found Qwen2ForCausalLM, expected LlamaForCausalLM"),
        (
            lambda folder: tiny_model("llama", folder, intermediate_size=192),
            "mlp.gate_proj.weight: found (192, 64), expected (128, 64)",
        ),
        (
            lambda folder: tiny_model("llama", folder, num_hidden_layers=1),
            "layers.1.self_attn.q_proj.weight: found nothing",
        ),
        (lambda folder: tiny_model("llama", folder, vocab_size=260), "found (260, 64), expected (258, 64)"),
        (lambda folder: _other_words(tiny_model("llama", folder)), "token '<end>': found 256, expected nothing"),
    ],
    ids=["architecture", "sizes", "layers", "vocabulary", "tokenizer"],
)
def test_another_teacher(other: Callable[[Path], Path], words: str, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SpenseError, match="not the model that") as error:
        healed(pair, tmp_path / "out", teacher=str(other(tmp_path / "teacher")))
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def _other_words(folder: Path) -> Path:
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<eos>", "<end>"))
    return folder


def test_a_text_that_is_not_there_is_missed_before_the_teacher_is_fetched(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(SpenseError, match=r"^no/such\.txt: no such file or folder$"):
        healed(pair, tmp_path / "out", teacher="some/model", calibration=("builtin", "no/such.txt"))
    assert not (tmp_path / "out").exists()


def test_folders(pair: Pair, tmp_path: Path, llama: Path) -> None:
    with pytest.raises(SpenseError, match="not a Spense checkpoint"):
        healed(Pair(llama, llama, pair.text), tmp_path / "out")
    with pytest.raises(SpenseError, match="already quantized and pruned by Spense"):
        healed(Pair(pair.pruned, pair.pruned, pair.text), tmp_path / "out")
    copy = shutil.copytree(pair.pruned, tmp_path / "pruned")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for out in (copy, copy / "inside"):
        with pytest.raises(SpenseError, match=r"OUT is .* and PRUNED .*: expected folders of which neither holds"):
            healed(Pair(pair.teacher, copy, pair.text), out, overwrite=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(SpenseError, match="the folder is not empty"):
        healed(pair, full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", [3, 6])
def test_ranks_that_cannot_be_paired_are_refused_before_anything_is_read(
    size: int, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: size)
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda folder: pytest.fail("PRUNED was read"))
    with pytest.raises(SpenseError) as error:
        healed(pair, tmp_path / "out")
    assert str(error.value) == f"--nproc-per-node: found {size}, expected a power of two"
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_one_line(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(SpenseError) as error:
        healed(pair, tmp_path / "out", optimizer="adamw8bit")
    assert str(error.value) == (
        "--optimizer: adamw8bit needs torchao, which is not installed; pip install '.[heal]' brings it, and "
        "adamw does without"
    )


def test_too_little_memory_names_what_would_fit(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one sequence at once, then for none."""
    needed: list[int] = []
    given = plan.usable_host()
    monkeypatch.setattr(plan, "usable_host", lambda: given)
    original = plan._Sizes.plan

    def noted(self: Any, settings: Any, ranks: int) -> Any:
        found = original(self, settings, ranks)
        needed.append(found.on_device)
        return found

    monkeypatch.setattr(plan._Sizes, "plan", noted)
    healed(pair, tmp_path / "small", batch_tokens=64)
    monkeypatch.setattr(plan, "usable_host", lambda: needed[0])
    with pytest.raises(SpenseError) as error:
        healed(pair, tmp_path / "out")
    assert "of memory usable, training needs" in str(error.value)
    assert "; --batch-tokens 64 would fit" in str(error.value)
    monkeypatch.setattr(plan, "usable_host", lambda: 1000)
    with pytest.raises(
        SpenseError, match="; neither --batch-tokens, --checkpointing, 8-bit moments nor 8 GPUs would do"
    ):
        healed(pair, tmp_path / "out")
    with pytest.raises(SpenseError, match=r"dense model needs .* while it writes the text of --calibration generated"):
        healed(pair, tmp_path / "out", calibration=None)
    assert not (tmp_path / "out").exists()


def test_all_that_needs_less_memory_is_named_alone_or_together(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: dict[frozenset[str], int] = {}
    original = plan._Sizes.plan

    def noted(self: Any, settings: Any, ranks: int) -> Any:
        found = original(self, settings, ranks)
        given = settings.batch_tokens == 64, settings.checkpointing, settings.optimizer == "adamw8bit"
        needed[frozenset(compress(LESS_MEMORY, given))] = found.on_device
        return found

    monkeypatch.setattr(plan._Sizes, "plan", noted)
    monkeypatch.setattr(plan, "usable_host", lambda: 1000)
    with pytest.raises(SpenseError, match="; neither --batch-tokens, --checkpointing, 8-bit moments nor 8 GPUs would"):
        healed(pair, tmp_path / "out", checkpointing=False)
    assert len(needed) == 8, "all of them, and each together with others"
    for room in sorted({*needed.values()})[:-1]:
        fitting = [names for names, size in needed.items() if size <= room]
        fewest = [names for names in fitting if not any(less < names for less in fitting)]
        monkeypatch.setattr(plan, "usable_host", partial(int, room))
        with pytest.raises(SpenseError) as error:
            healed(pair, tmp_path / "out", checkpointing=False)
        advice = str(error.value).partition("; ")[2]
        said = advice.removesuffix(" would fit").split(" | ")
        assert {*said} == {" ".join(name for name in LESS_MEMORY if name in names) for names in fewest}


def test_gpus_are_named_as_few_as_do(pair: Pair, tmp_path: Path) -> None:
    """Where all need 3 without batches of one sequence, and 2 with them."""
    given, cuda = settings(pair, tmp_path / "out"), torch.device("cuda")
    found = plan._fitting(lambda other, ranks: ranks >= (2 if other.batch_tokens else 3), given, 1, cuda)
    assert found == ["4 GPUs", "2 GPUs --batch-tokens 64"]
    assert plan._fitting(lambda other, ranks: ranks > 8, given, 1, cuda) == []


def test_logits_that_are_made_otherwise_are_refused_before_text_is_written(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_prune.healing.models import Language

    monkeypatch.setattr(pipeline, "joined", lambda *_: pytest.fail("the teacher wrote"))
    logits = Language.logits
    monkeypatch.setattr(Language, "logits", lambda self, hidden: 2 * logits(self, hidden))
    with pytest.raises(SpenseError, match="LlamaForCausalLM: what it makes of its output head's result is not known"):
        healed(pair, tmp_path / "out", calibration="generated")


def test_the_command(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import signal

    from offline_prune import cli

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    options = ["--teacher", pair.teacher, "--samples", 32, "--length", 64, "--step-tokens", 256, "--device", "cpu"]
    for out, code in ((pair.pruned, 1), (tmp_path / "out", 0)):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, ["heal", pair.pruned, out, *options])))
        assert (end.value.code or 0) == code
    said = capsys.readouterr()
    assert "error: OUT is" in said.err
    assert "14 of 14 steps, after" in said.err
    assert "KL(teacher ‖ student) on 64 held-out tokens" in said.out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["steps"] == 14
    assert report["settings"]["calibration"] == ["builtin", "builtin-code", "generated"]
