"""Text that the dense model writes before it is pruned: what it takes, what is kept of it, when it is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import contents, cut_off, run
from seeing_models import seeing_model
from tiny_models import tiny_model

from offline_prune import memory_plan, pipeline
from offline_prune.calibration import generated
from offline_prune.calibration.generated import Writer, generate
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.checkpoint.output_folder import PARTIAL
from offline_prune.checkpoint.verify import open_checkpoint, verify
from offline_prune.model.loading import SourceModel
from offline_prune.model.whole import whole_model
from offline_prune.pipeline import prune
from offline_prune.runtime import distributed
from offline_prune.runtime.device import compute_dtype
from offline_prune.settings import PruneSettings
from offline_prune.text_sources import default_sources
from vllm_spense.errors import SpenseError

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"samples": 8, "length": 24}


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("written again")


def kept(out: Path) -> torch.Tensor:
    return torch.load(out / PARTIAL / "state-text", weights_only=True)


@pytest.fixture
def mixture(text: Path) -> tuple[str, str]:
    return str(text), "generated"


def test_half_is_written_and_a_resumed_run_ends_with_equal_bytes(
    llama: Path, tmp_path: Path, text: Path, mixture: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it would be written otherwise now, as it may be on a GPU, or with other room."""
    options = {**SIZES, "calibration": mixture}
    said: list[str] = []
    state = torch.get_rng_state()
    prune(PruneSettings(str(llama), tmp_path / "whole", method="spensegpt+", device="cpu", **options), say=said.append)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers change"
    verify(tmp_path / "whole")
    assert "4 of 4 texts written" in said
    assert any(line.startswith("the dense model while it writes text: ") for line in said)
    annotation = open_checkpoint(tmp_path / "whole").annotation
    assert annotation.calibration is not None
    assert annotation.calibration.source == f"{text} + generated"
    cut_off(llama, tmp_path / "out", text, 1, **options)
    assert kept(tmp_path / "out").shape == (4, 24)
    monkeypatch.setattr("offline_prune.text_sources.joined", refuse)
    run(llama, tmp_path / "out", text, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    run(llama, tmp_path / "out", text, resume=True, **options)
    with pytest.raises(AssertionError, match="written again"):
        run(llama, tmp_path / "other", text, **options)


def test_what_was_written_is_kept_before_any_block_is(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SIZES, "calibration": "generated"}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, "_stream", refuse)
        with pytest.raises(AssertionError):
            run(llama, tmp_path / "out", text, **options)
    written = kept(tmp_path / "out")
    with pytest.raises(SpenseError, match="seed: found 0, expected 1"):
        run(llama, tmp_path / "out", text, resume=True, seed=1, **options)
    taken: list[torch.Tensor] = []
    stream = pipeline._Run._stream

    def noted(self: Any, tokens: torch.Tensor, *others: Any) -> Any:
        taken.append(tokens)
        return stream(self, tokens, *others)

    monkeypatch.setattr(pipeline._Run, "_stream", noted)
    monkeypatch.setattr("offline_prune.text_sources.joined", refuse)
    run(llama, tmp_path / "out", text, resume=True, **options)
    assert torch.equal(taken[0], written)


def test_damaged_text_is_written_anew(llama: Path, tmp_path: Path, text: Path) -> None:
    options = {**SIZES, "calibration": "generated"}
    run(llama, tmp_path / "whole", text, **options)
    cut_off(llama, tmp_path / "out", text, 1, **options)
    file = tmp_path / "out" / PARTIAL / "state-text"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    run(llama, tmp_path / "out", text, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "gemma3", "modernbert-decoder"])
