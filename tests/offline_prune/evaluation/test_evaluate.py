"""A pruned model is compared block by block, and the result is that of both models in whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_model

from benchmarks import zoo
from offline_prune.calibration.data import calibration_tokens
from offline_prune.checkpoint.dense_model import agreement, compared, load_dense, perplexity
from offline_prune.evaluation import evaluate as module
from offline_prune.evaluation import streamed
from offline_prune.evaluation.evaluate import DomainLoss, evaluate
from offline_prune.evaluation.texts import domains
from offline_prune.model.loading import SourceModel
from offline_prune.runtime import matmul_precision
from vllm_spense.errors import SpenseError

SAMPLES, LENGTH = 3, 40
#: Of the zoo: text towers, and several hidden states of a token.
KINDS = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gemma3n": "Gemma3nForCausalLM",
}


def test_sums_are_those_of_their_definitions() -> None:
    """By hand; KL in the other direction would be a fifth less."""
    found, expected = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()
    sums = compared(found, expected, torch.tensor([0, 1]))
    losses = [-math.log(0.9) - math.log(0.1), -math.log(0.5) - math.log(0.8)]
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1) + 0.2 * math.log(0.2 / 0.9) + 0.8 * math.log(0.8 / 0.1)
    assert sums.tolist() == pytest.approx([*losses, kl, 1], rel=1e-5)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs with BF16 units round inputs, and which way depends on what is multiplied together."""
    precision = matmul_precision._matmul_precision

    def exact(on_cpu: str, on_gpu: str) -> AbstractContextManager[None]:
        return precision("ieee", "ieee")

    monkeypatch.setattr(matmul_precision, "_matmul_precision", exact)


def changed(model: Path, out: Path) -> Path:
    """A plain model of the same architecture with other weights."""
    tensors = load_file(model / "model.safetensors")
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    noise = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor + (0.05 * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype)
        if tensor.ndim > 1
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def whole(pruned: Path, model: Path, text: Path) -> DomainLoss:
    (dense, tokenizer), (sparse, _) = load_dense(model), load_dense(pruned)
    tokens = calibration_tokens(str(text), tokenizer, SAMPLES, LENGTH, 0)
    found = agreement(sparse, dense, tokens)
    expected = perplexity(dense, tokens), found.perplexity, found.kl, found.top1_agreement
    return DomainLoss("text", SAMPLES, LENGTH, *expected)


def compare(found: DomainLoss, expected: DomainLoss) -> None:
    assert (found.domain, found.sequences, found.length) == (expected.domain, expected.sequences, expected.length)
    for key in ("perplexity_model", "perplexity_pruned", "kl"):
        assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=1e-4), key
    # A tie may fall either way at one of the positions.
    assert abs(found.top1_agreement - expected.top1_agreement) < 1.5 / (SAMPLES * (LENGTH - 1))
    assert expected.kl > 1e-2


