"""FP8 scales of each output channel, by the largest weight or by the least squared error: what the choice is worth.

    python -m benchmarks.fp8_scales

rounds all linear layers of SmolLM2-135M-Instruct but the head to the nearest values both ways, unpruned, and compares
the models with the original one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.accuracy import Row, measured
from benchmarks.command_line import add_out, positive, run_main
from benchmarks.envelope import write_result
from benchmarks.quality_tables import rounding_errors
from benchmarks.texts import heldout
from offline_prune.calibration.heldout import HELDOUT
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.methods.fp8 import COMPENSATION_HEADROOM, channel_scales, least_squares_scales, round_to_fp8
from offline_prune.model.loading import SourceModel
from scripts.pruned import CACHE
from scripts.smollm2 import smollm2

RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max": channel_scales,
    f"max × {COMPENSATION_HEADROOM}": lambda weight: channel_scales(weight, COMPENSATION_HEADROOM),
    "squared error": least_squares_scales,
}


def main() -> None:
    options = parse()
    folder = smollm2(CACHE / "smollm2-135m")
    reference, tokenizer = load_dense(folder)
    texts = {name: heldout(name, tokenizer, options.heldout, options.length, None) for name in HELDOUT}
    rows: list[Row] = []
    for rule, scales in RULES.items():
        model, _ = load_dense(folder)
        error = power = 0.0
        for name in SourceModel(str(folder)).linears():
            weight = model.get_submodule(name).weight
            rounded = round_to_fp8(weight, scales(weight))
            error += (rounded - weight).square().sum().item()
            power += weight.square().sum().item()
            weight.copy_(rounded)
        case = {"model": folder.name, "method": f"scales by {rule}", "sparsity": 0.0, "format": "fp8", "seed": 0}
        found = measured(model, reference, texts, case, None)
        rows += [{**row, "relative_squared_error": error / power} for row in found]
        write_result(options.out, "fp8_scales", rows)
    print("\n".join(rounding_errors(rows)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_scales", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--heldout", type=positive, default=8, help="sequences of each held-out text")
    parser.add_argument("--length", type=positive, default=512, help="tokens in each sequence")
    add_out(parser, "fp8_scales")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
