"""Several processes make the checkpoint that one makes, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from forked import run_ranks
from runs import contents, run
from tiny_models import tiny_model

from offline_prune import pipeline
from offline_prune.calibration.generated import generate
from offline_prune.calibration.mixture import drawn, mixed, shares
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import whole_model
from offline_prune.runtime import deterministic_reduce, distributed
from offline_prune.runtime.deterministic_reduce import ShardSums
from offline_prune.runtime.device import compute_dtype, pick_device
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

CPU = torch.device("cpu")


#: `spense prune` that also writes what tuning gave each rank: weights' checksums, losses before and after.
NOTED = """
import hashlib, json, os, sys
from pathlib import Path

from offline_prune.cli import main
from offline_prune.methods.block_finetune import BlockTuning

process, notes = BlockTuning.process, []


def noted(tuning):
    weights, report = process(tuning)
    notes.append({name: hashlib.sha256(weight.numpy().tobytes()).hexdigest() for name, weight in weights.items()})
    notes[-1] |= {"before": report.before, "after": report.after}
    return weights, report


BlockTuning.process = noted
try:
    main(["prune", *sys.argv[1:]])
finally:
    Path(__file__).with_name(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(notes))
"""


#: `spense prune` that also writes what each rank calibrates on.
TOKENS = """
import os, sys
from pathlib import Path

import torch

from offline_prune import pipeline
from offline_prune.cli import main

stream = pipeline._Run._stream


def noted(self, tokens, *others):
    torch.save(tokens, Path(__file__).with_name(f"rank-{os.environ['RANK']}"))
    return stream(self, tokens, *others)


pipeline._Run._stream = noted
main(["prune", *sys.argv[1:]])
"""


#: `spense prune`.
PRUNE = """
import sys

from offline_prune.cli import main

main(["prune", *sys.argv[1:]])
"""


def torchrun(model: Path, out: Path, text: Path, *options: str) -> subprocess.Popen[str]:
    """Starts `prune` on two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [*launch, "-m", "offline_prune", *arguments(model, out, text, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def on_two_ranks(code: str, model: Path, out: Path, text: Path, *options: str) -> str:
    """Runs a program that prunes, as `torchrun` would; what it says."""
    program = out.with_name("program.py")
    program.write_text(code)
    return run_ranks(program, *arguments(model, out, text, *options))


def arguments(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    given = [str(model), str(out), "--calibration", str(text), "--device", "cpu"]
    given += [] if "--method" in options else ["--method", "spensegpt+"]
    return [*given, "--samples", "12", "--length", "64", *options]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("models") / "model", num_hidden_layers=24)


def test_two_ranks_that_are_killed_and_resumed_end_as_one(model: Path, tmp_path: Path, text: Path) -> None:
    process = torchrun(model, tmp_path / "two", text, "--batch-tokens", "128", "--activations", "disk")
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "two").glob(".spense-partial/part-*"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "two/config.json").exists()
    with pytest.raises(SpenseError, match=r"other settings \(processes: found 2, expected 1\)"):
        run(model, tmp_path / "two", text, samples=12, batch_tokens=128, resume=True)
    said = on_two_ranks(PRUNE, model, tmp_path / "two", text, "--batch-tokens", "128", "--resume")
    assert said.count("memory of cpu in all") == said.count("MLP sparsity") == 1, "only the first rank talks"
    run(model, tmp_path / "one", text, samples=12, batch_tokens=128)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "program.py", "two"]


