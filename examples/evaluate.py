"""Compares a pruned checkpoint with the model that it was made from, on your own text.

    python examples/evaluate.py ORIGINAL PRUNED [--text FILE] [--device cuda]

Both are folders. Without a text it takes docstrings of installed packages. Needs `pip install '.[prune]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offline_prune.calibration.data import calibration_tokens, heldout_tokens
from offline_prune.checkpoint.evaluate import agreement, load_dense, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("--text", help="a .txt, .jsonl or .parquet file that calibration has not seen")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    dense, tokenizer = load_dense(options.original, options.device)
    pruned, _ = load_dense(options.pruned, options.device)
    if options.text:
        tokens = calibration_tokens(options.text, tokenizer, options.samples, options.length, seed=0)
    else:
        tokens = heldout_tokens(tokenizer, options.samples, options.length)

    found = agreement(pruned, dense, tokens)
    print(f"perplexity            dense {perplexity(dense, tokens):.2f}, pruned {found.perplexity:.2f}")
    print(f"KL(dense ‖ pruned)    {found.kl:.4f} nats per token")
    print(f"same likeliest token  {found.top1_agreement:.1%} of the positions")


if __name__ == "__main__":
    main()
