"""The accuracy benchmark: what it measures, and on which texts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks import accuracy, peers, quality_results, quality_tables, texts
from benchmarks.envelope import envelope, write_result
from benchmarks.tables import source
from offline_prune.calibration.heldout import HELDOUT
from offline_prune.calibration.mixture import DEFAULT_MIXTURE
from offline_prune.checkpoint.dense_model import agreement, load_dense, perplexity
from vllm_spense.errors import SpenseError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for name in (texts.CALIBRATION, *texts.DOMAINS):
        lines = [json.dumps({"text": f"{name} {i}: {i * i % 97} sheep"}) for i in range(100)]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    return path


def test_agreement_is_what_its_definition_says(llama: Path, tmp_path: Path) -> None:
    model, reference = load_dense(llama)[0], load_dense(tiny_model("llama", tmp_path / "other", vocab_size=258))[0]
    with torch.no_grad():
        head = model.lm_head.weight
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    found = agreement(model, reference, tokens)
    with torch.inference_mode():
        p, q = (each(input_ids=tokens).logits[:, :-1].double().softmax(-1) for each in (reference, model))
    assert found.perplexity == pytest.approx(perplexity(model, tokens), rel=1e-3)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=2e-2)
    assert found.kl > 0.01
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.05)
    assert found.top1_agreement < 1


def test_a_model_agrees_with_itself(llama: Path) -> None:
    model, _ = load_dense(llama)
    found = agreement(model, model, torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0)))
    assert (found.kl, found.top1_agreement) == (0, 1)


def test_rotary_angles_are_exact(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others than the products of the layers, which may be quick."""
    seen: dict[str, set[str]] = {"angles": set(), "layers": set()}
    matmul = torch.backends.mkldnn.matmul
    angles = LlamaRotaryEmbedding.forward

    def forward(*args: object, **settings: object) -> object:
        seen["angles"].add(matmul.fp32_precision)
        return angles(*args, **settings)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    model, _ = load_dense(llama)
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen["layers"].add(matmul.fp32_precision))
    for _ in range(2):
        perplexity(model, torch.arange(64).view(2, 32))
    assert seen == {"angles": {"ieee"}, "layers": {"bf16"}}


def test_rows_of_the_same_code_are_kept_and_say_their_commit(tmp_path: Path) -> None:
    file, said = tmp_path / "x.json", list[str]()
    written = envelope("accuracy", [{"kl": 1.0}, {"kl": 2.0, "commit": "first"}]) | {"commit": "second"}
    file.write_text(json.dumps(written))
    assert accuracy.earlier_rows(file, said.append) == [
        {"kl": 1.0, "commit": "second"},
        {"kl": 2.0, "commit": "first"},
    ]
    assert f"commit {envelope('x', [])['commit']}, second, first: " in source(
        envelope("accuracy", accuracy.earlier_rows(file, said.append))
    )
    file.write_text(json.dumps(written | {"commit": envelope("x", [])["commit"]}))
    assert accuracy.earlier_rows(file, said.append) == written["rows"]
    assert said[0] == f"{file}: 2 rows are kept, of commit second"


@pytest.mark.parametrize("key", ["command", "code", "gpu", "cpu", "versions"])
def test_rows_of_other_circumstances_are_replaced_and_that_is_said(key: str, tmp_path: Path) -> None:
    file, said = tmp_path / "x.json", list[str]()
    other = envelope("accuracy", [{"kl": 1.0}]) | {key: "another"}
    if key == "code":
        # As in files of before results named it.
        del other[key]
    file.write_text(json.dumps(other))
    assert accuracy.earlier_rows(file, said.append) == []
    assert said == [f"{file}: its 1 rows, of commit {other['commit']}, are replaced: not the same {key}"]


