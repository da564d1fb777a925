"""Rows of the quality benchmarks as the tables that the documents show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
#: What identifies a line of a table; seeds and domains are what it sums up.
_KEYS = ("method", "sparsity", "format")
#: What a user may take instead, W4A16: four bits, and a scale for each group of weights, in all linear layers but the
#: head.
INT4 = "llmcompressor gptq"
#: What `summary` shows, and how it names it.
SUMMARIZED = {
    "dense rounding=after": "dense",
    INT4: "GPTQ, four bits",
    **{name: f"`{name}`" for name in ("spensegpt++", "spensegpt+", "spensegpt", "sparsegpt", "wanda", "magnitude")},
}
#: Sequences × tokens of each text in files older than these keys.
_OLD_SIZE = {"heldout": 8, "heldout_length": 512}
#: What `gains` compares, and with what.
BETTER, BASE = "spensegpt++", "spensegpt+"


#: What older result files call a domain, or a task of it, that has another name now.
RENAMED = {"prose": "reference", "continuation_prose": "continuation_reference"}


def renamed(rows: Iterable[Row]) -> list[Row]:
    """Rows of any age with the domains' present names."""
    keys = ("domain", "task")
    return [{key: RENAMED.get(value, value) if key in keys else value for key, value in row.items()} for row in rows]


