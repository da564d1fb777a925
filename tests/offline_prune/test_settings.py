"""What a method does unless told otherwise, and what an annotation keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offline_prune.healing.settings import HealSettings
from offline_prune.methods.recipe import METHODS
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError


def settings(**options: Any) -> PruneSettings:
    return PruneSettings("model", Path("out"), **options)


def test_an_option_stands_for_what_the_method_does() -> None:
    """Given or not: the same settings are recorded, the same is done."""
    method = METHODS["spensegpt++"]
    given = settings(
        method="spensegpt++",
        selection=method.selection,
        grouping=method.grouping,
        rounding=method.rounding,
        dense_first=method.dense_first,
        tune_steps=method.tune_steps,
        descent_passes=method.descent_passes,
    )
    assert given.recipe.recorded() == settings(method="spensegpt++").recipe.recorded()
    assert given.recipe.recorded()["descent_passes"] == 1


def test_an_image_share_without_images_is_refused() -> None:
    assert settings().wanted_image_share == settings(calibration_images="random").wanted_image_share == 0.5
    assert settings().resolved()["image_share"] == 0.5
    with pytest.raises(SpenseError, match=r"^--image-share: found 0\.25 without --calibration-images$"):
        settings(image_share=0.25)
    assert replace(settings(calibration_images="random", image_share=0.25), samples=64).wanted_image_share == 0.25


@pytest.mark.parametrize(("option", "value"), [("tune_rate", 0.01), ("tune_loss", "fisher")])
def test_what_tuning_takes_is_refused_without_tuning(option: str, value: Any) -> None:
    expected = (
        rf"^--{option.replace('_', '-')}: found {value} without tuning, expected --tune-steps of at least 1 with it$"
    )
    for untuned in ({"method": "spensegpt+"}, {"method": "spensegpt++", "tune_steps": 0}):
        with pytest.raises(SpenseError, match=expected):
            settings(**untuned, **{option: value})
    for tuned in ({"method": "spensegpt++"}, {"method": "wanda", "tune_steps": 1}):
        assert getattr(settings(**tuned, **{option: value}).recipe, option) == value
    assert settings().recipe.tune_rate == settings().resolved()["tune_rate"] == 0.016


@pytest.mark.parametrize("make", [settings, partial(HealSettings, Path("pruned"), Path("out"), "teacher")])
def test_a_run_either_goes_on_or_starts_anew(make: Callable[..., object]) -> None:
    for option in ("overwrite", "resume"):
        make(**{option: True})
    with pytest.raises(SpenseError, match=r"^--overwrite, --resume: found both, expected one: "):
        make(overwrite=True, resume=True)


@pytest.mark.parametrize("make", [settings, partial(HealSettings, Path("pruned"), Path("out"), "teacher")])
@pytest.mark.parametrize(
    ("found", "meant"),
    [
        ("builtn", "builtin"),
        ("Builtin", "builtin"),
        ("built-in", "builtin"),
        ("builtin_code", "builtin-code"),
        ("generate", "generated"),
    ],
)
def test_a_misspelled_source_is_not_looked_for_elsewhere(
    make: Callable[..., object], found: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpenseError, match=f"^--calibration: found {found}; did you mean {meant}\\?$"):
        make(calibration=("builtin-code" if meant == "builtin" else "builtin", found))
    for other in ("builtin", "builtin-code", "generated", "wikitext", "me/builtin", "a/generated", "c4"):
        make(calibration=other)
    (tmp_path / found).mkdir()
    make(calibration=found)