def test_two_ranks_prune_experts_as_one_does(text: Path, tmp_path: Path) -> None:
    """Also those that borrow: few tokens go to each of sixteen experts."""
    model = tiny_model("granite-moe", tmp_path / "model", num_local_experts=16)
    on_two_ranks(PRUNE, model, tmp_path / "two", text, "--batch-tokens", "128")
    report = run(model, tmp_path / "one", text, samples=12, batch_tokens=128)
    assert min(min(layer.tokens or ()) for layer in report.layers) < 64
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_two_ranks_tune_together(text: Path, tmp_path: Path) -> None:
    """Both end with the same weights and losses, to the bit. They take other steps than one rank does: those losses are
    only about the same, and were a rank's share left out, half as large.
    """
    model = tiny_model("llama", tmp_path / "model")
    on_two_ranks(NOTED, model, tmp_path / "two", text, "--method", "spensegpt++")
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    one = run(model, tmp_path / "one", text, samples=12, method="spensegpt++")
    two = json.loads((tmp_path / "two/report.json").read_text())
    for alone, together in zip(one.layers, two["layers"], strict=True):
        assert alone.tuning
        assert together["tuning"]["before"] == pytest.approx(alone.tuning.before, rel=0.3)
        assert together["tuning"]["after"] == pytest.approx(alone.tuning.after, rel=0.3)


def test_two_ranks_write_a_share_of_the_text_each(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--calibration", "generated", "--method", "magnitude"]
    said = on_two_ranks(TOKENS, llama, tmp_path / "two", text, *options)
    assert said.count("3 of 3 texts written") == 1, "only the first rank talks"
    first, second = (torch.load(tmp_path / f"rank-{rank}") for rank in (0, 1))
    assert torch.equal(first, second)
    source, written = SourceModel(str(llama)), []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with whole_model(source, CPU, compute_dtype(CPU)):
            written.append(generate(source, CPU, 3, 64, 0, 3, lambda _: None))
    sources = str(text), "generated"
    parts = drawn(shares(sources, 12), source.tokenizer, 64, 0, lambda _: None)
    assert torch.equal(first, mixed({**parts, "generated": torch.cat(written)}, sources, 0))


@pytest.mark.parametrize(
    ("size", "samples", "words"),
    [
        (3, 9, "--nproc-per-node: found 3, expected a power of two of at most 8"),
        (16, 16, "--nproc-per-node: found 16, expected a power of two of at most 8"),
        (8, 4, "--samples: found 4, expected a multiple of the number of processes, 8"),
        (2, 9, "--samples: found 9, expected a multiple of the number of processes, 2"),
    ],
)
def test_text_that_does_not_divide_is_refused(
    size: int, samples: int, words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: size)
    monkeypatch.setattr(distributed, "broadcast_from_first", lambda make: make())
    with pytest.raises(SpenseError, match=words):
        pipeline.prune(PruneSettings(str(model), tmp_path / "out", samples=samples, device="cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:1", "--device: found cuda:1, expected auto, cpu or cuda: torchrun gives each process a GPU"),
        ("cuda", "--nproc-per-node: found 4, but torch sees 2 GPUs"),
    ],
)
def test_every_rank_has_a_gpu_of_its_own(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"TORCHELASTIC_RUN_ID": "run", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SpenseError, match=words):
        pick_device(device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if device == "cuda":
        assert pick_device(device) == torch.device("cuda", 1)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8, 9, 12, 128])
def test_parts_are_the_same_for_any_number_of_ranks(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = deterministic_reduce.local_shards(samples)
    assert [sample for part in whole for sample in part] == list(range(samples))
    assert all(len(part) > 0 for part in whole)
    for size in (2, 4, 8):
        if samples % size == 0:
            monkeypatch.setattr(distributed, "size", lambda size=size: size)
            mine = deterministic_reduce.local_shards(samples // size)
            assert mine == [range(part.start, part.stop) for part in whole[: len(whole) // size]]


def test_sums_are_those_of_a_tree() -> None:
    leaves = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    sums = ShardSums((1000,), CPU)
    for part, leaf in enumerate(leaves):
        sums.of(part).add_(leaf)
    pairs = leaves[0::2] + leaves[1::2]
    fours = pairs[0::2] + pairs[1::2]
    assert torch.equal(sums.total(), fours[0] + fours[1])
    assert not torch.equal(fours[0] + fours[1], leaves.cumsum(0)[-1]), "the order does not show in these numbers"
