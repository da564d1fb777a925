"""Quality of every method at every MLP sparsity: perplexity, KL divergence and top-1 agreement on held-out text.

    python -m benchmarks.accuracy

prunes SmolLM2-135M-Instruct (or `--models`) with each method, sparsity and calibration seed, and compares it with the
dense model on four texts: docstrings of packages that the calibration text does not hold, Python's language reference,
the standard library's code, and The Debian Administrator's Handbook. With `--texts`, a folder that
`python -m benchmarks.texts` wrote stands for all texts. Left out is what another name stands for: sparsegpt with dense
indices, spensegpt and spensegpt+ without any. The same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.command_line import add_out, mlp_sparsity, positive, readable_folder, run_main
from benchmarks.envelope import circumstances, envelope, write_result
from benchmarks.quality_tables import markdown, of_each_model
from benchmarks.texts import CALIBRATION, CALIBRATION_CODE, DOMAINS, heldout, require
from offline_prune.calibration.data import BUILTIN, BUILTIN_CODE
from offline_prune.calibration.rows import FILE_KINDS
from offline_prune.checkpoint.dense_model import agreement, load_dense
from offline_prune.healing.pipeline import heal
from offline_prune.healing.settings import HealSettings
from offline_prune.methods.recipe import METHODS
from offline_prune.pipeline import prune
from offline_prune.runtime.device import pick_device
from offline_prune.settings import PruneSettings
from scripts.models import KNOWN, SMOLLM2, known_model
from vllm_spense.errors import SpenseError

SPARSITIES = (0.25, 0.375, 0.5)
#: SparseGPT with dense indices is SpenseGPT, and SpenseGPT without any is SparseGPT.
SAME = {("sparsegpt", 0.25), ("sparsegpt", 0.375), ("spensegpt", 0.5), ("spensegpt+", 0.5)}
#: How the unpruned model is rounded: to the nearest values, and as `spensegpt++` does.
DENSE = ("rounding=after", "rounding=everywhere")
#: The first case of every model: the reference itself.
DENSE_BF16 = {"method": "dense", "sparsity": 0.0, "format": "bf16", "seed": 0}
#: Built-in calibration source → the text that stands for it in a folder of texts.
TEXTS = {BUILTIN: CALIBRATION, BUILTIN_CODE: CALIBRATION_CODE}
#: The checkpoint's format and what `PruneSettings` calls it.
FORMATS = {"bf16": "none", "fp8": "fp8"}

Row = dict[str, Any]


def main() -> None:
    options = parse()
    console = Console(stderr=True)
    say = partial(console.print, soft_wrap=True, markup=False)
    device = pick_device(options.device)
    before, rows = earlier_rows(options.out, say), []
    for name in options.models:
        model = model_folder(name)
        reference, tokenizer = load_dense(model, str(device))
        texts = heldout_texts(tokenizer, options)
        for case in [DENSE_BF16, *cases(options)]:
            known = earlier_of(before, model, case, options)
            if not known and case is DENSE_BF16:
                known = list(measured(reference, reference, texts, {"model": model.name, **case}, None))
            found = known or [*pruned_rows(model, reference, texts, case, options, device)]
            rows += found
            for method in dict.fromkeys(row["method"] for row in found):
                kls = "  ".join(f"{row['domain']} {row['kl']:.4f}" for row in found if row["method"] == method)
                about = f"{method} {case['sparsity']:.1%} {case['format']} seed {case['seed']}"
                console.print(f"{model.name}: {about}: KL {kls}")
            write_beside(options.out, "accuracy", rows, before)
    plot(rows, options.out.with_suffix(".png"))
    print("\n".join(of_each_model(rows, markdown)))
    console.print(f"written: {options.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_data_options(parser, seeds=[0, 1, 2])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=["dense", *METHODS],
        default=["dense", *METHODS],
        metavar="METHOD",
        help="dense is the unpruned model in FP8",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        default=[""],
        metavar="NAME=VALUE,…",
        help="settings that each method is tried with, as PruneSettings names them,\n"
        "such as: layout=back layout=front,selection=random; without calibration=NAME it is builtin alone, and\n"
        "calibration=builtin,calibration=builtin-code,calibration=generated is what `spense prune` takes by\n"
        "default, with --texts the folder's texts for built-in ones; {model} stands for the model's name",
    )
    parser.add_argument(
        "--heal",
        nargs="+",
        type=heal_variant,
        default=[],
        metavar="NAME=VALUE,…",
        help="also heal each result, with settings as HealSettings names them",
    )
    parser.add_argument("--sparsities", nargs="+", type=mlp_sparsity, default=SPARSITIES)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp8"], metavar="FORMAT")
    add_out(parser, "accuracy-smollm2")
    options = parser.parse_args()
    sources = calibration_sources(options)
    require(options.texts, [*options.domains, *(TEXTS[name] for name in sources if name in TEXTS)])
    files = {name.replace("{model}", Path(model).name) for name in sources for model in options.models}
    missing = [file for file in sorted(files) if Path(file).suffix.lower() in FILE_KINDS and not Path(file).is_file()]
    if missing:
        raise SpenseError(f"--variants, --heal: found no {', '.join(missing)}; expected files to calibrate on")
    return options


def add_data_options(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Models, texts and the device, as whatever is compared must have them in common.

    Args:
        seeds: the default.
    """
    parser.add_argument(
        "--models",
        nargs="+",
        type=model_name,
        default=[SMOLLM2],
        metavar="MODEL",
        help=f"folders of dense models, or {' | '.join(KNOWN)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help="of the calibration text's order")
    parser.add_argument("--samples", type=positive, default=64, help="calibration sequences")
    parser.add_argument("--length", type=positive, default=512, help="tokens in each")
    parser.add_argument(
        "--domains", nargs="+", choices=DOMAINS, default=DOMAINS, metavar="DOMAIN", help=" ".join(DOMAINS)
    )
    parser.add_argument("--heldout", type=positive, default=40, help="sequences of each held-out text")
    parser.add_argument("--heldout-length", type=positive, default=1024, help="tokens in each")
    parser.add_argument("--texts", type=readable_folder, help="folder of texts [default: what is installed]")
    parser.add_argument("--device", default="auto")


def model_name(text: str) -> str:
    """Checks one value of --models."""
    if text not in KNOWN and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"found {text}, expected a folder or one of {', '.join(KNOWN)}")
    return text


