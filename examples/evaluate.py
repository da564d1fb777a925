"""Compares a pruned checkpoint with the model that it was made from, on your own text.

    python examples/evaluate.py ORIGINAL PRUNED [--text FILE] [--device cuda]

Without a text it takes docstrings, Python's reference and code of this installation. `spense evaluate` does the same.
Needs `pip install '.[prune]'`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offline_prune import evaluate
from vllm_spense.errors import SpenseError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("pruned")
    parser.add_argument("--text", type=Path, help="a .txt, .jsonl or .parquet file that calibration has not seen")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    texts = [options.text] if options.text else []
    sizes = options.samples, options.length
    try:
        found = evaluate(options.pruned, options.original, texts, *sizes, options.device, say=print)
    except SpenseError as error:
        sys.exit(f"error: {error}")
    for loss in found.domains:
        print(f"{loss.domain}, {loss.sequences} × {loss.length} tokens:")
        print(f"  perplexity            dense {loss.perplexity_model:.2f}, pruned {loss.perplexity_pruned:.2f}")
        print(f"  KL(dense ‖ pruned)    {loss.kl:.4f} nats per token")
        print(f"  same likeliest token  {loss.top1_agreement:.1%} of the positions")


if __name__ == "__main__":
    main()
