"""How long healing a published shape takes, from some steps with random weights on text that they wrote themselves.

    python -m benchmarks.heal_time

writes a model of Qwen2.5-1.5B's shape, prunes it by magnitude, heals it through the same code as `spense heal`, reading
and writing real files, and writes benchmarks/results/heal_time.json. The projection is of a default run's text in steps
as long as those measured: as many texts, steps and held-out sequences as it has, in the seconds that one of each took
here, beside what it loads and writes; reading built-in text is not in it.

    torchrun --nproc-per-node 2 -m benchmarks.heal_time --shapes qwen3-32b --layers 2

does so on two GPUs, of fewer layers than the shape has and without a projection, and writes heal_time-2gpus.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import at_least, positive, result_file, run_main, writable_folder
from benchmarks.envelope import RESULTS, write_result
from benchmarks.prune_time import VOCABULARY, say, settings_for, write_model
from benchmarks.pruning_tables import heal as heal_table
from benchmarks.random_server import write_tokenizer
from offline_prune.calibration.generated import pieces
from offline_prune.calibration.mixture import DEFAULT_MIXTURE, GENERATED, shares
from offline_prune.healing.pipeline import heal
from offline_prune.healing.report import HealReport
from offline_prune.healing.settings import HealSettings, Optimizer
from offline_prune.healing.text_split import heldout_sequences, step_sequences, steps_in_epoch
from offline_prune.pipeline import prune
from offline_prune.runtime import distributed
from offline_prune.runtime.device import pick_device
from vllm_spense.shapes import SHAPES

#: What `heal` says after each batch of texts: how many of this rank's there are.
_WRITTEN = re.compile(r"(\d+) of \d+ texts written")
#: Tokens to prune on; which weights are zero decides nothing here.
_PRUNED_ON = (8, 128)

Row = dict[str, Any]


def main() -> None:
    options = parse()
    device = pick_device(options.device)
    with distributed.process_group(device):
        file, rows = options.out or RESULTS / f"heal_time{suffix()}.json", list[Row]()
        for shape in options.shapes:
            with tempfile.TemporaryDirectory(dir=options.folder) as own:
                # All ranks read the first one's.
                folder = Path(distributed.broadcast_from_first(lambda own=own: own))
                rows.append(measure(folder, shape, device, options))
            if distributed.is_first():
                write_result(file, "heal_time", rows)
                print("\n".join(heal_table(json.loads(file.read_text(encoding="utf-8")))), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b"])
    parser.add_argument("--layers", type=positive, help="fewer than the shape has; then nothing is projected")
    parser.add_argument("--samples", type=at_least(2), default=512, help="sequences to write and to heal on")
    parser.add_argument("--length", type=at_least(2), default=HealSettings.length, help="tokens in each")
    parser.add_argument("--step-tokens", type=positive, default=HealSettings.step_tokens)
    parser.add_argument("--batch-tokens", type=positive, help="as of `spense heal`")
    parser.add_argument("--optimizer", choices=[*Optimizer], default=Optimizer.ADAMW)
    parser.add_argument("--vocabulary", type=at_least(VOCABULARY), help="instead of the shape's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=writable_folder, help="for the models [default: a temporary one]")
    parser.add_argument("--out", type=result_file, help="[default: benchmarks/results/heal_time.json]")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    return options


def suffix() -> str:
    """Of the result file's name."""
    return f"-{distributed.size()}gpus" if distributed.size() > 1 else ""


def measure(folder: Path, shape: str, device: torch.device, options: argparse.Namespace) -> Row:
    """Prunes and heals a shape in a folder of its own; a row of the result, empty but on the first rank."""
    layers = SHAPES[shape]["num_hidden_layers"]
    measured, vocabulary = options.layers or layers, options.vocabulary or SHAPES[shape]["vocab_size"]

    def written() -> None:
        write_tokenizer(write_model(folder / "model", shape, measured, device, vocabulary), vocabulary)

    distributed.broadcast_from_first(written)
    model, pruned = folder / "model", folder / "pruned"
    tokens = torch.randint(VOCABULARY, _PRUNED_ON, generator=torch.Generator().manual_seed(0))
    prune(settings_for(model, pruned, "magnitude", *_PRUNED_ON, options.device), say=say, tokens=tokens)
    distributed.broadcast_from_first(lambda: None)  # The first rank has written all of it.
    settings = HealSettings(
        pruned,
        folder / "healed",
        str(model),
        calibration=GENERATED,
        samples=options.samples,
        length=options.length,
        epochs=1,
        step_tokens=options.step_tokens,
        batch_tokens=options.batch_tokens,
        optimizer=Optimizer(options.optimizer),
        device=options.device,
    )
    ends, counts = list[float](), list[int]()

    def note(line: str) -> None:
        say(line)
        if found := _WRITTEN.match(line):
            counts.append(int(found[1]))

    report = heal(settings, lambda *_: ends.append(time.perf_counter()), note)
    if not distributed.is_first():
        return {}
    # Of the steps after which no held-out text was looked at: most.
    step_s = statistics.median(later - earlier for earlier, later in pairwise(ends))
    return {
        "shape": shape,
        "layers": layers,
        "layers_measured": measured,
        "vocabulary": vocabulary,
        "gpus": distributed.size() if device.type == "cuda" else 0,
        "samples": options.samples,
        "length": options.length,
        "optimizer": str(settings.optimizer),
        "steps": report.steps,
        "step_s": step_s,
        "tokens_per_s": report.tokens / report.steps / step_s,
        "written_at_once": counts[0],
        "batch_of_texts_s": report.stages["text"] / len(counts),
        "stages": report.stages,
        "projected_minutes": projected(report, step_s, counts, settings) / 60 if measured == layers else None,
        "peak_gib": report.peak_gib,
        "planned_gib": report.planned_gib,
    }


def projected(report: HealReport, step_s: float, counts: list[int], measured: HealSettings) -> float:
    """Seconds of a default run on as many ranks.

    Args:
        step_s: of one step.
        counts: how many texts a rank had after each batch of them.
        measured: what was run.
    """
    default = HealSettings(measured.pruned, measured.out, measured.teacher, step_tokens=measured.step_tokens)
    text_share = shares(DEFAULT_MIXTURE, default.samples)[GENERATED]
    texts = -(-pieces(text_share, default.length)[0] // distributed.size())
    batches = -(-texts // counts[0])
    looked_at = heldout_sequences(default) * default.length / (heldout_sequences(measured) * measured.length)
    stages = report.stages
    return (
        stages["load"]
        + batches * stages["text"] / len(counts)
        + default.epochs * steps_in_epoch(default) * step_s * tokens_of_a_step(default) / tokens_of_a_step(measured)
        + looked_at * stages["judge"]
        + stages["write"]
    )


def tokens_of_a_step(settings: HealSettings) -> int:
    """Of all ranks together."""
    return step_sequences(settings) * settings.length


if __name__ == "__main__":
    run_main(main)
