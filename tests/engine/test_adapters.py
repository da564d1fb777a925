"""Adapters of the original model, adapted and served: several in one batch, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import write_adapter
from engines import Completion, Run, generate, spread
from served import as_served

from offline_prune.checkpoint.adapter import adapt
from offline_prune.checkpoint.evaluate import load_dense

pytestmark = pytest.mark.engine

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapters(
    dense_models: dict[str, Path], spense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ...]:
    """One for all layers, one for the MLPs, one for down and attention."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = load_dense(dense_models["llama"])
    for seed, leaves in enumerate(([*ATTENTION, *MLP], MLP, [*ATTENTION, "down_proj"])):
        adapt(
            write_adapter(folder / f"{seed}", model, leaves, seed=seed), spense_checkpoint, folder / f"adapted-{seed}"
        )
    return tuple(folder / f"adapted-{seed}" for seed in range(3))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_says_what_transformers_says(ranks: int, adapters: tuple[Path, ...], spense_checkpoint: Path) -> None:
    run = Run(spense_checkpoint, "spense", ranks=ranks, adapters=adapters)
    found = generate([run])[run]

    def spreads(expected: list[Completion]) -> list[list[float]]:
        """Of the prompts without an adapter, and of those with each."""
        each = [spread([a], [b]) for a, b in zip(found, expected, strict=True)]
        return [each[start :: len(adapters) + 1] for start in range(len(adapters) + 1)]

    right = spreads(as_served(spense_checkpoint, adapters, ranks, found))
    others = spreads(as_served(spense_checkpoint, (*adapters[1:], adapters[0]), ranks, found))
    print(ranks, right, others)