def model_folder(name: str) -> Path:
    """The folder of a model: one of `KNOWN`, which is made unless it is there, or a folder's name."""
    return known_model(name) if name in KNOWN else Path(name)


def heldout_texts(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Domain → int64 (sequences, length), as `add_data_options` asks for them."""
    return {
        domain: heldout(domain, tokenizer, options.heldout, options.heldout_length, options.texts)
        for domain in options.domains
    }


def variant(text: str) -> str:
    """Checks one value of --variants."""
    return _naming(text, {field.name for field in fields(PruneSettings)})


def heal_variant(text: str) -> str:
    """Checks one value of --heal, before anything is pruned.

    Raises:
        SpenseError: a value outside its range.
    """
    _naming(text, {field.name for field in fields(HealSettings)} - {"pruned", "out", "teacher"})
    given = {name: value for name, value in changes(text).items() if name != "calibration"}
    try:
        HealSettings(Path("PRUNED"), Path("OUT"), "TEACHER", **given)
    except TypeError:
        raise argparse.ArgumentTypeError(f"found {text}, expected numbers where HealSettings has them") from None
    return text


def _naming(text: str, names: set[str]) -> str:
    for name in changes(text):
        if name not in names:
            raise argparse.ArgumentTypeError(f"found {name}, expected one of {', '.join(sorted(names))}")
    return text


def changes(text: str) -> Row:
    """`layout=front,tune_steps=9` as {"layout": "front", "tune_steps": 9}; a name given twice has both values."""
    found: Row = {}
    for name, _, value in (item.partition("=") for item in text.split(",") if item):
        read = _value(value)
        found[name] = (*_several(found[name]), read) if name in found else read
    return found


def _value(text: str) -> Any:
    """A number or a truth value where the text is one."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _several(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def earlier_rows(file: Path, say: Callable[[str], None]) -> list[Row]:
    """What the same command measured with the same code before it was cut off, if it was.

    Args:
        say: told which rows are kept, or why none are.

    Returns:
        Rows, with their `commit` where it is not that of the result that they go into.
    """
    if not file.exists():
        return []
    earlier, now = json.loads(file.read_text(encoding="utf-8")), envelope("accuracy", [])
    other = [key for key in ("command", *circumstances()) if earlier.get(key) != now[key]]
    count, commit = len(earlier["rows"]), earlier["commit"]
    if other:
        say(f"{file}: its {count} rows, of commit {commit}, are replaced: not the same {', '.join(other)}")
        return []
    say(f"{file}: {count} rows are kept, of commit {commit}")
    if commit == now["commit"]:
        return earlier["rows"]
    return [{**row, "commit": row.get("commit", commit)} for row in earlier["rows"]]


def write_beside(file: Path, benchmark: str, rows: list[Row], before: list[Row]) -> None:
    """Writes what was measured so far, with what is still to come of an earlier run, which another interruption must
    not lose."""
    write_result(file, benchmark, [*rows, *(row for row in before if row not in rows)])


def earlier_of(before: list[Row], model: Path, case: Row, options: argparse.Namespace) -> list[Row]:
    """All rows of a case, healed ones too, or none where some are missing."""
    methods = [case["method"]]
    if case["sparsity"]:
        methods += [healed_name(case, change) for change in options.heal]
    found = [
        [row for row in before if row.items() >= {"model": model.name, **case, "method": method}.items()]
        for method in methods
    ]
    return list(itertools.chain(*found)) if all(found) else []


def healed_name(case: Row, change: str) -> str:
    return f"{case['method']} healed {change}".strip()


def cases(options: argparse.Namespace) -> Iterator[Row]:
    """What is pruned, as the first keys of its rows; at MLP sparsity 0 that is only the rounding."""
    if "dense" in options.methods:
        for change in DENSE:
            yield {"method": f"dense {change}", "sparsity": 0.0, "format": "fp8", "seed": 0}
    methods = [method for method in options.methods if method != "dense"]
    every = itertools.product(methods, options.variants, options.sparsities, options.formats, options.seeds)
    for method, change, sparsity, form, seed in every:
        if change or (method, sparsity) not in SAME:
            yield {"method": f"{method} {change}".strip(), "sparsity": sparsity, "format": form, "seed": seed}


def calibration_sources(options: argparse.Namespace) -> list[str]:
    """Of all cases and of their healing, as `PruneSettings` names them; {model} still stands for the model's name."""
    every = list(cases(options))
    given = [case["method"].partition(" ")[2] for case in every]
    if any(case["sparsity"] for case in every):
        given += options.heal
    return [name for each in given for name in _several(changes(each).get("calibration", BUILTIN))]


def pruned_rows(
    model: Path,
    reference: PreTrainedModel,
    texts: dict[str, torch.Tensor],
    case: Row,
    options: argparse.Namespace,
    device: torch.device,
) -> Iterator[Row]:
    """Prunes into a folder that is gone afterwards, measures, and heals what was pruned if that is wanted."""
    method, _, change = case["method"].partition(" ")
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder) / "pruned"
        settings: Row = {
            # At sparsity 0 a method is only its rounding.
            "method": "sparsegpt" if method == "dense" else method,
            "sparsity": case["sparsity"],
            "calibration": calibration_source(options.texts),
            "samples": options.samples,
            "length": options.length,
            "seed": case["seed"],
            "quantize": FORMATS[case["format"]],
            "device": str(device),
            **with_texts(changes(change.replace("{model}", model.name)), options.texts),
        }
        report = prune(PruneSettings(str(model), pruned, **settings))
        found, _ = load_dense(pruned, str(device))
        yield from measured(found, reference, texts, {"model": model.name, **case}, report.seconds)
        for heal_change in options.heal if case["sparsity"] else ():
            settings = {
                "calibration": calibration_source(options.texts),
                "seed": case["seed"],
                "device": str(device),
                **with_texts(changes(heal_change.replace("{model}", model.name)), options.texts),
            }
            del found
            healed = Path(folder) / "healed"
            report = heal(HealSettings(pruned, healed, str(model), **settings, overwrite=True))
            found, _ = load_dense(healed, str(device))
            about = {"model": model.name, **case, "method": healed_name(case, heal_change)}
            yield from measured(found, reference, texts, about, report.seconds)


