"""The same files, run sparse by Spense and dense by stock vLLM, generate the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import rank_ordered
from engines import Completion, Run, generate, require_as_near, require_same, require_those_of
from safetensors.torch import load_file, save_file

from vllm_spense.format import KEY

pytestmark = pytest.mark.engine

STOCK = "compressed-tensors"

Answers = dict[Run, list[Completion]]


@pytest.fixture(scope="module")
def overrides(spense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned Llama with other regions in its second layer: what is 2:4 may be called dense."""
    out = shutil.copytree(spense_checkpoint, tmp_path_factory.mktemp("overrides") / "llama")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"][KEY]["regions"]["overrides"] = {"model.layers.1.mlp": {"sparse": 128, "dense": 256}}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def wrong(spense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned Llama with one row of its first up a hundredth too large."""
    out = shutil.copytree(spense_checkpoint, tmp_path_factory.mktemp("wrong") / "llama")
    weights = load_file(out / "model.safetensors")
    scales = weights["model.layers.0.mlp.up_proj.weight_scale"]
    scales[7] *= 1.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def one_rank(spense_checkpoints: dict[str, Path], overrides: Path, wrong: Path) -> Answers:
    """Every engine of the tests on one rank."""
    llama = spense_checkpoints["llama"]
    runs = [
        *(Run(spense_checkpoints[name], q) for name in ("llama", "bias", "phi3") for q in ("spense", STOCK)),
        *(Run(llama, q, compiled=True) for q in ("spense", STOCK)),
        # Without the flag.
        Run(spense_checkpoints["bias"], None, reload=True),
        Run(llama, "spense", load_format="dummy"),
        Run(overrides, "spense"),
        Run(wrong, "spense"),
    ]
    return generate(runs)


@pytest.mark.parametrize("name", ["llama", "bias", "phi3"])
def test_eager(one_rank: Answers, spense_checkpoints: dict[str, Path], name: str) -> None:
    folder = spense_checkpoints[name]
    require_same(one_rank[Run(folder, "spense")], one_rank[Run(folder, STOCK)])


def test_a_wrong_row_would_be_noticed(one_rank: Answers, spense_checkpoint: Path, wrong: Path) -> None:
    with pytest.raises(AssertionError):
        require_same(one_rank[Run(wrong, "spense")], one_rank[Run(spense_checkpoint, STOCK)])


def test_compiled(one_rank: Answers, spense_checkpoint: Path) -> None:
    """A norm that the compiler sums in another order rounds other activations to other FP8 values.

    How much that moves the numbers is measured on stock vLLM itself, as it goes from eager to compiled.
    """
    ours = one_rank[Run(spense_checkpoint, "spense", compiled=True)]
    eager, stock = (one_rank[Run(spense_checkpoint, STOCK, compiled)] for compiled in (False, True))
    require_as_near(ours, stock, eager)


def test_without_the_flag_and_reloaded(one_rank: Answers, spense_checkpoints: dict[str, Path]) -> None:
    # Bit for bit: it is the same execution, and another one than stock's.
    folder = spense_checkpoints["bias"]
    assert one_rank[Run(folder, None, reload=True)] == one_rank[Run(folder, "spense")]
    assert one_rank[Run(folder, None, reload=True)] != one_rank[Run(folder, STOCK)]


def test_regions_of_single_layers(one_rank: Answers, overrides: Path, spense_checkpoint: Path) -> None:
    require_same(one_rank[Run(overrides, "spense")], one_rank[Run(spense_checkpoint, STOCK)])


def test_dummy_weights(one_rank: Answers, spense_checkpoint: Path) -> None:
    completions = one_rank[Run(spense_checkpoint, "spense", load_format="dummy")]
    assert all(len(completion.tokens) == 32 for completion in completions)
    assert completions != one_rank[Run(spense_checkpoint, "spense")]


@pytest.fixture(scope="module")
def rank_ordered_checkpoint(spense_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_ordered(spense_checkpoint, tmp_path_factory.mktemp("ranks") / "llama", 2)


@pytest.fixture(scope="module")
def two_ranks(spense_checkpoint: Path, rank_ordered_checkpoint: Path) -> Answers:
    """Every engine of the tests on two ranks."""
    return generate(
        [
            *(Run(spense_checkpoint, "spense", compiled, ranks=2) for compiled in (True, False)),
            Run(rank_ordered_checkpoint, None, ranks=2),
        ]
    )


def test_two_ranks_against_the_same_parts(
    two_ranks: Answers, spense_checkpoint: Path, rank_ordered_checkpoint: Path
) -> None:
    """Stock vLLM on a file whose contiguous chunks are our parts does the same arithmetic on the same rank."""
    require_same(
        two_ranks[Run(spense_checkpoint, "spense", ranks=2)], two_ranks[Run(rank_ordered_checkpoint, None, ranks=2)]
    )


def test_two_compiled_ranks(one_rank: Answers, two_ranks: Answers, spense_checkpoint: Path) -> None:
    """Compiled they are as near to the eager ones, which are stock's, as stock comes to itself on one rank."""
    ours, eager = (two_ranks[Run(spense_checkpoint, "spense", compiled, ranks=2)] for compiled in (True, False))
    one, compiled = (one_rank[Run(spense_checkpoint, STOCK, compiled)] for compiled in (False, True))
    require_those_of(ours, eager, (one, compiled))