def test_the_whole_model_writes_and_is_gone_afterwards(family: str, tmp_path: Path) -> None:
    """With an output head of its own, with one tied to the embeddings, and with one that also has a bias. Logits are
    those of the model opened by other code."""
    folder = tiny_model(family, tmp_path / family)
    source = SourceModel(str(folder))
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad(), whole_model(source, CPU, torch.float32):
        found = source.skeleton(input_ids=tokens, use_cache=False).logits
        written = generate(source, CPU, 5, 12, 0, 2, lambda _: None)
    assert written.shape == (5, 12)
    torch.testing.assert_close(found, load_dense(folder)[0](input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    head, embeddings = source.skeleton.get_output_embeddings(), source.text.get_input_embeddings()
    assert (head.weight is embeddings.weight) == (family != "llama")


def test_a_model_that_sees_writes_without_its_vision_tower(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    source = SourceModel(str(seeing_model("Gemma-3, multimodal", tmp_path / "model")))
    with whole_model(source, CPU, torch.float32):
        assert generate(source, CPU, 3, 12, 0, 3, lambda _: None).shape == (3, 12)
    assert not [each for each in recwarn if "device type" in str(each.message)]


def test_a_chat_model_begins_as_a_users_turn_does(llama: Path, tmp_path: Path) -> None:
    chat = shutil.copytree(llama, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}")
    found = {}
    for folder in (llama, chat):
        source = SourceModel(str(folder))
        with whole_model(source, CPU, torch.float32):
            found[folder] = generate(source, CPU, 6, 12, 0, 4, lambda _: None)
    decode = SourceModel(str(chat)).tokenizer.decode
    assert {decode(row[:6]) for row in found[chat]} == {"<user>"}
    assert (found[llama][:, 0] == 256).all(), "no template, so what begins a document"
    assert len({tuple(row.tolist()) for row in found[llama][:, 1:4]}) == 6
    assert len({tuple(row.tolist()) for row in found[chat]}) == 6


@pytest.mark.parametrize("template", ["", "{% for m in messages %}{{ eos_token }}{{ m.content }}{% endfor %}"])
def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path: Path, template: str) -> None:
    """Those that begin a document or a turn too. On a GPU a token without embeddings would end the process."""
    folder = tiny_model("llama", tmp_path / "model", vocab_size=200, pad_token_id=0)
    (folder / "chat_template.jinja").write_text(template)
    source = SourceModel(str(folder))
    assert source.tokenizer.eos_token_id == 256
    with whole_model(source, CPU, torch.float32):
        assert generate(source, CPU, 200, 6, 0, 200, lambda _: None).max() < 200


def test_a_tokenizer_may_have_nothing_but_special_tokens(llama: Path) -> None:
    source = SourceModel(str(llama))
    vocabulary = source.tokenizer.get_vocab()
    source.tokenizer.add_special_tokens({"additional_special_tokens": [*vocabulary]})
    assert {*vocabulary.values()} <= {*source.tokenizer.all_special_ids}
    with whole_model(source, CPU, torch.float32):
        found = generate(source, CPU, 50, 6, 0, 50, lambda _: None)
    assert (found[:, 0] == source.tokenizer.eos_token_id).all()
    assert len(found[:, 1].unique()) > 10


def test_a_model_that_is_too_large_is_refused_before_any_work(
    llama: Path, tmp_path: Path, text: Path, mixture: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated.Writer, "bytes", lambda *_: 1 << 50)
    words = (
        r"cpu: .* GiB of memory usable, the dense model needs 1048576\.00 GiB while it writes the text of "
        r"--calibration generated; --calibration builtin needs none of it, nor does text that it wrote elsewhere"
    )
    with pytest.raises(SpenseError, match=words):
        run(llama, tmp_path / "out", text, calibration=mixture, **SIZES)
    assert not (tmp_path / "out").exists()
    # Tokens that are there already are not written.
    tokens = torch.randint(0, 256, (8, 24))
    settings = PruneSettings(str(llama), tmp_path / "out", "magnitude", calibration=mixture, device="cpu", **SIZES)
    prune(settings, tokens=tokens)


def test_a_model_that_cannot_write_is_refused(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceModel(str(llama))
    monkeypatch.setattr(type(source.skeleton), "can_generate", lambda *_: False)
    with pytest.raises(SpenseError, match="--calibration: LlamaForCausalLM has no way to generate text; name another"):
        run(llama, tmp_path / "out", text, calibration="generated", **SIZES)
    assert not (tmp_path / "out").exists()


def test_what_a_models_own_code_raises_is_one_line(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(*_: Any, **__: Any) -> None:
        raise AttributeError("no get_max_length\nin this cache")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "_sample", old)
    with pytest.raises(SpenseError) as error:
        run(llama, tmp_path / "out", text, calibration="generated", **SIZES)
    assert str(error.value) == (
        "--calibration generated: LlamaForCausalLM cannot write here, AttributeError: no get_max_length; --calibration "
        "builtin --calibration builtin-code does without"
    )


def test_attention_is_not_cudnns_while_a_model_writes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes a plan for every length."""
    source, backends = SourceModel(str(llama)), torch.backends.cuda
    found: list[tuple[bool, ...]] = []

    def allowed() -> tuple[bool, ...]:
        others = (backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled())
        return backends.cudnn_sdp_enabled(), *others

    def noted(*_: Any, **__: Any) -> torch.Tensor:
        found.append(allowed())
        return torch.zeros(3, 12)

    before = allowed()
    monkeypatch.setattr(source.skeleton, "generate", noted)
    assert generate(source, CPU, 3, 12, 0, 3, lambda _: None).shape == (3, 12)
    assert found == [(False, True, True, True)]
    assert allowed() == before


def source_of(out: Path) -> str:
    calibration = open_checkpoint(out).annotation.calibration
    assert calibration is not None
    return calibration.source


def test_by_default_a_third_each_is_docstrings_code_and_written(llama: Path, tmp_path: Path, text: Path) -> None:
    """And a run that is cut off ends with equal bytes."""
    options = {**SIZES, "calibration": None}
    report = run(llama, tmp_path / "whole", text, **options)
    assert report.settings["calibration"] == ("builtin", "builtin-code", "generated")
    assert source_of(tmp_path / "whole") == "builtin + builtin-code + generated"
    run(llama, tmp_path / "named", text, **{**options, "calibration": ("builtin", "builtin-code", "generated")})
    assert contents(tmp_path / "named") == contents(tmp_path / "whole")
    cut_off(llama, tmp_path / "out", text, 1, **options)
    assert kept(tmp_path / "out").shape == (2, 24)
    run(llama, tmp_path / "out", text, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_by_default_a_model_too_large_for_the_device_writes_nothing_and_that_is_said(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline_prune.text_sources.whole_memory", lambda _: 1 << 20)
    monkeypatch.setattr("offline_prune.text_sources.joined", refuse)
    said: list[str] = []
    settings = PruneSettings(str(llama), tmp_path / "out", "magnitude", device="cpu", **SIZES)
    prune(settings, say=said.append)
    assert source_of(tmp_path / "out") == "builtin + builtin-code"
    (line,) = (line for line in said if line.startswith("--calibration: builtin and builtin-code alone, because"))
    assert "GiB to write, and cpu has 0.00 GiB in all" in line


def test_by_default_a_model_without_a_way_to_write_writes_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, said = SourceModel(str(llama)), list[str]()
    assert default_sources(source, None, 3, 24, None, CPU, said.append) == ("builtin", "builtin-code", "generated")
    monkeypatch.setattr(type(source.skeleton), "can_generate", lambda *_: False)
    assert not said
    assert default_sources(source, None, 3, 24, None, CPU, said.append) == ("builtin", "builtin-code")
    assert "has no way to generate text" in said[0]


def test_by_default_a_cpu_writes_what_it_does_soon(llama: Path) -> None:
    """A third of the text, or as many sequences as it may write; some 160 million weights write 13,000 tokens."""
    source, said = SourceModel(str(llama)), list[str]()
    weights = Writer.of(source, torch.float32).weights
    most = 2**41 // weights
    assert default_sources(source, None, 3, most, None, CPU, said.append) == ("builtin", "builtin-code", "generated")
    assert not said
    assert default_sources(source, None, 3, most + 1, None, CPU, said.append) == ("builtin", "builtin-code")
    assert f"because the dense model would take long to write {most + 1} tokens on a CPU" in said[0]
    # As `prune` has it, which asks the dense model for no more than so many sequences; `heal` asks for its whole share.
    assert "generated" in default_sources(source, None, 9, most, 1, CPU, said.append)
    assert "generated" not in default_sources(source, None, 9, most, None, CPU, said.append)


@pytest.mark.parametrize(("samples", "sources"), [(1, "builtin"), (2, "builtin + builtin-code")])
def test_by_default_fewer_sequences_than_sources_are_built_in(
    samples: int, sources: str, llama: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = {**SIZES, "samples": samples, "device": "cpu"}
    prune(PruneSettings(str(llama), tmp_path / "out", "magnitude", **options), say=said.append)
    assert source_of(tmp_path / "out") == sources
    assert not [line for line in said if "because the dense model" in line]


def test_tokens_of_a_caller_are_called_so(llama: Path, tmp_path: Path) -> None:
    settings = PruneSettings(str(llama), tmp_path / "out", "magnitude", device="cpu", **SIZES)
    prune(settings, tokens=torch.randint(0, 256, (8, 24)))
    assert source_of(tmp_path / "out") == "given tokens"


def test_long_sequences_are_made_of_short_texts(
    llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generated.pieces(3, 1300) == (8, 512)
    assert generated.pieces(3, 100) == (3, 100)
    monkeypatch.setattr(generated, "PIECE", 10)
    settings = PruneSettings(str(llama), tmp_path / "out", "magnitude", calibration="generated", device="cpu", **SIZES)
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, "_stream", refuse)
        with pytest.raises(AssertionError):
            prune(settings, say=said.append)
    assert "20 of 20 texts written" in said
    source = SourceModel(str(llama))
    with whole_model(source, CPU, torch.float32):
        texts = generate(source, CPU, 20, 10, 0, 20, lambda _: None)
    if compute_dtype(CPU) is torch.float32:  # Else the model is another one there.
        assert torch.equal(kept(tmp_path / "out"), texts.flatten()[: 8 * 24].view(8, 24))


def test_as_many_are_written_together_as_half_the_room_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(weights=6000, cache=1000, vocabulary=50, itemsize=2)
    sequence = 1000 * 1000 * 2
    for device, room, samples, expected in (
        ("cuda", 5000 * sequence, 5120, 2048),
        ("cuda", 4000 * sequence, 100, 100),
        ("cuda", 300 * sequence, 5120, 128),
        ("cuda", 40 * sequence, 5120, 32),
        ("cuda", 10 * sequence, 5120, 8),
        ("cuda", sequence // 2, 5120, 1),
        ("cpu", 4000 * sequence, 5120, 32),
    ):
        found = writer.at_once(samples, 1000, torch.device(device), room)
        assert found == expected
        assert (writer.bytes(found, 1000) <= room) == (found > 1)
    monkeypatch.setattr(distributed, "size", lambda: 4)
    assert writer.at_once(100, 1000, torch.device("cuda"), 4000 * sequence) == 25


def test_the_plan_counts_the_whole_model(llama: Path, tmp_path: Path) -> None:
    settings = PruneSettings(str(llama), tmp_path / "out", calibration="generated", device="cpu", **SIZES)
    source = SourceModel(str(llama))
    without = memory_plan.memory_plan(source, settings, CPU, torch.float32)
    found = memory_plan.memory_plan(source, settings, CPU, torch.float32, 8)
    assert (without.generation, found.written_at_once) == (0, 8)
    weights = sum(parameter.numel() for parameter in source.skeleton.parameters())
    cache = 8 * 24 * json.loads((llama / "config.json").read_text())["num_hidden_layers"] * 2 * 2 * 16
    assert found.generation == 4 * (weights + cache) + 16 * 8 * 258
    assert found.on_device == max(without.on_device, found.generation)