def calibration_source(folder: Path | None, name: str = BUILTIN) -> str:
    """A calibration source as `PruneSettings` names it; a built-in one's text is the folder's, where there is one."""
    return name if folder is None or name not in TEXTS else str(folder / f"{TEXTS[name]}.jsonl")


def with_texts(settings: Row, folder: Path | None) -> Row:
    """Settings in which a built-in text, where a variant names it, is that of a folder of texts, if there is one."""
    if "calibration" not in settings:
        return settings
    return {**settings, "calibration": tuple(calibration_source(folder, n) for n in _several(settings["calibration"]))}


def measured(
    model: PreTrainedModel, reference: PreTrainedModel, texts: dict[str, torch.Tensor], case: Row, seconds: float | None
) -> Iterator[Row]:
    """One row for each domain."""
    for domain, tokens in texts.items():
        found = asdict(agreement(model, reference, tokens))
        size = dict(zip(("heldout", "heldout_length"), tokens.shape, strict=True))
        yield {**case, "domain": domain, **size, **found, "prune_seconds": seconds}


def plot(rows: Sequence[Row], file: Path) -> None:
    """KL against MLP sparsity: models down, domains across, a line for each method, a bar of one standard deviation."""
    from matplotlib.figure import Figure

    form = rows[-1]["format"]
    models, domains = ([*dict.fromkeys(row[key] for row in rows)] for key in ("model", "domain"))
    figure = Figure(figsize=(4.2 * len(domains), 4 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(domains), sharey="row", squeeze=False)
    for place, axes in zip(itertools.product(models, domains), panels.flat, strict=True):
        here = [row for row in rows if (row["model"], row["domain"]) == place]
        here = [row for row in here if row["format"] == form and row["sparsity"]]
        for method in dict.fromkeys(row["method"] for row in here):
            points: dict[float, list[float]] = {}
            for row in here:
                if row["method"] == method:
                    points.setdefault(row["sparsity"], []).append(row["kl"])
            spread = [statistics.stdev(found) if len(found) > 1 else 0.0 for found in points.values()]
            means = [statistics.mean(found) for found in points.values()]
            axes.errorbar(list(points), means, yerr=spread, marker=".", label=method)
        axes.set(title=", ".join(place), xlabel="MLP sparsity", yscale="log")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"KL from the dense model, nats ({form.upper()})")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    run_main(main)