def test_the_table_from_a_folder_of_texts(
    llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "accuracy.json"
    sizes = "--samples 8 --length 64 --heldout 2 --heldout-length 64 --seeds 0 1 --sparsities 0.375 0.5"
    command = f"accuracy --models {llama} --methods dense spensegpt++ spensegpt {sizes} --device cpu --texts {folder}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(out)])
    accuracy.main()
    result = json.loads(out.read_text())
    assert result["benchmark"] == "accuracy"
    rows = result["rows"]
    # Dense, rounded in two ways, ++ at both sparsities and SpenseGPT at one, with two seeds: on four domains.
    assert len(rows) == 4 * (3 + 2 * 3)
    assert list(rows[0]) == [
        *("model", "method", "sparsity", "format", "seed", "domain", "heldout", "heldout_length"),
        *("perplexity", "kl", "top1_agreement", "prune_seconds"),
    ]
    dense, nearest, compensated, *pruned = rows[::4]
    assert (dense["kl"], dense["top1_agreement"], dense["prune_seconds"]) == (0, 1, None)
    assert 0 < compensated["kl"] < nearest["kl"] < min(row["kl"] for row in pruned)
    assert len({row["kl"] for row in pruned}) == len(pruned)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "\n".join(quality_tables.markdown(rows)) in table
    assert table.count("±") == 4 * 2 * 3
    assert "| `spensegpt` | 37.5% | FP8 |" in table
    assert "| `spensegpt` | 50.0% |" not in table

    def no_more(*_: object) -> None:
        raise AssertionError("pruned again")

    monkeypatch.setattr(accuracy, "prune", no_more)
    accuracy.main()
    assert json.loads(out.read_text())["rows"] == rows

    def cut_off(*arguments: Any) -> None:
        write_result(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "write_result", cut_off)
        with pytest.raises(KeyboardInterrupt):
            accuracy.main()
    assert json.loads(out.read_text())["rows"] == rows
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--heldout", "3"])
    monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--heldout", "3"])
    with pytest.raises(AssertionError, match="pruned again"):
        accuracy.main()


def test_peers_are_measured_as_our_methods_are(
    llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    shared = f"--model {llama} --samples 8 --length 64 --heldout 2 --seeds 0 --device cpu --texts {folder}"
    domains = f"--domains {' '.join(HELDOUT)} --heldout-length 64"
    for command in (
        f"accuracy {shared} {domains} --methods magnitude --sparsities 0.5 --formats bf16",
        f"peers {shared} {domains} --methods magnitude hyperprune",
    ):
        name = command.split()[0]
        monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(tmp_path / f"{name}.json")])
        (accuracy if name == "accuracy" else peers).main()
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        found[name] = {(row["method"], row["domain"]): row["kl"] for row in rows if row["method"] != "dense"}
    assert len(found["peers"]) == 2 * len(HELDOUT)
    assert len(set(found["peers"].values())) == 2 * len(HELDOUT)
    assert found["accuracy"].items() <= found["peers"].items()


def test_what_was_pruned_is_healed(llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{llama.name}.jsonl").write_text((folder / "calibration.jsonl").read_text())
    out = tmp_path / "out.json"
    command = (
        f"accuracy --models {llama} --samples 8 --length 64 --heldout 2 --heldout-length 64 --seeds 0 --device cpu "
        f"--texts {folder} --domains docstrings --methods magnitude --sparsities 0.5 --formats bf16 "
        f"--variants calibration={tmp_path}/{{model}}.jsonl "
        "--heal samples=16,length=32,step_tokens=64,rate=0.01 samples=16,length=32,step_tokens=64,rate=0.00001"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(out)])
    accuracy.main()
    kl = {row["method"].partition(" healed ")[2]: row["kl"] for row in json.loads(out.read_text())["rows"]}
    once, much, little = kl.values()
    assert list(kl) == ["", *command.split()[-2:]]
    rows = [row for row in json.loads(out.read_text())["rows"] if row["sparsity"]]
    assert rows[0]["kl"] == once
    assert much < 0.95 * once
    assert little == pytest.approx(once, rel=0.02)

    def no_more(*_: object) -> None:
        raise AssertionError("pruned again")

    monkeypatch.setattr(accuracy, "prune", no_more)
    accuracy.main()


