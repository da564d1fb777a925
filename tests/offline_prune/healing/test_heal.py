"""What `heal` makes of a pruned checkpoint, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_runs import Pair, cut_off, healed, make_pair, settings
from runs import Cut, run
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import nn

from offline_prune import HealReport, heal
from offline_prune.calibration.data import calibration_tokens
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.checkpoint.output_folder import PARTIAL
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.healing import pipeline, plan, training
from offline_prune.healing.plan import heal_plan
from offline_prune.healing.text_split import split
from offline_prune.healing.weights import trained_names
from offline_prune.healing.writing import left_dense
from offline_prune.model.loading import SourceModel
from offline_prune.runtime import distributed
from vllm_spense.format import KEY, PERMUTATION

#: Family, how it is pruned, how it is healed.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp8": ("llama", {}, {}),
    "unquantized, fused": ("phi3", {"quantize": "none"}, {}),
    "soft-capped logits, all": ("gemma2", {}, {"train": "all", "checkpointing": False}),
    "divided logits": ("granite", {}, {}),
    "multiplied logits": ("cohere", {}, {}),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def kl(teacher: Path, student: Path, tokens: torch.Tensor) -> float:
    """Mean over all positions, from the models' own logits."""
    target, found = (load_dense(folder)[0](input_ids=tokens).logits.log_softmax(-1) for folder in (teacher, student))
    return float(nn.functional.kl_div(found, target, reduction="sum", log_target=True) / tokens.numel())


@pytest.mark.parametrize("case", CASES)
def test_unseen_text_is_predicted_better_and_only_trained_weights_change(
    case: str, tmp_path: Path, long_text: Path
) -> None:
    """Pruned and healed are judged by the files that were written, opened by other code, in this process."""
    family, pruning, healing = CASES[case]
    pair, out = make_pair(tmp_path, long_text, family, **pruning), tmp_path / "out"
    report = healed(pair, out, **healing)
    verify(out)
    card = (out / "README.md").read_text()
    assert f"{report.after:.4f} nats, and {report.before:.4f} before healing" in card
    assert "healed=" in card
    assert (out / PERMUTATION).read_bytes() == (pair.pruned / PERMUTATION).read_bytes()

    text = settings(pair, out)
    loaded = load_dense(pair.teacher)[1]
    unseen = split(calibration_tokens(str(long_text), loaded, text.samples, text.length, 0), text).heldout
    before, after = (kl(pair.teacher, folder, unseen) for folder in (pair.pruned, out))
    assert report.before == pytest.approx(before, rel=1e-3)
    # What was trained is what was written. One rounding left out of the forward pass would be off by more.
    assert report.after == pytest.approx(after, rel=1e-3)
    assert after < 0.85 * before

    old, new = tensors(pair.pruned), tensors(out)
    assert list(old) == list(new)
    changed = {name for name in old if not same_bytes(old[name], new[name])}
    checkpoint = open_checkpoint(pair.pruned)
    annotation = checkpoint.annotation
    pruned_layers = {f"{layer}.weight" for module in annotation.modules for layer in annotation.layers(module)}
    if healing.get("train") == "all":
        assert pruned_layers < changed
        assert {name.rpartition(".")[2] for name in changed} == {"weight"}, "scales stay"
        assert not {name for name in changed if "embed" in name or "lm_head" in name}
        assert any("norm" in name for name in changed)
        assert any("self_attn" in name for name in changed)
    else:
        assert changed == pruned_layers
    assert open_checkpoint(out).annotation.settings["healed"] == settings(pair, out, **healing).train
    for module in annotation.modules:
        sparse = annotation.regions(module).sparse
        gate, up, down = (f"{layer}.weight" for layer in annotation.layers(module))
        for name, index in ((gate, slice(sparse)), (up, slice(sparse)), (down, (slice(None), slice(sparse)))):
            assert not new[name].float()[index][old[name].float()[index] == 0].any(), name


