"""Results about pruning as tables: what it takes, what a first run takes, which tokens select."""

from __future__ import annotations

from benchmarks.first_run import TARGETS
from benchmarks.tables import Result, markdown, source


def prune(result: Result) -> list[str]:
    """What pruning a whole model takes."""
    lines = (
        [
            row["shape"],
            row["method"],
            row["gpus"],
            f"{row['samples']} × {row['length']}",
            f"{row['blocks_measured']} × {row['seconds_per_block']:.1f} s",
            f"{row['projected_minutes']:.1f}",
            f"{row['paper_minutes']:.0f}" if row["paper_minutes"] else "",
            f"{row['tensor_core_share']:.0%}" if row["tensor_core_share"] else "",
            f"{row['peak_gpu_gib']:.1f} of {row['planned_gpu_gib']:.1f}",
            f"{row['pinned_host_gib']:.2f} of {row['planned_host_gib']:.2f}",
            f"{row['peak_host_gib']:.1f}",
        ]
        for row in result["rows"]
    )
    headings = ["shape", "method", "GPUs", "tokens", "blocks measured", "model, min", "paper, B200, min"]
    headings += ["tensor cores busy", "GPU, GiB of plan", "pinned, GiB of plan", "rest of process, GiB"]
    return [*markdown(headings, lines), "", source(result)]


def prune_stages(result: Result) -> list[str]:
    """Seconds of one block by stage."""
    rows = result["rows"]
    names = {stage for row in rows for stage in row["stages"]}
    # By name too: a set has another order in every process.
    stages = sorted(names, key=lambda stage: (rows[0]["stages"].get(stage, 0), stage), reverse=True)
    lines = ([stage, *(f"{row['stages'].get(stage, 0.0):.2f}" for row in rows)] for stage in stages)
    return [*markdown(["stage", *(f"{row['shape']} {row['method']}" for row in rows)], lines), "", source(result)]


def prune_real(result: Result) -> list[str]:
    """What pruning a whole real model took."""
    stages = ("forward", "Hessian", "prune", "factorize", "quantize")
    lines = (
        [
            row["shape"],
            row["method"],
            f"{row['samples']} × {row['length']}",
            f"{60 * row['projected_minutes']:.0f}",
            *(f"{row['blocks_measured'] * row['stages'][stage]:.0f}" for stage in stages),
        ]
        for row in result["rows"]
    )
    return [*markdown(["model", "method", "tokens", "all, s", *(f"{s}, s" for s in stages)], lines), "", source(result)]


def prune_sentence(result: Result) -> list[str]:
    """The README's sentence."""
    rows = [row for row in result["rows"] if row["shape"] == "qwen3-32b"]
    gpu = result["gpu"]["name"] if result["gpu"] else result["cpu"]
    text = f"{rows[0]['samples']} × {rows[0]['length']} calibration tokens"
    times = " and ".join(f"{row['projected_minutes']:.1f} minutes with `{row['method']}`" for row in rows)
    return [f"Pruning Qwen3-32B's shape on {text} takes one {gpu} {times}, projected from whole blocks."]


def heal(*results: Result) -> list[str]:
    """What healing takes."""
    lines = (
        [
            row["shape"],
            row["gpus"],
            f"{row['layers_measured']} of {row['layers']}",
            f"{row['step_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['written_at_once']}",
            f"{row['batch_of_texts_s']:.0f}",
            f"{row['projected_minutes']:.1f}" if row["projected_minutes"] else "",
            f"{row['peak_gib']:.1f} of {row['planned_gib']:.1f}",
        ]
        for result in results
        for row in result["rows"]
    )
    headings = ["shape", "GPUs", "layers", "a step, s", "tokens/s", "texts at once", "writing them, s"]
    headings += ["ten million tokens, min", "GiB of plan"]
    return [*markdown(headings, lines), "", " ".join(map(source, results))]


def first_run(result: Result) -> list[str]:
    """The README's sentence."""
    [row] = result["rows"]
    took = ", then ".join(f"`make {each}` {row[f'{each}_s'] / 60:.1f}" for each in TARGETS)
    cpu = f"{row['cores']} cores ({result['cpu']}, {row['instructions'] or 'not even AVX2'})"
    file = "[first_run.json](benchmarks/results/first_run.json)"
    return [f"Minutes on {cpu}: {took} ({file})."]


def selection(result: Result) -> list[str]:
    """How far parts of the calibration text choose the dense indices that all of it chooses."""
    lines = (
        [
            row["tokens"],
            f"1/{row['all_tokens'] // row['tokens']}",
            f"{row['overlap_mean']:.1%}",
            f"{row['overlap_least']:.1%}",
        ]
        for row in result["rows"]
    )
    headings = ["tokens", "of the text", "mean over the layers", "least of a layer"]
    return [*markdown(headings, lines), "", source(result)]
