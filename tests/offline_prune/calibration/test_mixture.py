"""Several sources of calibration text: equal shares, an order that the seed decides, errors that name the source."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run
from tiny_models import byte_tokenizer

from offline_prune.calibration.data import calibration_tokens
from offline_prune.calibration.mixture import DEFAULT_MIXTURE, drawn, mixed, shares, source_names
from offline_prune.checkpoint.verify import open_checkpoint
from offline_prune.healing.settings import HealSettings
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files, each of one letter."""
    folder = tmp_path_factory.mktemp("letters")
    for letter in "abc":
        (folder / f"{letter}.txt").write_text(letter * 4000)
    return [str(folder / f"{letter}.txt") for letter in "abc"]


def test_shares_are_equal_and_rounded() -> None:
    assert shares(("x",), 5) == {"x": 5}
    assert shares(("x", "y"), 64) == {"x": 32, "y": 32}
    assert shares(("x", "y", "z"), 8) == {"x": 3, "y": 3, "z": 2}
    with pytest.raises(SpenseError, match="--samples: found 2, expected at least 3, one of each --calibration"):
        shares(("x", "y", "z"), 2)


def test_the_dense_model_writes_no_more_than_it_may_where_others_can() -> None:
    assert shares(("x", "generated"), 64, 40) == {"x": 32, "generated": 32}
    assert shares(("generated", "x", "y"), 64, 11) == {"generated": 11, "x": 27, "y": 26}
    assert shares(("generated",), 64, 11) == {"generated": 64}
    settings = PruneSettings("model", Path("out"), calibration=("builtin", "generated"))
    assert settings.shares == {"builtin": 112, "generated": 16}
    short = PruneSettings("model", Path("out"), calibration=("builtin", "generated"), length=512)
    assert short.shares == {"builtin": 64, "generated": 64}


def test_the_default_mixture_has_equal_shares_of_three_sources() -> None:
    assert DEFAULT_MIXTURE == ("builtin", "builtin-code", "generated")
    settings = PruneSettings("model", Path("out"), calibration=DEFAULT_MIXTURE, length=4096)
    assert settings.shares == {"builtin": 43, "builtin-code": 43, "generated": 42}
    longer = PruneSettings("model", Path("out"), calibration=DEFAULT_MIXTURE)
    assert longer.shares == {"builtin": 56, "builtin-code": 56, "generated": 16}


def test_built_in_sources_are_mixed_as_the_seed_says() -> None:
    def text(seed: int) -> torch.Tensor:
        sources = ("builtin", "builtin-code")
        parts = drawn(shares(sources, 6), TOKENIZER, 64, seed, lambda _: None)
        for name in sources:
            assert torch.equal(parts[name], calibration_tokens(name, TOKENIZER, 3, 64, seed))
        assert not torch.equal(*parts.values())
        return mixed(parts, sources, seed)

    assert torch.equal(text(0), text(0))
    assert not torch.equal(text(0), text(1))


def test_a_source_gives_what_it_would_give_alone(letters: list[str]) -> None:
    said: list[str] = []
    parts = drawn(shares([*letters, "generated"], 10), TOKENIZER, 16, 0, said.append)
    assert {name: len(part) for name, part in parts.items()} == dict(zip(letters, (3, 3, 2), strict=True))
    for name, part in parts.items():
        assert torch.equal(part, calibration_tokens(name, TOKENIZER, len(part), 16, 0))


def test_the_seed_decides_the_order_and_each_sources_own_stays() -> None:
    parts = {"x": torch.arange(0, 40).view(20, 2), "y": torch.arange(100, 140).view(20, 2), "z": torch.zeros(1, 2)}
    parts["z"] = parts["z"].long()
    text = mixed(parts, tuple(parts), 0)
    assert torch.equal(text, mixed(parts, tuple(parts), 0))
    assert not torch.equal(text, mixed(parts, tuple(parts), 1))
    assert torch.equal(text.sort(dim=0).values, torch.cat(list(parts.values())).sort(dim=0).values)
    for found in (text[(text[:, 1] > 0) & (text[:, 1] < 100)], text[text[:, 0] >= 100]):
        assert torch.equal(found, found.sort(dim=0).values)
    assert 4 < (text[:20, 0] >= 100).sum() < 16, "neither source comes first"
    assert torch.equal(mixed({"x": parts["x"]}, ("x",), 7), parts["x"]), "alone it is as before"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "--calibration: found nothing, expected at least one source"),
        (("a.txt", "builtin", "a.txt"), "--calibration: found a.txt 2 times, expected every source once"),
    ],
)
def test_names(given: tuple[str, ...], words: str) -> None:
    with pytest.raises(SpenseError, match=words):
        source_names(given)


def test_settings_hold_a_tuple_however_it_was_given() -> None:
    kinds: list[Any] = [
        partial(PruneSettings, "model", Path("out")),
        partial(HealSettings, Path("pruned"), Path("out"), "teacher"),
    ]
    for kind in kinds:
        one, many = (kind(calibration=given) for given in ("builtin", ["builtin", "generated"]))
        assert (one.sources, many.sources) == (("builtin",), ("builtin", "generated"))
        assert (one.calibration, many.calibration) == (one.sources, many.sources)
        with pytest.raises(SpenseError, match="--samples: found 2, expected at least 3"):
            kind(calibration=("a", "b", "c"), samples=2)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("/no/such.txt", "/no/such.txt: no such file"),
        ("short.txt", r"short.txt: found 6 tokens, expected at least 256 \(4 samples × 64\)"),
    ],
)
def test_an_error_names_which_of_several(
    other: str, words: str, llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    with pytest.raises(SpenseError, match=words):
        run(llama, tmp_path / "out", text, calibration=(str(text), other))
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_says_of_which_sources(llama: Path, tmp_path: Path, letters: list[str]) -> None:
    report = run(llama, tmp_path / "out", Path(), method="magnitude", calibration=letters[:2])
    assert report.settings["calibration"] == tuple(letters[:2])
    calibration = open_checkpoint(tmp_path / "out").annotation.calibration
    assert calibration is not None
    assert calibration.source == " + ".join(letters[:2])
