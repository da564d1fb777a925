"""Prunes a model from Python.

    python examples/prune.py MODEL OUT [--sparsity 0.375] [--method spensegpt++] [--calibration FILE]

MODEL is a folder or a hub name. By default it calibrates on little text that needs no download, for a
trial; see `--samples` and `--length`. Needs `pip install '.[prune]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

from offline_prune import PruneSettings, prune
from vllm_spense.errors import SpenseError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.375)
    parser.add_argument("--method", default="spensegpt++")
    parser.add_argument("--calibration", default="builtin", help="a data set, a file, or `builtin`")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()

    try:
        settings = PruneSettings(**vars(options))
        report = prune(settings, progress=lambda done, blocks, name: print(f"{done}/{blocks} {name}"), say=print)
    except SpenseError as error:
        # One line for whoever asked; settings are checked before any work.
        sys.exit(f"error: {error}")

    worst = max(report.layers, key=lambda layer: layer.down.loss)
    print(f"{options.out}: {report.mlp_sparsity:.1%} of the MLP weights are zero, in {report.seconds:.0f} s")
    print(f"relative error of down: median {median(layer.down.loss for layer in report.layers):.4f}, ", end="")
    print(f"largest {worst.down.loss:.4f} in {worst.name}")


if __name__ == "__main__":
    main()
