"""On how much text SpenseGPT+'s choice of dense indices depends.

    python benchmarks/selection_tokens.py MODEL

takes the diagonal of the Hessian of every down projection of a dense model from evenly spread parts of the calibration
text and from all of it, and compares the sets of dense indices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command_line import add_out, mlp_sparsity, positive, run_main
from benchmarks.envelope import write_result
from offline_prune.calibration.data import calibration_tokens
from offline_prune.calibration.hessian import Energy
from offline_prune.calibration.hidden_states import Stream
from offline_prune.methods.dense_selection import order_by_priority, spensegpt_plus_priority
from offline_prune.methods.regions import fit_regions
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.loading import SourceModel
from offline_prune.runtime.device import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=positive, default=512)
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--sparsity", type=mlp_sparsity, default=0.375)
    add_out(parser, "selection_tokens")
    options = parser.parse_args()

    model = SourceModel(options.model)
    tokens = calibration_tokens(options.calibration, model.tokenizer, options.samples, options.length, 0)
    layers = list(overlaps(model, tokens, options.sparsity))
    write_result(
        options.out,
        "selection_tokens",
        [
            {
                "model": Path(options.model).name,
                "sparsity": options.sparsity,
                "all_tokens": tokens.numel(),
                "tokens": part,
                "overlap_mean": statistics.mean(layer[part] for layer in layers),
                "overlap_least": min(layer[part] for layer in layers),
            }
            for part in layers[0]
        ],
    )


class _Squares:
    """Σ x_j² of each sample."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []

    def __call__(self, inputs: torch.Tensor, part: int) -> None:
        self.sums.append(inputs.float().square().sum(0))


@torch.inference_mode()
def overlaps(model: SourceModel, tokens: torch.Tensor, sparsity: float) -> Iterator[dict[int, float]]:
    """Of each layer: number of tokens → share of the dense indices that all tokens would choose too."""
    device = pick_device("auto")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    samples, length = tokens.shape
    stream = Stream(model, tokens, device, dtype, batch_tokens=length)
    for index, block in enumerate(model.blocks):
        module, mlp = model.load(block.name, device, dtype), block.mlp
        assert isinstance(mlp, GatedMlp)
        regions, _ = fit_regions(mlp.intermediate, sparsity, None, block.name)
        energy, samples_seen = Energy(mlp.hidden, device), _Squares()
        stream.attend(index, module, mlp, energy.add, samples_seen)
        gate, up = torch.cat([layer.weight for layer in mlp.gate_up(module)]).chunk(2)
        dense = {}
        diagonal = energy.diagonal()
        for share in (1, 2, 4, 8, 16, 32, 64):
            mid = torch.stack(samples_seen.sums[::share]).sum(0)
            priority = spensegpt_plus_priority(gate, up, mlp.down(module).weight, diagonal, mid)
            dense[share] = set(order_by_priority(priority, regions)[regions.sparse :].tolist())
        yield {samples // share * length: len(dense[share] & dense[1]) / regions.dense for share in dense}
        stream.advance(index, module, block.name)
        model.unload(block.name)
        print(block.name, flush=True)


if __name__ == "__main__":
    run_main(main)