def test_variants_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "accuracy --methods spensegpt+ --sparsities 0.5 --formats bf16 --seeds 7 --variants layout=front,tune_steps=9"
    )
    monkeypatch.setattr(sys, "argv", given.split())
    (case,) = accuracy.cases(accuracy.parse())
    assert case == {"method": "spensegpt+ layout=front,tune_steps=9", "sparsity": 0.5, "format": "bf16", "seed": 7}
    assert accuracy.changes("layout=front,tune_steps=9,tune_rate=0.1,true_sequential=false") == {
        "layout": "front",
        "true_sequential": False,
        "tune_steps": 9,
        "tune_rate": 0.1,
    }
    assert accuracy.changes("calibration=builtin,seed=3,calibration=generated,calibration=a.txt") == {
        "calibration": ("builtin", "generated", "a.txt"),
        "seed": 3,
    }
    with pytest.raises(argparse.ArgumentTypeError, match="found layouts, expected one of activations, alignment"):
        accuracy.variant("layouts=front")
    with pytest.raises(argparse.ArgumentTypeError, match="found out, expected one of batch_tokens, calibration"):
        accuracy.heal_variant("out=elsewhere")
    assert accuracy.changes(accuracy.heal_variant("rate=.003,seed=07,train=all")) == {
        "rate": 0.003,
        "seed": 7,
        "train": "all",
    }
    with pytest.raises(argparse.ArgumentTypeError, match="found rate=x, expected numbers"):
        accuracy.heal_variant("rate=x")
    with pytest.raises(SpenseError, match="--rate: found 2, expected more than 0 and at most 1"):
        accuracy.heal_variant("rate=2")


def test_the_built_in_text_of_a_variant_is_that_of_the_folder_of_texts() -> None:
    both = {"calibration": ("builtin", "generated"), "seed": 3}
    assert accuracy.with_texts(both, None) == both
    assert accuracy.with_texts(both, Path("texts")) == {**both, "calibration": ("texts/calibration.jsonl", "generated")}
    three = {"calibration": DEFAULT_MIXTURE}
    assert accuracy.with_texts(three, None) == three
    assert accuracy.with_texts(three, Path("texts")) == {
        "calibration": ("texts/calibration.jsonl", "texts/calibration-code.jsonl", "generated")
    }
    assert accuracy.with_texts({"calibration": "generated"}, Path("texts")) == {"calibration": ("generated",)}
    assert accuracy.with_texts({"seed": 3}, Path("texts")) == {"seed": 3}


def test_mean_and_standard_error() -> None:
    assert quality_tables.mean([1.0, 2.0, 3.0], 3) == "2.000 ± 0.577"


def test_gains_are_ratios_of_losses_seed_by_seed() -> None:
    def row(method: str, form: str, seed: int, domain: str, perplexity: float, kl: float) -> accuracy.Row:
        sparsity = 0.0 if method == "dense" else 0.375
        return {"method": method, "sparsity": sparsity, "format": form, "seed": seed, "domain": domain} | {
            "perplexity": perplexity,
            "kl": kl,
        }

    rows = [row("dense", "bf16", 0, "a", 10, 0), row("dense", "bf16", 0, "b", 20, 0)]
    rows += [row("dense", "fp8", 0, "a", 10.5, 0.01), row("dense", "fp8", 0, "b", 20.5, 0.01)]
    for seed in (0, 1):
        rows += [row("spensegpt+", "fp8", seed, "a", 14, 0.4), row("spensegpt+", "fp8", seed, "b", 30, 0.5)]
        rows += [row("spensegpt++", "fp8", seed, "a", 12 + seed, 0.2), row("spensegpt++", "fp8", seed, "b", 24, 0.4)]
    # What nothing compares with is left out.
    rows.append(row("spensegpt++", "fp8", 0, "a", 99, 0.9) | {"sparsity": 0.5})
    *_, kl, perplexity = quality_tables.gains(rows)
    assert kl == "| 37.5% | KL | 0.500 ± 0.000 | 0.800 ± 0.000 | 0.650 ± 0.000 |"
    assert perplexity == "| 37.5% | perplexity loss | 0.625 ± 0.125 | 0.400 ± 0.000 | 0.512 ± 0.062 |"