def on_common_texts(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the models and texts that two results have in common; all of the first and none where there are none."""
    both = {_text(row) for row in rows} & {_text(row) for row in others}
    if not both:
        return [*rows], []
    return [row for row in rows if _text(row) in both], [row for row in others if _text(row) in both]


def of_each_model(rows: Sequence[Row], table: Callable[[Sequence[Row]], list[str]]) -> list[str]:
    """The table of one model, or one after another of several, each after its name."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) == 1:
        return table(rows)
    lines: list[str] = []
    for model in models:
        lines += ["", f"{model}:", "", *table([row for row in rows if row["model"] == model])]
    return lines[1:]


def measured_on(rows: Sequence[Row]) -> str:
    """Which models and texts the rows are of, and how much of each text where they say so."""
    models, domains = (", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("model", "domain"))
    sizes = {f"{row['heldout']} × {row['heldout_length']}" for row in rows if "heldout" in row}
    return f"{models} on {domains}{''.join(f', {size} tokens each' for size in sorted(sizes))}"


def markdown(rows: Sequence[Row]) -> list[str]:
    """Methods down; perplexity and KL of each domain, mean ± standard error over the seeds, across."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    columns = " | ".join(f"{domain}: perplexity | KL" for domain in domains)
    lines = [f"| method | MLP sparsity | format | {columns} | prune, s |"]
    lines.append("|" + "---|" * (2 * len(domains) + 4))
    for (method, sparsity, form), group in _groups(rows).items():
        cells = [
            mean([row[key] for row in group if row["domain"] == domain], digits)
            for domain in domains
            for key, digits in (("perplexity", 2), ("kl", 3))
        ]
        seconds = [row["prune_seconds"] for row in group if row["prune_seconds"]]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
        lines.append(f"| `{method}` | {sparsity:.1%} | {form.upper()} | {' | '.join(cells)} |")
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """FP8 and four bits, best first at each sparsity: KL over all domains and seeds, perplexity of each domain."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    lines = [f"| method | MLP sparsity | KL | {' | '.join(f'perplexity, {domain}' for domain in domains)} |"]
    lines.append("|" + "---|" * (3 + len(domains)))
    found = {key: group for key, group in _groups(rows).items() if key[2] != "bf16" and key[0] in SUMMARIZED}
    kl = {key: statistics.mean(row["kl"] for row in group) for key, group in found.items()}
    for key in sorted(found, key=lambda key: (key[1], kl[key])):
        method, sparsity, _ = key
        perplexities = (
            statistics.mean(row["perplexity"] for row in found[key] if row["domain"] == domain) for domain in domains
        )
        cells = " | ".join(f"{value:.2f}" for value in perplexities)
        lines.append(f"| {SUMMARIZED[method]} | {sparsity:.1%} | {kl[key]:.3f} | {cells} |")
    return lines


def over_models(rows: Sequence[Row]) -> list[str]:
    """FP8 and `INT4`, of whatever all models have: KL of each domain, its mean over models and seeds.

    In parentheses is the mean over models of what that is of `BASE`'s at the same sparsity, if any.
    """
    domains, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("domain", "model"))
    found: dict[tuple[str, float], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        if row["method"] == INT4 or (row["sparsity"] and row["format"] != "bf16"):
            places = found.setdefault((label(row["method"]), row["sparsity"]), {})
            places.setdefault((row["model"], row["domain"]), []).append(row["kl"])
    kl = {
        key: {place: statistics.mean(values) for place, values in places.items()}
        for key, places in found.items()
        if len(places) == len(models) * len(domains)
    }
    lines = [f"| method | MLP sparsity | {' | '.join(domains)} |", "|" + "---|" * (2 + len(domains))]
    for method, sparsity in sorted(kl, key=lambda key: (key[1], -statistics.mean(kl[key].values()))):
        mine, base = kl[method, sparsity], kl.get((BASE, sparsity))
        cells = []
        for domain in domains:
            cell = f"{statistics.mean(mine[model, domain] for model in models):.3f}"
            if base:
                cell += f" ({statistics.mean(mine[model, domain] / base[model, domain] for model in models):.2f})"
            cells.append(cell)
        lines.append(f"| {method} | {sparsity:.1%} | {' | '.join(cells)} |")
    return lines


#: How a label says what differs between a table's methods.
_IN_WORDS = {
    " calibration=builtin,calibration=generated": ", half of the text generated",
    # The code is a file's where it was measured before `builtin-code` was a source.
    **{
        f" calibration=builtin,calibration={code},calibration=generated": ", a third code, a third generated"
        for code in ("builtin-code", "texts/packages-code.jsonl")
    },
    ",tune_steps=": ", steps: ",
}


def label(method: str) -> str:
    """A method with what differs within a table: calibration text and steps, of a healed one's settings the rate, and
    whether more than the MLPs was trained."""
    if method == INT4:
        return SUMMARIZED[INT4]
    name, _, change = method.partition(" healed ")
    for setting, words in _IN_WORDS.items():
        name = name.replace(setting, words)
    if not change:
        return name
    rate = change.partition("rate=")[2].partition(",")[0]
    return f"{name}, healed{f' at {rate}' if rate else ''}{', all layers' if 'train=all' in change else ''}"


def by_format(rows: Sequence[Row]) -> list[str]:
    """Perplexity of each method down, formats across."""
    formats = list(dict.fromkeys(str(row["format"]) for row in rows))
    found = {(row["method"], row["sparsity"], row["format"]): row["perplexity"] for row in rows}
    lines = [f"| method | MLP sparsity | {' | '.join(map(str.upper, formats))} |", "|---|---|" + "---|" * len(formats)]
    for method, sparsity in dict.fromkeys((row["method"], row["sparsity"]) for row in rows):
        values = " | ".join(f"{found[method, sparsity, form]:.2f}" for form in formats)
        lines.append(f"| `{method}` | {sparsity:.1%} | {values} |")
    return lines


def gains(rows: Sequence[Row]) -> list[str]:
    """What `BETTER` leaves of `BASE`'s losses: KL, and perplexity beyond the dense model's, each seed by itself.

    Of the sparsities that both have: without indices to select `BASE` goes by another name.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    found = {
        (row["method"], row["sparsity"], row["seed"], row["domain"]): row for row in rows if row["format"] != "bf16"
    }
    dense = {row["domain"]: row["perplexity"] for row in rows if row["method"] == "dense" and row["format"] == "bf16"}
    lines = [f"| MLP sparsity | of `{BASE}`'s | {' | '.join(domains)} | mean |", "|" + "---|" * (3 + len(domains))]
    sparsities = [{key[1] for key in found if key[0] == method} for method in (BETTER, BASE)]
    for sparsity in sorted(sparsities[0] & sparsities[1]):
        seeds = [key[2] for key in found if key[:2] == (BETTER, sparsity) and key[3] == domains[0]]
        for name, key in (("KL", "kl"), ("perplexity loss", "perplexity")):
            ratios = []
            for domain in domains:
                zero = dense[domain] if key == "perplexity" else 0.0
                pairs = [[found[method, sparsity, seed, domain][key] for method in (BETTER, BASE)] for seed in seeds]
                ratios.append([(better - zero) / (base - zero) for better, base in pairs])
            over_domains = [statistics.mean(of_seed) for of_seed in zip(*ratios, strict=True)]
            cells = " | ".join(mean(values, 3) for values in (*ratios, over_domains))
            lines.append(f"| {sparsity:.1%} | {name} | {cells} |")
    return lines


def added_by_fp8(rows: Sequence[Row]) -> list[str]:
    """What each way to round adds to the same method in BF16, each seed by itself: perplexity in percent, and KL."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    found = {(row["method"], row["format"], row["seed"], row["domain"]): row for row in rows}
    columns = " | ".join(f"{domain}: perplexity, % | KL" for domain in domains)
    lines = [f"| method | {columns} |", "|" + "---|" * (1 + 2 * len(domains))]
    for method in dict.fromkeys(row["method"] for row in rows if row["format"] == "fp8"):
        seeds = [key[2] for key in found if (key[0], key[1], key[3]) == (method, "fp8", domains[0])]
        cells = []
        for domain in domains:
            pairs = [
                (found[method, "fp8", seed, domain], found[method.partition(" ")[0], "bf16", seed, domain])
                for seed in seeds
            ]
            cells.append(mean([100 * (fp8["perplexity"] / bf16["perplexity"] - 1) for fp8, bf16 in pairs], 1))
            cells.append(mean([fp8["kl"] - bf16["kl"] for fp8, bf16 in pairs], 3))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def rounding_errors(rows: Sequence[Row]) -> list[str]:
    """Of each rule for FP8 scales: the squared error of the weights, and KL on each domain."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    lines = [f"| | error of the weights | {' | '.join(f'{domain}: KL' for domain in domains)} |"]
    lines.append("|" + "---|" * (2 + len(domains)))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {row["domain"]: row for row in rows if row["method"] == method}
        error = mine[domains[0]]["relative_squared_error"]
        kls = " | ".join(f"{mine[domain]['kl']:.4f}" for domain in domains)
        lines.append(f"| {method} | {error:.2e} | {kls} |")
    return lines


def tasks(rows: Sequence[Row]) -> list[str]:
    """Models down, tasks across, in percent."""
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    lines = ["| model | " + " | ".join(f"{task}, {metric}" for task, metric in columns) + " |"]
    lines.append("|" + "---|" * (1 + len(columns)))
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = {(row["task"], row["metric"]): row for row in rows if row["model"] == name}
        cells = (f"{mine[c]['value']:.1%} ± {mine[c]['stderr'] or 0:.1%}" if c in mine else "" for c in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def mean(values: Sequence[float], digits: int) -> str:
    """Mean, and with several values ± its standard error."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def _text(row: Row) -> tuple[Any, ...]:
    sized = {**_OLD_SIZE, **row}
    return tuple(sized[key] for key in ("model", "domain", *_OLD_SIZE))


def _groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _KEYS), []).append(row)
    return groups
