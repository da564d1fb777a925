"""One-shot pruning of a Hugging Face causal LM into a Spense checkpoint.

The stable Python API, loaded when it is first asked for:

    from offline_prune import PruneSettings, prune

    report = prune(PruneSettings(model="Qwen/Qwen3-8B", out=Path("qwen3-8b-spense"), sparsity=0.375))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offline_prune.checkpoint.verify import verify
    from offline_prune.evaluation.evaluate import Evaluation, evaluate
    from offline_prune.healing.pipeline import heal
    from offline_prune.healing.report import HealReport
    from offline_prune.healing.settings import HealSettings
    from offline_prune.methods.recipe import METHODS, Grouping, Layout, Quantize, Rounding, Selection
    from offline_prune.pipeline import prune
    from offline_prune.report import Report
    from offline_prune.settings import PruneSettings

__all__ = [
    "METHODS",
    "Evaluation",
    "Grouping",
    "HealReport",
    "HealSettings",
    "Layout",
    "PruneSettings",
    "Quantize",
    "Report",
    "Rounding",
    "Selection",
    "evaluate",
    "heal",
    "prune",
    "verify",
]

_HOMES = {
    "prune": "pipeline",
    "verify": "checkpoint.verify",
    **dict.fromkeys(("evaluate", "Evaluation"), "evaluation.evaluate"),
    "heal": "healing.pipeline",
    "HealReport": "healing.report",
    "HealSettings": "healing.settings",
    "Report": "report",
    "PruneSettings": "settings",
    **dict.fromkeys(("METHODS", "Grouping", "Layout", "Quantize", "Rounding", "Selection"), "methods.recipe"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
