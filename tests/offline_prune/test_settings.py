"""What a method does unless told otherwise, and what an annotation keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offline_prune.methods.recipe import METHODS
from offline_prune.settings import PruneSettings


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
