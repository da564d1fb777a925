"""Pruned experts say what transformers' model of the same files says: compiled, and on two ranks either way."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Completion, Run, generate, spread
from served import as_served

from benchmarks.served_models import make_pruned

pytestmark = pytest.mark.engine

#: Nats. Attention is computed in other ways here, and ranks' parts are added in another order, so that some activations
#: are rounded to other FP8 values: see test_adapters. A quarter of the completions and more have none, and are the same
#: but for the order of sums; a wrong product moves all.
SOME, ALL = 1e-3, 0.5


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a shared expert beside eight routed ones."""
    return make_pruned("Qwen2-MoE", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def answers(shared: Path) -> dict[Run, list[Completion]]:
    return generate([Run(shared, "spense", compiled=True), *(on_two_ranks(shared, either) for either in (False, True))])


def on_two_ranks(checkpoint: Path, expert_parallel: bool) -> Run:
    return Run(checkpoint, "spense", ranks=2, expert_parallel=expert_parallel)


def require_twin(found: list[Completion], checkpoint: Path, ranks: int, expert_ranks: int) -> None:
    expected = as_served(checkpoint, (), ranks, found, expert_ranks)
    apart = sorted(spread([a], [b]) for a, b in zip(found, expected, strict=True))
    assert apart[len(apart) // 4] <= SOME, apart
    assert apart[-1] <= ALL, apart


def test_compiled(shared: Path, answers: dict[Run, list[Completion]]) -> None:
    require_twin(answers[Run(shared, "spense", compiled=True)], shared, 1, 1)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_on_two_ranks(expert_parallel: bool, shared: Path, answers: dict[Run, list[Completion]]) -> None:
    found = answers[on_two_ranks(shared, expert_parallel)]
    require_twin(found, shared, 2, 1 if expert_parallel else 2)
