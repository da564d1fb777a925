"""Other people's compression against ours: llmcompressor's, and masks that are learned.

    python -m venv .peer && .peer/bin/pip install 'llmcompressor>=0.11'
    python -m benchmarks.peers
    python -m benchmarks.peers --methods magnitude wanda hyperprune proxsparse "patch 25%" "patch 37.5%" \\
        "spensegpt+ 25%" "spensegpt+ 37.5%" --out benchmarks/results/learned-smollm2.json
    python -m benchmarks.peers --models smollm2-135m gemma3-270m qwen2.5-coder-0.5b \\
        --methods "llmcompressor gptq" --out benchmarks/results/peers-int4.json

prunes the MLPs of SmolLM2-135M-Instruct to 2:4 without rounding, or with GPTQ rounds all linear layers but lm_head to
four bits, all methods on the same calibration tokens, and compares the results, stored in BF16, with the dense model as
`benchmarks.accuracy` does, whose `--models`, `--domains`, `--texts` and `--device` it has. The same command goes on
where it was cut off.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.accuracy import (
    Row,
    add_data_options,
    calibration_source,
    earlier_rows,
    heldout_texts,
    measured,
    model_folder,
    write_beside,
)
from benchmarks.baselines import hyperprune, patch, proxsparse
from benchmarks.command_line import add_out, run_main
from benchmarks.envelope import ROOT
from benchmarks.quality_tables import INT4, markdown, of_each_model
from benchmarks.texts import CALIBRATION, require
from offline_prune.calibration.data import calibration_tokens
from offline_prune.checkpoint.dense_model import load_dense
from offline_prune.model.gated_mlp import GatedMlp
from offline_prune.model.loading import SourceModel
from offline_prune.model.skeleton import empty_model
from offline_prune.pipeline import prune
from offline_prune.runtime.device import pick_device
from offline_prune.runtime.matmul_precision import fast_matmul
from offline_prune.settings import PruneSettings
from vllm_spense.errors import SpenseError

#: Our methods as `PruneSettings` names them, with the settings that differ from the defaults.
OURS: dict[str, Row] = {
    "spensegpt++ 25%": {"method": "spensegpt++", "sparsity": 0.25},
    "spensegpt++ 37.5%": {"method": "spensegpt++", "sparsity": 0.375},
    "spensegpt+ 25%": {"method": "spensegpt+", "sparsity": 0.25},
    "spensegpt+ 37.5%": {"method": "spensegpt+", "sparsity": 0.375},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt true_sequential=false": {"method": "sparsegpt", "true_sequential": False},
    "wanda": {"method": "wanda"},
    "wanda true_sequential=false": {"method": "wanda", "true_sequential": False},
    "magnitude": {"method": "magnitude"},
}
PEERS = ("llmcompressor sparsegpt", "llmcompressor wanda")
#: How many weights share a scale, from what people use to what small models with odd sizes allow.
INT4_GROUPS = (128, 64, 32)
#: PATCH by MLP sparsity; at 50% it would leave Wanda's masks alone.
PATCH = {"patch 25%": 0.25, "patch 37.5%": 0.375}
LEARNED = ("proxsparse", "hyperprune", *PATCH)
#: Of ProxSparse; what they mean is said at `proxsparse.learned_masks`, how they were chosen in docs/notes/pruning.md.
PROX_RATE, PROX_STRENGTH = 0.016, 0.02
#: Of HyperPrune: steps on each layer, and their learning rate.
HYPER_STEPS, HYPER_RATE = 40, 0.01
#: PATCH's: side of a tile, steps, and their learning rate.
PATCH_TILE, PATCH_STEPS, PATCH_RATE = 64, 256, 0.3


def main() -> None:
    options = parse()
    console = Console(stderr=True)
    say = partial(console.print, soft_wrap=True, markup=False)
    device = pick_device(options.device)
    before, rows = earlier_rows(options.out, say), list[Row]()
    for name in options.models:
        folder = model_folder(name)
        reference, tokenizer = load_dense(folder, str(device))
        texts = heldout_texts(tokenizer, options)
        for seed in options.seeds:
            source = calibration_source(options.texts)
            tokens = calibration_tokens(source, tokenizer, options.samples, options.length, seed)
            for method in options.methods:
                case: Row = {"model": folder.name, **result_of(method, folder), "seed": seed}
                known = [row for row in before if row.items() >= case.items()]
                if not known:
                    start = time.perf_counter()
                    model, seconds = compressed(folder, method, tokens, seed, options.peer, device)
                    console.print(f"{folder.name}: {method}: took {seconds or time.perf_counter() - start:.0f} s")
                    known = list(measured(model, reference, texts, case, seconds))
                rows += known
                write_beside(options.out, "peers", rows, before)
    print("\n".join(of_each_model(rows, markdown)))
    console.print(f"written: {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_data_options(parser, seeds=[0])
    usual = [method for method in (*OURS, *PEERS) if method.endswith(("sparsegpt", "wanda", "true_sequential=false"))]
    parser.add_argument(
        "--methods", nargs="+", choices=[*OURS, *PEERS, INT4, *LEARNED], default=usual, metavar="METHOD"
    )
    parser.add_argument(
        "--peer", type=Path, default=Path(".peer/bin/python"), help="a Python that has llmcompressor 0.11 or later"
    )
    add_out(parser, "peers-smollm2")
    options = parser.parse_args()
    theirs = [method for method in options.methods if method in (*PEERS, INT4)]
    if theirs and shutil.which(options.peer) is None:
        parser.error(f"--peer: found no program {options.peer}, which {', '.join(theirs)} need; expected a Python")
    require(options.texts, [*options.domains, CALIBRATION])
    return options


def result_of(method: str, folder: Path) -> Row:
    """What the rows call a method, and MLP sparsity and format of what it makes of a model."""
    if method == INT4:
        return {"method": method, "sparsity": 0.0, "format": f"int4-g{int4_group(folder)}"}
    sparsity = PATCH.get(method) or OURS.get(method, {}).get("sparsity")
    name = method.rpartition(" ")[0] if sparsity else method
    return {"method": name, "sparsity": sparsity or 0.5, "format": "bf16"}


def int4_group(folder: Path) -> int:
    """How many weights share a scale: of `INT4_GROUPS` the first that divides the inputs of every linear layer.

    Raises:
        SpenseError: none does.
    """
    inputs = {
        module.in_features
        for name, module in empty_model(folder).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for group in INT4_GROUPS:
        if not any(size % group for size in inputs):
            return group
    raise SpenseError(f"{folder}: linear layers have {sorted(inputs)} inputs, expected multiples of {INT4_GROUPS[-1]}")


def compressed(
    folder: Path, method: str, tokens: torch.Tensor, seed: int, peer: Path, device: torch.device
) -> tuple[PreTrainedModel, float | None]:
    """The model as a method leaves it, and the seconds that took.

    Args:
        folder: of the dense model.
        tokens: int64 (samples, length) to calibrate on.
        seed: of those tokens, for the record.
        peer: a Python that has llmcompressor.
        device: that computes, but for llmcompressor, which decides for itself.

    Raises:
        SpenseError: `peer` failed.
    """
    if method in LEARNED:
        start = time.perf_counter()
        return learned(folder, method, tokens, device), time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        if method in OURS:
            sizes = {"samples": tokens.shape[0], "length": tokens.shape[1], "seed": seed}
            settings = {"sparsity": 0.5, "quantize": "none", "device": str(device), **sizes, **OURS[method]}
            report = prune(PruneSettings(str(folder), out, **settings), tokens=tokens)
            return load_dense(out, str(device))[0], report.seconds
        save_file({"tokens": tokens}, Path(scratch) / "tokens.safetensors")
        script = ROOT / "benchmarks" / "baselines" / "llmcompressor_oneshot.py"
        theirs = f"gptq-{int4_group(folder)}" if method == INT4 else method.split()[1]
        # -E: a folder that this Python was told of may hold other versions of the same packages.
        command = [peer, "-E", script, folder, Path(scratch) / "tokens.safetensors", theirs, out]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
        if done.returncode:
            raise SpenseError(f"{method}: {peer} ended with code {done.returncode}; what it said is above")
        return load_dense(out, str(device))[0], float(done.stdout.split()[-1])


def learned(folder: Path, method: str, tokens: torch.Tensor, device: torch.device) -> PreTrainedModel:
    """The original weights under the masks that one of `LEARNED` learns."""
    layers = mlp_layers(folder)
    model = load_dense(folder, str(device))[0]
    if method == "proxsparse":
        masks = proxsparse.learned_masks(load_dense(folder, str(device))[0], layers, tokens, PROX_RATE, PROX_STRENGTH)
    elif method in PATCH:
        energies = {name: found.diagonal() for name, found in input_hessians(model, layers, tokens).items()}
        share = 1 - 2 * PATCH[method]
        dense = load_dense(folder, str(device))[0]
        masks, _ = patch.learned_masks(dense, energies, tokens, share, PATCH_TILE, PATCH_STEPS, PATCH_RATE)
    else:
        hessians = input_hessians(model, layers, tokens)
        network = hyperprune.HyperNetwork(len(layers) // 3, 3).to(device)
        described = (
            (name, i // 3, i % 3, model.get_submodule(name).weight, hessians[name]) for i, name in enumerate(layers)
        )
        masks = hyperprune.learned_masks(described, network, HYPER_STEPS, HYPER_RATE)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight *= mask
    return model


@torch.no_grad()
def input_hessians(model: PreTrainedModel, layers: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Σ x·xᵀ of the inputs of linear layers of the dense model, float32 (K, K) each."""
    found: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            found[name] = found[name] + x.T @ x if name in found else x.T @ x

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in layers]
    with fast_matmul():
        for sequence in tokens.to(model.device).split(1):
            model.base_model(input_ids=sequence, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def mlp_layers(folder: Path) -> list[str]:
    """Full names of the linear layers of all gated MLPs."""
    return [
        f"{block.name}.{block.mlp.path}.{projection}"
        for block in SourceModel(str(folder)).blocks
        if isinstance(block.mlp, GatedMlp)
        for projection in block.mlp.projections.to_dict().values()
    ]


if __name__ == "__main__":
    run_main(main)