def test_the_summary_puts_the_best_first_at_each_sparsity() -> None:
    def row(method: str, sparsity: float, domain: str, kl: float, form: str = "fp8", seed: int = 0) -> accuracy.Row:
        return {"method": method, "sparsity": sparsity, "format": form, "seed": seed, "domain": domain} | {
            "perplexity": 10 + kl,
            "kl": kl,
        }

    rows = [row("dense", 0.0, "a", 0.0, "bf16"), row("dense rounding=after", 0.0, "a", 0.02)]
    rows += [row("wanda", 0.5, "a", 2.0), row("sparsegpt", 0.5, "a", 0.5), row("sparsegpt", 0.5, "a", 1.5, seed=1)]
    rows += [row("spensegpt+", 0.25, "a", 0.25), row("dense rounding=everywhere", 0.0, "a", 0.01)]
    assert quality_tables.summary(rows) == [
        "| method | MLP sparsity | KL | perplexity, a |",
        "|---|---|---|---|",
        "| dense | 0.0% | 0.020 | 10.02 |",
        "| `spensegpt+` | 25.0% | 0.250 | 10.25 |",
        "| `sparsegpt` | 50.0% | 1.000 | 11.00 |",
        "| `wanda` | 50.0% | 2.000 | 12.00 |",
    ]


def test_what_fp8_adds_is_of_the_same_seed() -> None:
    def row(method: str, form: str, seed: int, perplexity: float, kl: float) -> accuracy.Row:
        return {"method": method, "format": form, "seed": seed, "domain": "a", "perplexity": perplexity, "kl": kl}

    rows = [row("dense", "bf16", 0, 8, 0.0)]
    for seed, bf16 in ((0, 10.0), (1, 20.0)):
        rows += [row("spensegpt+", "bf16", seed, bf16, 0.3), row("spensegpt+", "fp8", seed, 1.01 * bf16, 0.31)]
        rows.append(row("spensegpt+ rounding=after", "fp8", seed, (1.02 + 0.02 * seed) * bf16, 0.33))
    assert quality_tables.added_by_fp8(rows) == [
        "| method | a: perplexity, % | KL |",
        "|---|---|---|",
        "| `spensegpt+` | 1.0 ± 0.0 | 0.010 ± 0.000 |",
        "| `spensegpt+ rounding=after` | 3.0 ± 1.0 | 0.030 ± 0.000 |",
    ]


def test_several_models_have_a_table_each_and_old_names_are_read() -> None:
    def row(model: str, domain: str, **more: int) -> accuracy.Row:
        case = {"model": model, "method": "wanda", "sparsity": 0.5, "format": "fp8", "seed": 0, "domain": domain}
        return {**case, "perplexity": 10, "kl": 0.5, "prune_seconds": None, **more}

    old = [row("a", "docstrings"), row("a", "prose")]
    assert quality_tables.measured_on(quality_tables.renamed(old)) == "a on docstrings, reference"
    assert old[1]["domain"] == "prose"
    both = [row(model, domain, heldout=40, heldout_length=1024) for model in "ab" for domain in ("code", "handbook")]
    assert quality_tables.measured_on(both) == "a, b on code, handbook, 40 × 1024 tokens each"
    alone = quality_tables.of_each_model(both[:2], quality_tables.markdown)
    assert alone == quality_tables.markdown(both[:2])
    assert quality_tables.of_each_model(both, quality_tables.markdown) == ["a:", "", *alone, "", "b:", "", *alone]


