"""Writes the tables of the README and of docs/ from the files in benchmarks/results/.

    python -m benchmarks.performance

A table stands between `<!-- table NAME -->` and `<!-- end -->`; what is there is replaced, the text around it stays. A
test holds the documents to this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import alternatives_table, decode_tables, gemm_tables, pruning_tables, quality_results, serving_tables
from benchmarks.envelope import RESULTS, ROOT
from scripts.models import KNOWN

#: Every file that has tables.
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("performance.md", "pruning-at-scale.md", "quality.md")),
    *(ROOT / "docs/notes" / name for name in ("tables.md", "serving.md")),
)
_TABLE = re.compile(r"(<!-- table ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str, results: Path = RESULTS) -> str:
    """The document with all its tables as the files in `results` have them.

    Raises:
        KeyError: there is no table of that name.
    """

    def table(found: re.Match[str]) -> str:
        before, name, after = found.groups()
        benchmarks, make = TABLES[name]
        benchmark = benchmarks.split()[0]
        files = [results / f"{name}.json" for name in benchmarks.split()]
        if files[0].exists():
            content = make(*(json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()))
        else:
            command, where = RUNS.get(benchmark, (f"python benchmarks/{benchmark}.py", "a GPU"))
            content = [f"Not measured yet: `{command}` on {where} makes this table."]
        return "\n".join((before.rstrip("\n"), "", *content, "", after))

    return _TABLE.sub(table, text)


#: Result file → the command that makes it, and where, other than the benchmark of that name with its defaults on a GPU.
RUNS: Mapping[str, tuple[str, str]] = {
    "compat": ("make compat", "a CPU"),
    "soak": ("python -m benchmarks.soak", "any machine with vLLM"),
    "prune_time-2gpus": ("torchrun --nproc-per-node 2 benchmarks/prune_time.py", "2 GPUs"),
    "alternatives": ("python benchmarks/alternatives.py --together 4", "a GPU"),
    "peers-int4": (
        'python -m benchmarks.peers --methods "llmcompressor gptq" --out benchmarks/results/peers-int4.json',
        "any machine",
    ),
    "prune_time-shapes": (
        "python benchmarks/prune_time.py --shapes qwen3-32b seed-oss-36b llama-3.1-8b llama-3.3-70b "
        "--methods spensegpt+ --blocks 2 --samples 64 --no-profile --out benchmarks/results/prune_time-shapes.json",
        "a GPU",
    ),
    "prune_time-experts": (
        "python benchmarks/prune_time.py --shapes qwen3-30b-a3b --methods spensegpt+ --no-profile",
        "a GPU",
    ),
    "accuracy-tiny-moe": ("python -m benchmarks.accuracy --models FOLDER", "a GPU"),
}
#: Parts of the tests on a GPU, each with a result file.
GPU_TESTS = (
    *("kernels", "pruning", "scaled", "workspace"),
    *("serving", "serving_h200", "ranks", "experts", "sleep", "modes"),
)
#: Table → result file, further ones that it takes rows from where they exist, and what makes it.
TABLES: Mapping[str, tuple[str, Callable[..., list[str]]]] = {
    "decode": ("decode_speed", decode_tables.decode),
    "decode_long": ("decode_speed-long", decode_tables.decode_rows),
    "decode_kv_auto": ("decode_speed-kv-auto", decode_tables.decode_rows),
    "decode_h200": ("decode_speed-h200", decode_tables.decode_rows),
    "decode_llama": ("decode_speed-llama-3.1-8b", decode_tables.decode_gpu),
    "decode_two": ("decode_speed-tp2", decode_tables.decode_rows),
    "decode_vl": ("decode_speed-qwen3-vl-32b", decode_tables.decode_rows),
    "decode_mixture": ("decode_speed-qwen3-30b-a3b-early", decode_tables.decode_rows),
    "prefill": ("decode_speed", decode_tables.prefill),
    "prefill_h200": ("decode_speed-h200", decode_tables.prefill),
    "memory": ("decode_speed", decode_tables.memory),
    "memory_h200": ("decode_speed-h200", decode_tables.memory),
    "errors": ("decode_speed", decode_tables.errors),
    "gemm": ("gemm_sweep", gemm_tables.gemm),
    "paths": ("gemm_sweep", gemm_tables.paths),
    "gemm_h200": ("gemm_sweep-h200", gemm_tables.gemm),
    "clocks": ("gemm_clocks", gemm_tables.clocks),
    "experts": ("expert_gemm", gemm_tables.experts),
    "mixtures": ("expert_mixture", gemm_tables.mixtures),
    "mlp": ("layer_breakdown", gemm_tables.mlp),
    "timeline": ("layer_timeline", serving_tables.timeline),
    "timeline_vl": ("layer_timeline-qwen3-vl-32b", serving_tables.timeline),
    **{f"gpu_tests_{part}": (f"gpu_tests-{part.replace('_', '-')}", serving_tables.gpu_tests) for part in GPU_TESTS},
    "compat": ("compat", serving_tables.compat),
    "compat_readme": ("compat", serving_tables.compat_sentence),
    "soak": ("soak", serving_tables.soak),
    "load": ("serve_load", serving_tables.load),
    "load_half": ("serve_load-sparsities serve_load-kv-auto", serving_tables.load),
    "readme": ("decode_speed-h200", decode_tables.decode_longest),
    "alternatives": ("alternatives", alternatives_table.tables),
    "prune": ("prune_time", pruning_tables.prune),
    "prune_stages": ("prune_time", pruning_tables.prune_stages),
    "prune_readme": ("prune_time", pruning_tables.prune_sentence),
    "first_run": ("first_run", pruning_tables.first_run),
    "prune_h100": ("prune_time-h100", pruning_tables.prune),
    "prune_real": ("prune_time-smollm2-135m", pruning_tables.prune_real),
    "prune_shapes": ("prune_time-shapes", pruning_tables.prune),
    "prune_gpus": ("prune_time-2gpus", pruning_tables.prune),
    "prune_experts": ("prune_time-experts", pruning_tables.prune),
    "prune_experts_stages": ("prune_time-experts", pruning_tables.prune_stages),
    "prune_tuned": ("prune_time-tuned", pruning_tables.prune),
    "prune_tuned_stages": ("prune_time-tuned", pruning_tables.prune_stages),
    "heal_time": ("heal_time heal_time-2gpus", pruning_tables.heal),
    "selection": ("selection_tokens", pruning_tables.selection),
    "gains": ("accuracy-smollm2", quality_results.gains),
    "summary": ("accuracy-smollm2 peers-int4", quality_results.summary),
    "summary_readme": ("accuracy-smollm2 peers-int4", quality_results.headline),
    "perplexity": ("perplexity-smollm2", quality_results.perplexity),
    "accuracy": ("accuracy-smollm2", quality_results.quality),
    "ablations": ("accuracy-smollm2-ablations", quality_results.quality),
    "accuracy_cpu": ("accuracy-smollm2-cpu", quality_results.quality),
    "models": (" ".join(f"accuracy-{k}-{m}" for k in ("default", "heal") for m in KNOWN), quality_results.over_models),
    "models_long": (quality_results.ON_LONG_TEXT, quality_results.over_models),
    "models_tuned": (f"{quality_results.ON_LONG_TEXT} peers-int4-models", quality_results.over_models_tuned),
    **{f"domains_{model.partition('-')[0]}": (f"accuracy-domains-{model}", quality_results.quality) for model in KNOWN},
    **{f"heal_{model.partition('-')[0]}": (f"accuracy-heal-{model}", quality_results.quality) for model in KNOWN},
    **{f"healed_{model.partition('-')[0]}": (f"accuracy-healed-{model}", quality_results.quality) for model in KNOWN},
    **{
        f"healed_default_{model.partition('-')[0]}": (f"accuracy-healed-default-{model}", quality_results.quality)
        for model in KNOWN
    },
    "rates": ("accuracy-rates-smollm2-135m", quality_results.quality),
    "heal_steps": ("accuracy-heal-steps-smollm2-135m", quality_results.quality),
    "heal_rates": ("accuracy-heal-rates-smollm2-135m", quality_results.quality),
    "calibration": ("accuracy-calibration-qwen2.5-coder-0.5b", quality_results.quality),
    "mixture_quality": ("accuracy-tiny-moe", quality_results.quality),
    "options": ("accuracy-smollm2-options", quality_results.quality),
    "descent": ("accuracy-smollm2-descent", quality_results.quality),
    "gains_cpu": ("accuracy-smollm2-cpu", quality_results.gains),
    "rounding": ("accuracy-smollm2-rounding", quality_results.quality),
    "rounding_added": ("accuracy-smollm2-rounding", quality_results.rounding),
    "learned": ("learned-smollm2", quality_results.quality),
    "learned_patch": ("learned-patch", quality_results.quality),
    "tasks": ("tasks", quality_results.tasks),
    "tasks_coder": ("tasks-coder-pruned tasks-coder-healed-25 tasks-coder-healed-37.5", quality_results.tasks),
    "tasks_default": ("tasks-coder-default-25 tasks-coder-default-healed-37.5", quality_results.tasks),
    "peers": ("peers-smollm2", quality_results.quality),
    "int4": ("peers-int4", quality_results.quality),
    "int4_models": ("peers-int4-models", quality_results.quality),
    "fp8_scales": ("fp8_scales", quality_results.fp8_scales),
}


if __name__ == "__main__":
    main()
