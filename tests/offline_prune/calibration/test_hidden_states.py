"""The stream of hidden states: through blocks of several kinds, and in as much memory as was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import zoo
from benchmarks.zoo import Architecture
from offline_prune.calibration import hidden_states
from offline_prune.calibration.hidden_states import Stream
from offline_prune.memory_plan import memory_plan
from offline_prune.model.experts import Mixture
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.loading import SourceModel
from offline_prune.settings import PruneSettings

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
#: Linear and full attention before a dense MLP, and before experts.
FOUR_KINDS = {
    "layer_types": 2 * ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
}


def test_every_kind_of_block_is_entered_where_its_own_attention_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.SPECIAL, "KimiLinearConfig", FOUR_KINDS)
    architecture = Architecture("kimi_linear", "KimiLinearForCausalLM")
    zoo.tiny_model(architecture, tmp_path / "model")
    source = SourceModel(str(tmp_path / "model"))
    assert [type(block.mlp) for block in source.blocks] == [GatedMlp, GatedMlp, Mixture, Mixture]
    found: list[Any] = []
    find = hidden_states.find_split
    monkeypatch.setattr(hidden_states, "find_split", lambda *given: found.append(find(*given)) or found[-1])
    zoo._require_same_stream(source, tmp_path, TOKENS)
    assert len(found) == 3, "the last block is not passed"
    assert all(found)


@pytest.mark.parametrize(
    ("model_type", "name", "more"),
    [
        ("llama", "LlamaForCausalLM", 0),
        # Four layers, each with an input of 16 numbers.
        ("gemma4_text", "Gemma4ForCausalLM", 4 * 16),
        # The same, and four hidden states of a token.
        ("gemma3n_text", "Gemma3nForCausalLM", 4 * 16 + 3 * zoo.HIDDEN),
    ],
)
def test_activations_take_what_was_planned(
    model_type: str, name: str, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.tiny_model(Architecture(model_type, name), tmp_path / "model")
    source = SourceModel(str(tmp_path / "model"))
    taken: list[int] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, *_: object) -> torch.Tensor:
        room = torch.empty(shape, dtype=dtype)
        taken.append(room.nbytes)
        return room

    monkeypatch.setattr(hidden_states, "allocate", allocate)
    Stream(source, TOKENS, CPU, torch.float32, 48)
    settings = PruneSettings(
        str(tmp_path / "model"), tmp_path / "out", method="spensegpt+", samples=4, length=24, device="cpu"
    )
    assert sum(taken) == TOKENS.numel() * 4 * (zoo.HIDDEN + more)
    assert memory_plan(source, settings, CPU, torch.float32).activations == sum(taken)