def test_bfloat16_trains_too(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does, and a CPU with instructions for it; masters and gradients stay float32."""
    monkeypatch.setattr(pipeline, "compute_dtype", lambda device: torch.bfloat16)
    report = healed(pair, tmp_path / "out")
    assert report.after < 0.85 * report.before
    verify(tmp_path / "out")


def test_files_and_annotation_travel(pair: Pair, whole: tuple[Path, HealReport]) -> None:
    out, report = whole
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (pair.pruned, out))
    notes = [each["quantization_config"].pop(KEY) for each in (old, new)]
    assert old == new
    settings = [note["method"].pop("settings") for note in notes]
    assert notes[0] == notes[1]
    trained = 256 * report.history.best_step
    healing = {"healed": "mlp", "healed_text": str(pair.text), "healed_tokens": trained, "healed_rate": 0.01}
    assert settings[1] == settings[0] | healing
    written = {path.name for path in out.iterdir()}
    assert {path.name for path in pair.pruned.iterdir()} - written == {"report.png"}
    data = json.loads((out / "report.json").read_text())
    assert data["heldout_kl_after"] < data["heldout_kl_before"]
    assert data["tokens"] == 14 * 256
    assert data["model"] == str(pair.teacher), "`spense adapt` compares an adapter's base with it"
    assert data["pruning"]["mlp_sparsity"] == pytest.approx(0.375)


def test_a_healed_checkpoint_can_be_healed_again(pair: Pair, tmp_path: Path, whole: tuple[Path, HealReport]) -> None:
    out, first = whole
    again = healed(Pair(pair.teacher, out, pair.text), tmp_path / "again")
    assert again.before == pytest.approx(first.after, rel=1e-4)
    assert again.after < first.after
    # Which blocks are dense, the pruner's report says, which is inside the first healing's.
    once = {"pruning": {"skipped": {"model.layers.3": "a router"}}}
    assert left_dense({"pruning": once}) == left_dense(once["pruning"]) == {"model.layers.3": "a router"}
    assert left_dense(None) == left_dense({"pruning": None}) == {}


def test_what_gets_worse_is_not_written(pair: Pair, tmp_path: Path) -> None:
    said: list[str] = []
    report = heal(settings(pair, tmp_path / "out", rate=1.0), say=said.append)
    assert isinstance(report, HealReport)
    assert report.history.best_step == 0
    assert report.after == report.before < report.history.heldout[-1][1]
    assert "no state predicted the held-out text better than PRUNED" in said[-1]
    settings_of = [open_checkpoint(folder).annotation.settings for folder in (pair.pruned, tmp_path / "out")]
    assert settings_of[0] == settings_of[1], "nothing was healed"
    card = (tmp_path / "out/README.md").read_text()
    assert f" tokens: {report.before:.4f} nats. `spense heal` found no better weights" in card
    assert "healing" not in card
    old, new = tensors(pair.pruned), tensors(tmp_path / "out")
    assert all(same_bytes(old[name], new[name]) for name in old)


def test_a_student_far_from_its_teacher_is_said(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another model of the same sizes, perhaps: their weights cannot tell."""
    said: list[str] = []
    heal(settings(pair, tmp_path / "near", samples=16), say=said.append)
    assert "before the first step" not in " ".join(said)
    monkeypatch.setattr(pipeline, "_SUSPICIOUS", 0.0)
    report = heal(settings(pair, tmp_path / "far", samples=16), say=said.append)
    assert f"KL {report.before:.2f} before the first step: is {pair.teacher} the model that {pair.pruned}" in said[-1]


def test_a_teacher_writes_half_of_the_text(pair: Pair, tmp_path: Path) -> None:
    said: list[str] = []
    sources = str(pair.text), "generated"
    report = heal(settings(pair, tmp_path / "out", calibration=sources, length=24, samples=96), say=said.append)
    assert report.after < report.before
    assert open_checkpoint(tmp_path / "out").annotation.settings["healed_text"] == f"{pair.text} + generated"
    assert "the teacher while it writes text" in " ".join(said)
    assert "48 of 48 texts written" in said


def test_the_default_text_is_that_of_pruning(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the teacher has room to write, in pieces. It needs no network."""
    monkeypatch.setattr("offline_prune.calibration.generated.PIECE", 10)
    said: list[str] = []
    few = {"calibration": None, "samples": 12, "length": 16, "step_tokens": 64}
    heal(settings(pair, tmp_path / "out", **few), say=said.append)
    recorded = open_checkpoint(tmp_path / "out").annotation.settings
    assert recorded["healed_text"] == "builtin + builtin-code + generated"
    assert [line for line in said if "texts" in line] == [
        "the dense model writes 7 × 10 tokens, 7 texts together",  # For 4 × 16.
        "7 of 7 texts written",
    ]
    monkeypatch.setattr("offline_prune.text_sources.whole_memory", lambda device: 0)
    heal(settings(pair, tmp_path / "alone", **few), say=said.append)
    assert open_checkpoint(tmp_path / "alone").annotation.settings["healed_text"] == "builtin + builtin-code"
    assert "builtin and builtin-code alone, because the dense model needs" in " ".join(said)


def test_the_plan_counts_the_teacher_with_all_texts_that_it_writes_together(pair: Pair, tmp_path: Path) -> None:
    student, checkpoint = SourceModel(str(pair.pruned), as_stored=True), open_checkpoint(pair.pruned)
    options = settings(pair, tmp_path / "out", calibration="generated", samples=9, length=600)
    names = trained_names(student, checkpoint, options.train)
    found = heal_plan(student, checkpoint, names, options, torch.device("cpu"), torch.float32)
    assert found.written_at_once == 11, "9 × 600 tokens in texts of 512"
    weights = sum(parameter.numel() for parameter in student.skeleton.parameters())
    cache = 11 * 512 * 2 * 2 * 2 * 16  # Two blocks, keys and values, of two heads.
    assert found.generation == 4 * (weights + cache) + 16 * 11 * 258
    assert heal_plan(student, checkpoint, names, settings(pair, tmp_path), found.device, torch.float32).generation == 0


def test_activations_are_computed_again_where_they_do_not_fit(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, student = open_checkpoint(pair.pruned), SourceModel(str(pair.pruned), as_stored=True)

    def planned(room: int, **options: bool) -> tuple[bool, int]:
        monkeypatch.setattr(plan, "usable_host", lambda: room)
        given = settings(pair, tmp_path, **options)
        names = trained_names(student, checkpoint, given.train)
        found = heal_plan(student, checkpoint, names, given, torch.device("cpu"), torch.float32)
        return found.checkpointing, found.on_device

    kept, again = (planned(1 << 40, checkpointing=chosen)[1] for chosen in (False, True))
    assert again < kept
    assert planned(kept) == (False, kept)
    assert planned(kept - 1) == (True, again)


def test_what_is_computed_again_has_the_same_bits(pair: Pair, tmp_path: Path) -> None:
    for name, chosen in (("kept", False), ("again", True)):
        healed(pair, tmp_path / name, checkpointing=chosen)
    kept, again = (tensors(tmp_path / name) for name in ("kept", "again"))
    assert all(same_bytes(kept[name], again[name]) for name in kept)


def test_what_passes_through_at_once_is_a_batch_or_a_ranks_part_of_a_step(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(device: str, length: int, **options: int) -> int:
        given = settings(pair, tmp_path, length=length, step_tokens=32768, **options)
        return training.sequences_at_once(given, torch.device(device))

    assert [at_once(device, 512) for device in ("cpu", "cuda")] == [4, 64]
    assert at_once("cpu", 4096) == at_once("cpu", 512, batch_tokens=1000) == 1
    assert at_once("cuda", 512, batch_tokens=1 << 20) == 64
    monkeypatch.setattr(distributed, "size", lambda: 4)
    assert [at_once(device, 512) for device in ("cpu", "cuda")] == [4, 16]


def test_a_gpu_repeats_its_bits_only_while_it_trains() -> None:
    """What torch is set to is as before afterwards, also where training fails. Memory is not filled meanwhile."""
    fills: Any = torch.utils.deterministic
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory))

    def fail(device: str) -> None:
        with training._repeatable(torch.device(device)):
            look()
            raise Cut

    look()
    for device in ("cuda", "cpu"):
        with pytest.raises(Cut):
            fail(device)
        look()
    unset, on_a_gpu = (False, True), (True, False)
    assert seen == [unset, on_a_gpu, unset, unset, unset]


def test_generated_text_is_drawn_from_the_teachers_own_distribution(pair: Pair, tmp_path: Path) -> None:
    """Then its mean −log p is the distribution's entropy; at another temperature, or of the likeliest tokens alone, it
    is less. Tokens that end a document end no sequence."""
    cut_off(pair, tmp_path / "out", 1, calibration="generated", length=24, samples=96)
    tokens = torch.load(tmp_path / "out" / PARTIAL / "state-text", weights_only=True)
    assert tokens.shape == (96, 24)
    assert (tokens[:, 0] == 256).all(), "no chat template, so the end of a document before"
    assert len(tokens[:, 1:4].unique()) > 48
    ends = (tokens[:, 4:-1] == 256).nonzero()
    assert len(ends)
    assert (tokens[:, 4:] != 0).any(dim=1).all(), "not padded"
    logits = load_dense(pair.teacher)[0](input_ids=tokens).logits[:, 3:-1].log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1).mean()
    surprise = -logits.gather(-1, tokens[:, 4:, None]).mean()
    assert surprise == pytest.approx(entropy.item(), rel=0.05)
    cold = (logits / 0.7).log_softmax(-1).exp()
    assert -(cold * logits).sum(-1).mean() < 0.9 * entropy


def test_a_chat_model_writes_from_where_a_users_turn_begins(pair: Pair, tmp_path: Path) -> None:
    teacher, pruned = (shutil.copytree(folder, tmp_path / folder.name) for folder in (pair.teacher, pair.pruned))
    for folder in (teacher, pruned):
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
        )
    cut_off(Pair(teacher, pruned, pair.text), tmp_path / "out", 1, calibration="generated", length=24, samples=12)
    tokens = torch.load(tmp_path / "out" / PARTIAL / "state-text", weights_only=True)
    assert {load_dense(teacher)[1].decode(row[:6]) for row in tokens} == {"<user>"}
    assert len({tuple(row.tolist()) for row in tokens}) == 12


def test_text_is_cut_to_what_the_model_was_made_for(tmp_path: Path, long_text: Path) -> None:
    teacher, said = tiny_model("llama", tmp_path / "teacher", max_position_embeddings=24), list[str]()
    run(teacher, tmp_path / "pruned", long_text)
    pair = Pair(teacher, tmp_path / "pruned", long_text)
    report = heal(settings(pair, tmp_path / "out", step_tokens=1024), say=said.append)
    assert "text: 176 × 23 tokens instead of 64 × 64, because the model's context is 24" in said
    assert (report.settings["samples"], report.settings["length"]) == (176, 23)
    few = heal(settings(pair, tmp_path / "few", samples=2, step_tokens=32, calibration=None))
    assert (few.settings["samples"], few.settings["length"]) == (6, 21)
    assert few.settings["calibration"] == ("builtin", "builtin-code", "generated"), "enough for each now"
