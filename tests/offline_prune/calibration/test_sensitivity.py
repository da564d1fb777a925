"""Gradients that are taken block by block, against those of the whole model at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from offline_prune.calibration.sensitivity import backwards, channel_weights, some_of
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.model.loading import SourceModel

CPU = torch.device("cpu")


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", ["llama", "gemma3", "modernbert-decoder"])
def test_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / family)
    tokens = torch.randint(0, 250, (3, 20), generator=torch.Generator().manual_seed(0))
    source, (model, _) = SourceModel(str(folder)), load_dense(folder)
    found = {}
    for index, _, calls in backwards(source, tokens, CPU, torch.float32, seed=5):
        found[index] = torch.cat([call.gradient for call in calls]), torch.cat([call.output for call in calls])
        size = found[index][1].square().sum(-1, keepdim=True)
        expected = (found[index][0].square() * size).sum((0, 1))
        weights = channel_weights(calls)
        torch.testing.assert_close(weights / weights.mean(), expected / expected.mean())
        shares = (found[index][1].square() / size).mean((0, 1))
        assert (weights @ shares).item() == pytest.approx(1, rel=1e-4), "an error as large as the output is one of 1"
    assert list(found) == list(reversed(range(len(source.blocks))))
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())

    random, outputs = torch.Generator().manual_seed(5), [model.get_submodule(block.name) for block in source.blocks]
    for i, sequence in enumerate(tokens.split(1)):
        kept: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, __: object, output: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            if not kept:
                output.requires_grad_()
            output.retain_grad()
            kept.append(output)

        hooks = [block.register_forward_hook(keep) for block in outputs]
        logits = model(input_ids=sequence, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random).squeeze(1)
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for index, output in enumerate(kept):
            torch.testing.assert_close(found[index][0][i : i + 1], output.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found[index][1][i : i + 1], output.detach(), rtol=1e-3, atol=1e-4)


def test_some_sequences_are_spread_over_the_text() -> None:
    text = torch.arange(100).view(100, 1).expand(100, 600)
    found = some_of(text)
    assert found.shape == (15, 512)
    assert found[:, 0].tolist() == list(range(0, 100, 7))
    assert some_of(text[:3, :9]).shape == (3, 9)
