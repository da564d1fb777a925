"""Perplexity of every method at every sparsity and format on held-out text.

    python -m benchmarks.perplexity

Any model folder will do; without `--model` it is SmolLM2-135M-Instruct. Pruned checkpoints are kept in .demo/ and
reused while neither their settings nor the pruner change.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks.command_line import add_out, positive, readable_folder, run_main
from benchmarks.envelope import write_result
from benchmarks.quality_tables import by_format
from offline_prune.calibration.data import heldout_tokens
from offline_prune.checkpoint.dense_model import load_dense, perplexity
from scripts.pruned import CACHE, Pruning, pruned
from scripts.smollm2 import smollm2

#: Method and MLP sparsity, in the order of the table. "dense" prunes nothing.
CASES = {
    "dense": (("dense", 0.0),),
    "spensegpt+": (("spensegpt+", 0.25), ("spensegpt+", 0.375)),
    "spensegpt": (("spensegpt", 0.25), ("spensegpt", 0.375)),
    "sparsegpt": (("sparsegpt", 0.5),),
    "wanda": (("wanda", 0.5),),
}
#: The checkpoint's format and what `spense prune --quantize` calls it.
FORMATS = {"bf16": "none", "fp8": "fp8"}
DOMAIN = "docstrings"

Row = dict[str, str | int | float | None]


def main() -> None:
    options = parse()
    console = Console(stderr=True)
    model = options.model or smollm2(CACHE / "smollm2-135m")
    rows: list[Row] = []
    for method, sparsity in (case for name in options.methods for case in CASES[name]):
        for form in options.formats:
            rows.append(measure(model, method, sparsity, form, options))
            console.print(f"{method} {sparsity:.1%} {form}: {rows[-1]['perplexity']:.3f}")
    write_result(options.out, "perplexity", rows)
    print("\n".join(by_format(rows)))
    console.print(f"written: {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=readable_folder, help="a dense model [default: SmolLM2-135M-Instruct]")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), metavar="METHOD")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--samples", type=positive, default=64, help="calibration sequences")
    parser.add_argument("--length", type=positive, default=512, help="tokens in each sequence")
    parser.add_argument("--heldout", type=positive, default=32, help="sequences that perplexity is measured on")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text's order")
    add_out(parser, "perplexity-smollm2")
    return parser.parse_args()


def measure(model: Path, method: str, sparsity: float, form: str, options: argparse.Namespace) -> Row:
    """One row: prunes, unless that was done before, and measures on text that no calibration has seen."""
    checkpoint, seconds = model, None
    if (method, form) != ("dense", "bf16"):
        # At sparsity 0 every method is only the quantization.
        pruner = "magnitude" if method == "dense" else method
        pruning = Pruning(pruner, sparsity, FORMATS[form], options.samples, options.length, options.seed)
        checkpoint = pruned(model, pruning)
        seconds = json.loads((checkpoint / "report.json").read_text())["seconds"]
    loaded, tokenizer = load_dense(checkpoint)
    tokens = heldout_tokens(tokenizer, options.heldout, options.length)
    return {
        "model": model.name,
        "method": method,
        "sparsity": sparsity,
        "format": form,
        "seed": options.seed,
        "domain": DOMAIN,
        "perplexity": perplexity(loaded, tokens),
        "prune_seconds": seconds,
    }


if __name__ == "__main__":
    run_main(main)