def test_a_pruned_checkpoint_block_by_block_is_as_in_whole(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(llama, tmp_path / "out", text)
    # Thirteen positions at a time.
    monkeypatch.setattr(module, "MOST_LOGITS", 258 * 13)
    made: list[int] = []
    head, load = streamed.head, SourceModel.load

    @contextmanager
    def watched_head(*args: Any) -> Iterator[Any]:
        with head(*args) as of:
            yield lambda *given: made.append((logits := of(*given)).numel()) or logits

    models: list[SourceModel] = []
    most = 0

    def watched_load(self: SourceModel, *args: Any, **named: Any) -> Any:
        nonlocal most
        loaded = load(self, *args, **named)
        models.extend([self] if self not in models else [])
        filled = [
            block.name
            for model in models
            for block in model.blocks
            if any(p.device.type != "meta" for p in model.module(block.name).parameters())
        ]
        most = max(most, len(filled))
        return loaded

    monkeypatch.setattr(streamed, "head", watched_head)
    monkeypatch.setattr(SourceModel, "load", watched_load)
    steps: list[tuple[int, int]] = []
    found = evaluate(
        str(tmp_path / "out"), str(llama), [text], SAMPLES, LENGTH, "cpu", progress=lambda a, b, _: steps.append((a, b))
    )
    compare(found.domains[0], whole(tmp_path / "out", llama, text))
    assert found.method == "spensegpt+"
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (len(models), most) == (2, 1)
    assert max(made) == 258 * 13


def test_experts_that_transformers_does_not_read(text: Path, tmp_path: Path) -> None:
    tiny_model("granite-moe", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text)
    found = evaluate(str(tmp_path / "out"), str(tmp_path / "model"), [text], SAMPLES, LENGTH, "cpu")
    compare(found.domains[0], whole(tmp_path / "out", tmp_path / "model", text))
    assert 0 < found.domains[0].kl < 1


@pytest.mark.parametrize(
    "family", ["gemma2", "granite", "mistral", "qwen3-moe with a plain layer", "granite-moe", *KINDS]
)
def test_every_architecture_is_as_in_whole(family: str, text: Path, tmp_path: Path) -> None:
    """Soft-capped and scaled logits, sliding windows, experts, text towers, several hidden states of a token."""
    if family in KINDS:
        zoo.tiny_model(zoo.Architecture(family, KINDS[family]), tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
    else:
        tiny_model(family, tmp_path / "model")
    other = changed(tmp_path / "model", tmp_path / "other")
    said: list[str] = []
    found = evaluate(str(other), str(tmp_path / "model"), [text], SAMPLES, LENGTH, "cpu", say=said.append)
    compare(found.domains[0], whole(other, tmp_path / "model", text))
    assert found.method is None
    assert said[0] == f"{other}: not a Spense checkpoint; it is compared as it is"


def test_each_text_is_a_domain_of_its_own(llama: Path, text: Path, tmp_path: Path) -> None:
    other = changed(llama, tmp_path / "other")
    short = tmp_path / "short.txt"
    short.write_text("never seen before, " * 6)
    said: list[str] = []
    both = evaluate(str(other), str(llama), [text, short], SAMPLES, LENGTH, "cpu", say=said.append)
    assert [(loss.domain, loss.sequences) for loss in both.domains] == [("text", SAMPLES), ("short", 2)]
    alone = [evaluate(str(other), str(llama), [each], SAMPLES, LENGTH, "cpu").domains[0] for each in (text, short)]
    for found, expected in zip(both.domains, alone, strict=True):
        assert found.kl == pytest.approx(expected.kl, rel=1e-3)
    assert alone[0].kl != pytest.approx(alone[1].kl, rel=1e-2)
    assert f"{short}: 2 sequences of {LENGTH} tokens instead of {SAMPLES}; the text ends there" in said


def test_sequences_fit_the_models_context(llama: Path, text: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model", max_position_embeddings=24)
    said: list[str] = []
    found = evaluate(str(model), str(model), [text], 2, 64, "cpu", say=said.append)
    assert found.domains[0].length == 24
    assert found.domains[0].kl == 0
    assert "sequences of 24 tokens instead of 64, because the model's context is 24" in said


def test_the_built_in_texts_need_no_file() -> None:
    found = domains([], byte_tokenizer(), 2, 64)
    assert list(found) == ["docstrings", "reference", "code"]
    assert all(tokens.shape == (2, 64) for tokens in found.values())
    assert len({tuple(tokens[0].tolist()) for tokens in found.values()}) == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", r"empty.txt: found 0 tokens, expected at least 64 \(1 samples × 64\)"),
        ("short.txt", "too short", r"short.txt: found 10 tokens, expected at least 64 \(1 samples × 64\)"),
        ("missing.txt", None, "missing.txt: no such file or folder"),
        ("text.csv", "a,b", "text.csv: found a .csv file, expected .jsonl, .txt, .parquet"),
    ],
)
def test_a_text_without_one_sequence_is_refused(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SpenseError, match=words):
        domains([tmp_path / name], byte_tokenizer(), 4, 64)


@pytest.mark.parametrize("name", ["builtin", "some/text", "text.txt"])
def test_a_text_that_is_not_there_is_missed_before_the_models_are_fetched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text is a file or a folder, never a data set."""
    monkeypatch.chdir(tmp_path)
    for asked in ("huggingface_hub.snapshot_download", "datasets.load_dataset"):
        monkeypatch.setattr(asked, lambda *_, **__: pytest.fail("asked the hub"))
    expected = "a .jsonl, .txt, .parquet file, a folder with such files, or no --text for the built-in ones"
    with pytest.raises(SpenseError, match=f"^{name}: no such file or folder; expected {expected}$"):
        evaluate("some/pruned", "some/model", [Path(name)])
    with pytest.raises(SpenseError, match=f"^{name}: no such file or folder; expected {expected}$"):
        domains([Path(name)], byte_tokenizer(), 4, 64)


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpenseError, match=r"--text: found a/x.txt and b/x.jsonl, both named x; expected different"):
        domains([Path("a/x.txt"), Path("b/x.jsonl")], byte_tokenizer(), 4, 64)


def test_models_that_are_not_alike_are_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"vocab_size": 300}, "vocabulary: found 300, expected 258 as"),
        ({"num_hidden_layers": 3}, "decoder blocks: found 3, expected 2 as"),
        ({"hidden_size": 32}, "hidden size: found 32, expected 64 as"),
    ):
        other = tiny_model("llama", tmp_path / words.split(":")[0], **changes)
        with pytest.raises(SpenseError, match=words):
            evaluate(str(other), str(llama), [text], device="cpu")
    mistral = tiny_model("mistral", tmp_path / "mistral")
    with pytest.raises(SpenseError, match="architecture: found MistralForCausalLM, expected LlamaForCausalLM as"):
        evaluate(str(mistral), str(llama), [text], device="cpu")
    other = changed(llama, tmp_path / "words")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        SpenseError, match=r"words: found another vocabulary in its tokenizer than .* has; expected the"
    ):
        evaluate(str(other), str(llama), [text], device="cpu")


def test_sizes_are_checked(llama: Path) -> None:
    for sizes in ((0, 64), (4, 1)):
        with pytest.raises(SpenseError, match=f"--samples, --length: found {sizes[0]}, {sizes[1]}, expected"):
            evaluate(str(llama), str(llama), [], *sizes, device="cpu")