def test_the_mean_over_models_is_of_what_all_of_them_have() -> None:
    def row(model: str, method: str, domain: str, kl: float) -> accuracy.Row:
        return {"model": model, "method": method, "sparsity": 0.25, "format": "fp8", "domain": domain, "kl": kl}

    healed = "spensegpt++ healed samples=9,rate=0.003,epochs=2"
    rows = [
        *(row("a", "spensegpt+", domain, 0.1) for domain in ("docs", "code")),
        *(row("b", "spensegpt+", domain, 0.4) for domain in ("docs", "code")),
        *(row("a", healed, domain, kl) for domain, kl in (("docs", 0.05), ("docs", 0.03), ("code", 0.1))),
        *(row("b", healed, domain, 0.12) for domain in ("docs", "code")),
        *(row("a", "wanda", domain, 0.9) for domain in ("docs", "code")),
        *({**row(model, "llmcompressor gptq", "docs", 0.3), "sparsity": 0.0, "format": "int4-g64"} for model in "ab"),
        *({**row(model, "llmcompressor gptq", "code", 0.1), "sparsity": 0.0, "format": "int4-g64"} for model in "ab"),
        *({**row(model, "dense", "docs", 0.1), "sparsity": 0.0} for model in "ab"),
    ]
    assert quality_tables.over_models(rows)[2:] == [
        "| GPTQ, four bits | 0.0% | 0.300 | 0.100 |",
        "| spensegpt+ | 25.0% | 0.250 (1.00) | 0.250 (1.00) |",
        # Of docs 0.04 / 0.1 and 0.12 / 0.4, of code 0.1 / 0.1 and 0.12 / 0.4.
        "| spensegpt++, healed at 0.003 | 25.0% | 0.080 (0.35) | 0.110 (0.65) |",
    ]
    mixed = "spensegpt++ calibration=builtin,calibration=generated"
    measured = {"gpu": {"name": "GPU"}, "rows": [*rows, *(row(model, mixed, "docs", 0.2) for model in "ab")]}
    measured["rows"] += [row(model, mixed, "code", 0.2) for model in "ab"]
    # What another file has of the same case was measured with something else.
    older = {"gpu": {"name": "GPU"}, "rows": [row(model, mixed, "docs", 9.0) for model in "ab"]}
    lines = quality_results.over_models(measured, older)
    assert "| spensegpt++, half of the text generated | 25.0% | 0.200 (1.25) | 0.200 (1.25) |" in lines


@pytest.mark.parametrize("code", ["builtin-code", "texts/packages-code.jsonl"])
def test_the_page_compares_what_the_default_method_leaves_with_its_own_steps(code: str) -> None:
    def row(method: str, kl: float) -> accuracy.Row:
        return {"model": "a", "method": method, "sparsity": 0.25, "format": "fp8", "domain": "docs", "kl": kl}

    three = f"calibration=builtin,calibration={code},calibration=generated"
    older = [row("spensegpt+", 0.4), row("spensegpt++ tune_steps=9", 0.3)]
    newer = [row(f"spensegpt++ {three}", 0.1), row(f"spensegpt+ {three}", 0.2)]
    newer += [row(f"spensegpt++ {three} healed samples=9{more}", kl) for more, kl in (("", 0.08), (",train=all", 0.04))]
    lines = quality_results.over_models_tuned(*({"gpu": {"name": "GPU"}, "rows": rows} for rows in (older, newer)))
    assert lines[2:6] == [
        "| spensegpt+ | 25.0% | 0.400 (1.00) |",
        "| spensegpt++, a third code, a third generated | 25.0% | 0.100 (0.25) |",
        "| spensegpt++, a third code, a third generated, healed | 25.0% | 0.080 (0.20) |",
        "| spensegpt++, a third code, a third generated, healed, all layers | 25.0% | 0.040 (0.10) |",
    ]
    assert lines[6] == ""
