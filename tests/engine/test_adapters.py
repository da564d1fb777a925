"""Adapters of the original model, adapted and served: several in one batch, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import write_adapter
from engines import Completion, Run, generate, spread
from served import as_served

from offline_prune.checkpoint.adapter import adapt
from offline_prune.checkpoint.dense_model import load_dense

pytestmark = pytest.mark.engine

#: Nats. Attention is computed in other ways here, so that some activations are rounded to other FP8 values, which makes
#: 0.06. An adapter in another's place makes 5.
BOUND = 0.5

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


@pytest.fixture(scope="module")
def answers(adapters: tuple[Path, ...], spense_checkpoint: Path) -> dict[int, list[Completion]]:
    """By number of ranks."""
    runs = {ranks: Run(spense_checkpoint, "spense", ranks=ranks, adapters=adapters) for ranks in (1, 2)}
    found = generate([*runs.values()])
    return {ranks: found[run] for ranks, run in runs.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_says_what_transformers_says(
    ranks: int, answers: dict[int, list[Completion]], adapters: tuple[Path, ...], spense_checkpoint: Path
) -> None:
    found = answers[ranks]

    def spreads(dealt: tuple[Path, ...]) -> list[float]:
        expected = as_served(spense_checkpoint, dealt, ranks, found)
        return [spread([a], [b]) for a, b in zip(found, expected, strict=True)]

    assert max(spreads(adapters)) < BOUND
    others = spreads((*adapters[1:], adapters[0]))
    assert min(others[i] for i in range(len(others)) if i % (len(adapters) + 1)) > BOUND
